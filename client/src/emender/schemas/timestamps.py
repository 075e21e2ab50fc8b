"""Times in requests: RFC 3339 only. Pydantic alone also accepts numbers, as seconds since 1970."""

import re
from datetime import UTC, datetime
from typing import Annotated

from pydantic import AfterValidator, AwareDatetime, BeforeValidator

DATE = re.compile(r"\d{4}-\d\d-\d\d")


def _require_rfc3339(value: object) -> object:
    if isinstance(value, str) and not DATE.match(value) or isinstance(value, int | float):
        raise ValueError("must be a time such as 2026-11-24T12:00:00Z")
    return value


def _require_date(value: object) -> object:
    if isinstance(value, str) and not DATE.fullmatch(value):
        raise ValueError("must be a date such as 2026-11-24")
    return value


def _assume_utc(time: datetime) -> datetime:
    return time if time.tzinfo else time.replace(tzinfo=UTC)


Rfc3339DateTime = Annotated[AwareDatetime, BeforeValidator(_require_rfc3339)]
"""A time with its offset."""

UtcDateTime = Annotated[datetime, BeforeValidator(_require_rfc3339), AfterValidator(_assume_utc)]
"""A time; without an offset it is UTC."""

BareDate = BeforeValidator(_require_date)
