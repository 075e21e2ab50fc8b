"""The URLs that webhooks may have, and the addresses that may be called.

The URL is checked when a webhook is created. The address is checked at each connect (`app.webhooks.connect`), since a
name may point elsewhere by then.
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
        # IANA's IPv4 special-purpose registry, multicast and reserved blocks. Listed here because `is_global` of the
        # standard library changed with its patch versions.
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
        *("192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24"),
        *("203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
        "168.63.129.16/32",  # looks public, but is the host of every Azure machine
        # Within 2000::/3: protocol assignments with Teredo, documentation, 6to4
        *("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20"),
    )
]
UNICAST = ipaddress.ip_network("2000::/3")
"""All public IPv6 addresses. Outside are loopback, link-local, private and multicast addresses, and those that contain
an IPv4 address (mapped, compatible, NAT64)."""


class ReceiverInvalid(ValueError):
    """The URL or address may not be called; the message says why and what to do."""


@dataclass(frozen=True)
class Receiver:
    """The parts of a URL."""

    encrypted: bool
    host: str
    port: int
    address: Address | None  # if the host is one

    @property
    def origin(self) -> str:
        """`host:port`, for logs: the rest of a URL may hold a secret."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def check_url(url: str, *, networks: Sequence[Network]) -> Receiver:
    """Return the receiver of a URL. Raises `ReceiverInvalid` for one that is never called.

    `networks` may be called besides public addresses. Plain http is for them only.
    """
    receiver = parse(url)
    if not receiver.encrypted and not networks:
        raise ReceiverInvalid("must be https: http is only for the networks of EMENDER_WEBHOOK_ALLOWED_NETWORKS")
    if receiver.address is not None:
        check_address(receiver.address, encrypted=receiver.encrypted, networks=networks)
    return receiver


def parse(url: str) -> Receiver:
    """Parse a URL. One that two parsers could read in two ways is refused."""
    if len(url) > MAX_URL:
        raise ReceiverInvalid(f"must have at most {MAX_URL} characters")
    if not url.isascii():
        raise ReceiverInvalid("must be ASCII: write an international host in its xn--… form, and escape the path by %")
    if not PRINTABLE.fullmatch(url) or "\\" in url:
        raise ReceiverInvalid("must contain no space, control character or backslash")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ReceiverInvalid(f"is not a URL: {error}") from None
    if parts.scheme not in ("https", "http") or not url.lower().startswith(f"{parts.scheme}://"):
        raise ReceiverInvalid("must be an https URL, such as https://deploy.example/emender")
    if "@" in parts.netloc:
        raise ReceiverInvalid("must contain no user name or password: deliveries are authenticated by their signature")
    if "#" in url:
        raise ReceiverInvalid("must have no fragment (#…): it would not be sent")
    if parts.hostname is None or parts.netloc.endswith(":"):
        raise ReceiverInvalid("must name a host, and a port after a colon")
    encrypted = parts.scheme == "https"
    if port is None:
        port = 443 if encrypted else 80
    if port not in (80, 443) and port < 1024:
        raise ReceiverInvalid(f"must not name port {port}: use 80, 443 or one from 1024")
    return Receiver(encrypted, parts.hostname, port, _literal(parts.hostname, bracketed="[" in parts.netloc))


def check_address(address: Address, *, encrypted: bool, networks: Sequence[Network]) -> None:
    """Raise `ReceiverInvalid` for an address that is neither public nor in `networks`.

    Public: globally routed unicast (IANA's special-purpose registries, RFC 6890).
    """
    if any(address in network for network in networks):
        return
    if not encrypted:
        raise ReceiverInvalid(f"{address} is not in EMENDER_WEBHOOK_ALLOWED_NETWORKS, so it needs https")
    public = address.is_global and not address.is_multicast and not any(address in network for network in SPECIAL)
    if not public or (address.version == 6 and address not in UNICAST):
        raise ReceiverInvalid(
            f"{address} is not a public address; EMENDER_WEBHOOK_ALLOWED_NETWORKS may allow its network"
        )


def _literal(host: str, *, bracketed: bool) -> Address | None:
    if bracketed:
        try:
            if "%" in host:
                raise ValueError("a zone is local to one machine")
            return ipaddress.IPv6Address(host)
        except ValueError:
            raise ReceiverInvalid(f"[{host}] is not an IPv6 address") from None
    labels = host.split(".")
    if len(host) > 253 or not all(LABEL.fullmatch(label) for label in labels):
        raise ReceiverInvalid(f"{host!r} is not the name of a host")
    if labels[-1][0].isdigit():  # resolvers read 127.1, 0x7f000001 and 2130706433 as addresses
        try:
            return ipaddress.IPv4Address(host)
        except ValueError:
            raise ReceiverInvalid(f"{host!r} is neither a name nor an IPv4 address of four decimal numbers") from None
    return None
