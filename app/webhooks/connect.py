"""Send one POST to an untrusted receiver within a given time.

A name is resolved once, every address is checked, and the connection goes to a checked address, not to the name.
TLS still requires a certificate of the name. Redirects are not followed, proxies of the environment are not used, and
only the beginning of the response is read.
"""

import ipaddress
import socket
import ssl
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import cache
from typing import Any

import httpcore

from app.webhooks.receivers import Address, Network, ReceiverInvalid, check_address, parse

EXCERPT_BYTES = 200  # kept of a response's body
CONNECT_SECONDS = 5.0  # for each address of a name


@dataclass(frozen=True)
class Response:
    """A receiver's response: its status, the beginning of its body, and its Retry-After in seconds from now."""

    status: int
    excerpt: str
    retry_after: float | None = None


class NotReached(Exception):
    """The receiver did not respond; the message says why."""


@cache
def tls_context() -> ssl.SSLContext:
    """Trust what the machine trusts. SSL_CERT_FILE names the authorities of a closed network."""
    return ssl.create_default_context()


def resolve(host: str, port: int) -> Sequence[str]:
    """Return the addresses of a name, by the system's resolver. Raises OSError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(each[4][0]) for each in found))


def post(url: str, *, headers: Mapping[str, str], body: bytes, networks: Sequence[Network], seconds: float) -> Response:
    """POST `body` and return the response of any status. All of it takes at most `seconds`.

    Raises `NotReached`, also for an address that may not be called.
    """
    try:
        receiver = parse(url)
        backend = CheckedBackend(encrypted=receiver.encrypted, networks=networks, deadline=time.monotonic() + seconds)
        host = url.split("/", 3)[2]  # as written: httpcore's own drops the brackets of IPv6
        with (
            httpcore.ConnectionPool(ssl_context=tls_context(), network_backend=backend, max_connections=1) as pool,
            pool.stream("POST", url, headers=[("Host", host), *headers.items()], content=body) as response,
        ):
            retry_after = [value for name, value in response.headers if name.lower() == b"retry-after"]
            excerpt = _read_excerpt(response.iter_stream())
            return Response(response.status, excerpt, _parse_retry_after(retry_after[0]) if retry_after else None)
    except ReceiverInvalid as error:
        raise NotReached(f"Refused: {error}.") from error
    except httpcore.TimeoutException as error:
        raise NotReached(f"No response within {seconds:.0f} s.") from error
    except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.UnsupportedProtocol, OSError) as error:
        reason = str(error) or type(error).__name__
        raise NotReached(f"No response: {printable(reason)[:EXCERPT_BYTES]}") from error


class CheckedBackend(httpcore.NetworkBackend):
    """Connects to checked addresses only, and ends every operation at the deadline (monotonic seconds)."""

    def __init__(self, *, encrypted: bool, networks: Sequence[Network], deadline: float) -> None:
        self.encrypted = encrypted
        self.networks = networks
        self.deadline = deadline
        self._sockets = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        failure: Exception = httpcore.ConnectError(f"{host} has no address")
        for address in self._checked_addresses(host, port):
            seconds = min(_seconds_left(self.deadline), CONNECT_SECONDS)
            try:
                stream = self._sockets.connect_tcp(str(address), port, timeout=seconds, socket_options=socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
            else:
                return _Stream(stream, self.deadline)
        raise failure

    def _checked_addresses(self, host: str, port: int) -> list[Address]:
        """Resolve a name. One address that may not be called condemns all of them."""
        try:
            addresses = [ipaddress.ip_address(address) for address in resolve(host, port)]
        except (OSError, UnicodeError) as error:
            raise httpcore.ConnectError(f"{host} cannot be resolved: {error}") from error
        for address in addresses:
            check_address(address, encrypted=self.encrypted, networks=self.networks)
        return addresses


class _Stream(httpcore.NetworkStream):
    """A connection whose operations end at the deadline, so that sending byte by byte gains a receiver no time."""

    def __init__(self, stream: httpcore.NetworkStream, deadline: float) -> None:
        self._stream = stream
        self._deadline = deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, _seconds_left(self._deadline))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, _seconds_left(self._deadline))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        stream = self._stream.start_tls(ssl_context, server_hostname, _seconds_left(self._deadline))
        return _Stream(stream, self._deadline)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


def printable(text: str) -> str:
    """Replace the characters that Postgres or a terminal would not take by spaces."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def _seconds_left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise httpcore.ReadTimeout("the deadline has passed")
    return left


def _parse_retry_after(value: bytes) -> float | None:
    """Parse a number of seconds or an HTTP date (RFC 9110, 10.2.3). None if it is neither."""
    text = value.decode("ascii", "replace").strip()
    if text.isdecimal() and len(text) < 10:
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def _read_excerpt(stream: Iterable[bytes]) -> str:
    content = b""
    with suppress(httpcore.TimeoutException, httpcore.NetworkError, httpcore.ProtocolError):  # the status has arrived
        for chunk in stream:
            content += chunk
            if len(content) >= EXCERPT_BYTES:
                break
    return printable(content[:EXCERPT_BYTES].decode("utf-8", "replace")).strip()
