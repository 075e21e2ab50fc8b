"""Times as clients write them: RFC 3339. Pydantic alone would take numbers too, as seconds since 1970."""

import re
from datetime import datetime
from typing import Annotated

from pydantic import AwareDatetime, BeforeValidator

DATE = re.compile(r"\d{4}-\d\d-\d\d")


def _written(value: object) -> object:
    if isinstance(value, str) and not DATE.match(value) or isinstance(value, int | float):
        raise ValueError("must be a time such as 2026-11-24T12:00:00Z")
    return value


def _bare_date(value: object) -> object:
    if isinstance(value, str) and not DATE.fullmatch(value):
        raise ValueError("must be a date such as 2026-11-24")
    return value


Moment = Annotated[datetime, BeforeValidator(_written)]
AwareMoment = Annotated[AwareDatetime, BeforeValidator(_written)]
BareDate = BeforeValidator(_bare_date)
