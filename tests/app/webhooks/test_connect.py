import ssl
from ipaddress import ip_network

import pytest

from app.webhooks.connect import NotReached, post
from tests.app.webhooks.conftest import LOOPBACK, Receiver

pytestmark = pytest.mark.security

TLS = ssl.create_default_context()

FOUL = [
    "127.0.0.1", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "192.0.2.1",
    "224.0.0.1", "255.255.255.255", "240.0.0.1", "168.63.129.16", "::1", "::", "fe80::1", "fc00::1", "ff02::1",
    "::ffff:127.0.0.1", "::ffff:8.8.8.8", "::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b:1::1", "2002:7f00:1::1",
    "2001:0:7f00:1::1", "2001:db8::1", "fec0::1",
]  # fmt: skip


@pytest.mark.parametrize("address", FOUL)
def test_foul_addresses_are_refused_at_connect(address: str) -> None:
    with pytest.raises(NotReached, match="Refused: .* is not a public address"):
        post(
            "https://name.example/", headers={}, body=b"", networks=(), seconds=5, tls=TLS,
            resolve=lambda host, port: [address],
        )  # fmt: skip


def test_one_foul_address_among_good_ones_is_enough() -> None:
    with pytest.raises(NotReached, match=r"10\.0\.0\.1 is not a public address"):
        post(
            "https://name.example/", headers={}, body=b"", networks=(), seconds=5, tls=TLS,
            resolve=lambda host, port: ["8.8.8.8", "10.0.0.1"],
        )  # fmt: skip


def test_a_name_is_resolved_once_and_the_checked_address_is_called(receiver: Receiver) -> None:
    """Had the name been looked up again, it would have pointed elsewhere; and `name.example` has no address at all."""
    answers = [["127.0.0.1"], ["10.0.0.1"]]
    asked: list[str] = []

    def resolve(host: str, port: int) -> list[str]:
        asked.append(host)
        return answers.pop(0)

    url = receiver.url.replace("127.0.0.1", "name.example")
    given = {"headers": {}, "body": b"{}", "networks": LOOPBACK, "seconds": 5.0, "tls": TLS, "resolve": resolve}
    assert post(url, **given).status == 204  # type: ignore[arg-type]
    assert asked == ["name.example"]
    assert receiver.received[0][0]["host"].startswith("name.example:")
    with pytest.raises(NotReached, match=r"10\.0\.0\.1 is in none of EMENDER_WEBHOOK_ALLOWED_NETWORKS"):
        post(url, **given)  # type: ignore[arg-type]
    assert len(receiver.received) == 1


def test_a_redirect_is_not_followed(receiver: Receiver) -> None:
    receiver.statuses, receiver.location = [307], receiver.url + "/elsewhere"
    answer = post(receiver.url, headers={}, body=b"{}", networks=LOOPBACK, seconds=5, tls=TLS)
    assert answer.status == 307
    assert len(receiver.received) == 1


def test_http_is_for_the_allowed_networks_alone() -> None:
    with pytest.raises(NotReached, match="called by https only"):
        post(
            "http://name.example/", headers={}, body=b"", networks=(ip_network("10.0.0.0/8"),), seconds=5, tls=TLS,
            resolve=lambda host, port: ["8.8.8.8"],
        )  # fmt: skip


def test_a_receiver_that_never_answers_takes_no_longer_than_given(receiver: Receiver) -> None:
    receiver.hanging.set()
    with pytest.raises(NotReached, match="No answer within"):
        post(receiver.url, headers={}, body=b"{}", networks=LOOPBACK, seconds=0.5, tls=TLS)


def test_little_of_an_answer_is_kept(receiver: Receiver) -> None:
    receiver.statuses = [500]
    answer = post(receiver.url, headers={}, body=b"{}", networks=LOOPBACK, seconds=5, tls=TLS)
    assert answer.status == 500
    assert answer.excerpt.startswith("not now x") and len(answer.excerpt) <= 200
