from collections.abc import Sequence
from ipaddress import ip_network

import pytest

from app.webhooks import connect
from app.webhooks.connect import NotReached, Response, post
from app.webhooks.receivers import Network
from tests.app.webhooks.conftest import LOOPBACK, Receiver

pytestmark = pytest.mark.security


def call(
    monkeypatch: pytest.MonkeyPatch,
    url: str = "https://name.example/",
    *,
    networks: Sequence[Network] = (),
    to: str = "",
) -> Response:
    """POST to a URL whose name has the addresses `to`, separated by spaces."""
    if to:
        monkeypatch.setattr(connect, "resolve", lambda host, port: to.split())
    return post(url, headers={}, body=b"{}", networks=networks, seconds=5)


FORBIDDEN = [
    "127.0.0.1", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "192.0.2.1",
    "224.0.0.1", "255.255.255.255", "240.0.0.1", "168.63.129.16", "::1", "::", "fe80::1", "fc00::1", "ff02::1",
    "::ffff:127.0.0.1", "::ffff:8.8.8.8", "::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b:1::1", "2002:7f00:1::1",
    "2001:0:7f00:1::1", "2001:db8::1", "fec0::1",
]  # fmt: skip


@pytest.mark.parametrize("address", FORBIDDEN)
def test_forbidden_addresses_are_refused_at_connect(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotReached, match="Refused: .* is not a public address"):
        call(monkeypatch, to=address)


def test_one_forbidden_address_of_a_name_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotReached, match=r"10\.0\.0\.1 is not a public address"):
        call(monkeypatch, to="8.8.8.8 10.0.0.1")


def test_a_name_is_resolved_once_and_the_checked_address_is_called(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second look-up would return another address, and `name.example` itself has none."""
    addresses = [["127.0.0.1"], ["10.0.0.1"]]
    names: list[str] = []

    def resolve(host: str, port: int) -> list[str]:
        names.append(host)
        return addresses.pop(0)

    monkeypatch.setattr(connect, "resolve", resolve)
    url = receiver.url.replace("127.0.0.1", "name.example")
    assert call(monkeypatch, url, networks=LOOPBACK).status == 204
    assert names == ["name.example"]
    assert receiver.received[0][0]["host"].startswith("name.example:")
    with pytest.raises(NotReached, match=r"10\.0\.0\.1 is not in EMENDER_WEBHOOK_ALLOWED_NETWORKS"):
        call(monkeypatch, url, networks=LOOPBACK)
    assert len(receiver.received) == 1


def test_a_redirect_is_not_followed(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    receiver.statuses, receiver.location = [307], receiver.url + "/elsewhere"
    assert call(monkeypatch, receiver.url, networks=LOOPBACK).status == 307
    assert len(receiver.received) == 1


def test_http_is_only_for_the_allowed_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotReached, match="so it needs https"):
        call(monkeypatch, "http://name.example/", networks=[ip_network("10.0.0.0/8")], to="8.8.8.8")


def test_a_receiver_that_never_responds_takes_no_longer_than_allowed(receiver: Receiver) -> None:
    receiver.hanging.set()
    with pytest.raises(NotReached, match="No response within"):
        post(receiver.url, headers={}, body=b"{}", networks=LOOPBACK, seconds=0.5)


def test_only_the_beginning_of_a_response_is_kept(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    receiver.statuses = [500]
    response = call(monkeypatch, receiver.url, networks=LOOPBACK)
    assert response.status == 500
    assert response.excerpt.startswith("not now x") and len(response.excerpt) <= 200
