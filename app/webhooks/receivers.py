"""Who may be called: which URLs are taken, and which addresses may stand behind them.

The URL is checked when a hook is made. What counts is the address, and that is checked each time at connect
(`app.webhooks.connect`), since a name may point elsewhere by then.
"""

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

MAX_URL = 2000
LABEL = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)")
PRINTABLE = re.compile(r"[!-~]+")

SPECIAL = [
    ipaddress.ip_network(network)
    for network in (
        # IANA's IPv4 special-purpose registry, multicast and what is reserved. They are listed here, since
        # `is_global` of the standard library changed with its patch versions.
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
        *("192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24"),
        *("203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
        "168.63.129.16/32",  # looks public, and is the host of every Azure machine
        # Within 2000::/3: protocol assignments with Teredo, documentation, 6to4
        *("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20"),
    )
]
UNICAST = ipaddress.ip_network("2000::/3")
"""All public IPv6 is here. Outside are loopback, link-local, private and multicast addresses, and every form in which
an IPv4 address hides (mapped, compatible, NAT64)."""


class ReceiverRefused(ValueError):
    """Not to be called; the message says why, and what may be done."""


@dataclass(frozen=True)
class Receiver:
    """A URL in its parts."""

    encrypted: bool
    host: str
    port: int
    address: Address | None  # where the host is one

    @property
    def origin(self) -> str:
        """`host:port`, for logs: the rest of a URL may hold a secret."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def check_url(url: str, *, networks: Sequence[Network]) -> Receiver:
    """The receiver of a URL; raises `ReceiverRefused` for one that we would never call.

    `networks` are those that the operator allows besides public addresses; plain http is for them alone.
    """
    receiver = parse(url)
    if not receiver.encrypted and not networks:
        raise ReceiverRefused("must be https: http is taken only for the networks of EMENDER_WEBHOOK_ALLOWED_NETWORKS")
    if receiver.address is not None:
        check_address(receiver.address, encrypted=receiver.encrypted, networks=networks)
    return receiver


def parse(url: str) -> Receiver:
    """The parts of a URL written plainly. What two parsers could read in two ways is refused, not interpreted."""
    if len(url) > MAX_URL:
        raise ReceiverRefused(f"must have at most {MAX_URL} characters")
    if not url.isascii():
        raise ReceiverRefused("must be ASCII: write an international host in its xn--… form, and escape its path by %")
    if not PRINTABLE.fullmatch(url) or "\\" in url:
        raise ReceiverRefused("must hold no space, control character or backslash")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ReceiverRefused(f"is not a URL: {error}") from None
    if parts.scheme not in ("https", "http") or not url.lower().startswith(f"{parts.scheme}://"):
        raise ReceiverRefused("must be an https URL, such as https://deploy.example/emender")
    if "@" in parts.netloc:
        raise ReceiverRefused("must hold no user name or password: deliveries prove themselves by their signature")
    if "#" in url:
        raise ReceiverRefused("must have no fragment (#…): it would not be sent")
    if parts.hostname is None or parts.netloc.endswith(":"):
        raise ReceiverRefused("must name a host, and a port after a colon")
    encrypted = parts.scheme == "https"
    if port is None:
        port = 443 if encrypted else 80
    if port not in (80, 443) and port < 1024:
        raise ReceiverRefused(f"must not name port {port}: 80, 443 and those from 1024 on are called")
    return Receiver(encrypted, parts.hostname, port, _literal(parts.hostname, bracketed="[" in parts.netloc))


def check_address(address: Address, *, encrypted: bool, networks: Sequence[Network]) -> None:
    """Raise `ReceiverRefused` for an address that is neither public nor in one of the networks.

    Public: unicast that the whole Internet routes (IANA's special-purpose registries, RFC 6890).
    """
    if any(address in network for network in networks):
        return
    if not encrypted:
        raise ReceiverRefused(f"{address} is in none of EMENDER_WEBHOOK_ALLOWED_NETWORKS, and is called by https only")
    public = address.is_global and not address.is_multicast and not any(address in network for network in SPECIAL)
    if not public or (address.version == 6 and address not in UNICAST):
        raise ReceiverRefused(
            f"{address} is not a public address; EMENDER_WEBHOOK_ALLOWED_NETWORKS may allow its network"
        )


def _literal(host: str, *, bracketed: bool) -> Address | None:
    if bracketed:
        try:
            if "%" in host:
                raise ValueError("a zone is of one machine")
            return ipaddress.IPv6Address(host)
        except ValueError:
            raise ReceiverRefused(f"[{host}] is not an IPv6 address") from None
    labels = host.split(".")
    if len(host) > 253 or not all(LABEL.fullmatch(label) for label in labels):
        raise ReceiverRefused(f"{host!r} is not the name of a host")
    if labels[-1][0].isdigit():  # resolvers read 127.1, 0x7f000001 and 2130706433 as addresses
        try:
            return ipaddress.IPv4Address(host)
        except ValueError:
            raise ReceiverRefused(f"{host!r} is neither a name nor an IPv4 address of four decimal numbers") from None
    return None
