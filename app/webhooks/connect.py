"""One POST to a receiver that we do not trust, within a given time.

A name is resolved once, every address is checked, and the connection goes to a checked address itself, never to the
name again. TLS still asks for a certificate of the name. Redirects are answers like others; proxies of the environment
are not used; of the answer little is read.
"""

import ipaddress
import socket
import ssl
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

import httpcore

from app.webhooks.receivers import Address, Network, ReceiverRefused, check_address, parse

EXCERPT_BYTES = 200  # kept of an answer
CONNECT_SECONDS = 5.0  # for each address of a name
RETRY = b"retry-after"

Resolve = Callable[[str, int], Sequence[str]]


@dataclass(frozen=True)
class Answer:
    """A receiver's answer: its status, how its body begins, and its header Retry-After in seconds from now."""

    status: int
    excerpt: str
    retry_after: float | None = None


class NotReached(Exception):
    """No answer was had; the message says why."""


def resolve(host: str, port: int) -> Sequence[str]:
    """The addresses of a name, by the system's resolver; raises OSError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(each[4][0]) for each in found))


def post(
    url: str,
    *,
    headers: Mapping[str, str],
    body: bytes,
    networks: Sequence[Network],
    seconds: float,
    tls: ssl.SSLContext,
    resolve: Resolve = resolve,
) -> Answer:
    """POST `body`, and return the answer, whatever its status; all of it within `seconds`.

    Raises `NotReached`; among its reasons is an address that may not be called.
    """
    try:
        receiver = parse(url)
        backend = CheckedBackend(
            encrypted=receiver.encrypted, networks=networks, deadline=time.monotonic() + seconds, resolve=resolve
        )
        host = url.split("/", 3)[2]  # as it was written: httpcore's own loses the brackets of IPv6
        with (
            httpcore.ConnectionPool(ssl_context=tls, network_backend=backend, max_connections=1) as pool,
            pool.stream("POST", url, headers=[("Host", host), *headers.items()], content=body) as response,
        ):
            retry_after = next((_seconds(value) for name, value in response.headers if name.lower() == RETRY), None)
            return Answer(response.status, _excerpt(response.iter_stream()), retry_after)
    except ReceiverRefused as error:
        raise NotReached(f"Refused: {error}.") from error
    except httpcore.TimeoutException as error:
        raise NotReached(f"No answer within {seconds:.0f} s.") from error
    except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.UnsupportedProtocol, OSError) as error:
        reason = str(error) or type(error).__name__
        raise NotReached(f"No answer: {printable(reason)[:EXCERPT_BYTES]}") from error


class CheckedBackend(httpcore.NetworkBackend):
    """Connects to checked addresses only, and lets nothing take longer than the deadline (monotonic seconds)."""

    def __init__(self, *, encrypted: bool, networks: Sequence[Network], deadline: float, resolve: Resolve) -> None:
        self.encrypted = encrypted
        self.networks = networks
        self.deadline = deadline
        self.resolve = resolve
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
        for address in self._addresses(host, port):
            left = min(_left(self.deadline), CONNECT_SECONDS)
            try:
                stream = self._sockets.connect_tcp(str(address), port, timeout=left, socket_options=socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
            else:
                return _Stream(stream, self.deadline)
        raise failure

    def _addresses(self, host: str, port: int) -> list[Address]:
        """All of them are checked before any is called: a name with one foul address is not to be trusted."""
        try:
            addresses = [ipaddress.ip_address(address) for address in self.resolve(host, port)]
        except (OSError, UnicodeError) as error:
            raise httpcore.ConnectError(f"{host} cannot be resolved: {error}") from error
        for address in addresses:
            check_address(address, encrypted=self.encrypted, networks=self.networks)
        return addresses


class _Stream(httpcore.NetworkStream):
    """A connection whose every step ends at the deadline: a receiver that answers byte by byte gains nothing."""

    def __init__(self, stream: httpcore.NetworkStream, deadline: float) -> None:
        self._stream = stream
        self._deadline = deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, _left(self._deadline))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, _left(self._deadline))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        stream = self._stream.start_tls(ssl_context, server_hostname, _left(self._deadline))
        return _Stream(stream, self._deadline)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


def printable(text: str) -> str:
    """On one line, and without what Postgres or a terminal would not take."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise httpcore.ReadTimeout("the time is over")
    return left


def _seconds(value: bytes) -> float | None:
    """Of `Retry-After`: a number of seconds, or an HTTP date (RFC 9110, 10.2.3). None where it is neither."""
    text = value.decode("ascii", "replace").strip()
    if text.isdecimal() and len(text) < 10:
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def _excerpt(stream: Iterable[bytes]) -> str:
    content = b""
    with suppress(httpcore.TimeoutException, httpcore.NetworkError, httpcore.ProtocolError):  # the status has come
        for chunk in stream:
            content += chunk
            if len(content) >= EXCERPT_BYTES:
                break
    return printable(content[:EXCERPT_BYTES].decode("utf-8", "replace")).strip()
