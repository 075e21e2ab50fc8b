from structlog.testing import capture_logs

from app.observability.outages import Outage


def test_an_outage_is_logged_when_it_begins_and_when_it_ends() -> None:
    outage = Outage("Redis does not answer", ended="Redis is back")
    with capture_logs() as logs:
        outage.end()
        for _ in range(3):
            outage.begin(error="ConnectionError")
        outage.end()
        outage.end()
        outage.begin(error="TimeoutError")
    assert [(entry["log_level"], entry["event"], entry.get("error")) for entry in logs] == [
        ("warning", "Redis does not answer", "ConnectionError"),
        ("info", "Redis is back", None),
        ("warning", "Redis does not answer", "TimeoutError"),
    ]


def test_an_outage_without_a_message_ends_silently() -> None:
    outage = Outage("the database does not answer")
    outage.begin(error="OperationalError")
    with capture_logs() as logs:
        outage.end()
        outage.begin(error="OperationalError")
    assert [entry["event"] for entry in logs] == ["the database does not answer"]
