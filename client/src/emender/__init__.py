"""The Python client of Emender.

>>> from emender import Client
>>> client = Client()
>>> edit = client.edits.create("emoji", source="dog", destination="robot")
>>> client.edits.wait(edit.id)
>>> checkpoint = client.checkpoints.apply("emoji", edits="ready", alias="production")
>>> client.checkpoints.wait("emoji", checkpoint.version)

`AsyncClient` has the same methods as coroutines and async iterators.
"""

from emender._async.client import AsyncClient
from emender._sync.client import Client
from emender.errors import (
    ApiError,
    Conflict,
    ConnectionFailed,
    EmenderError,
    Forbidden,
    NotFound,
    RateLimited,
    Unauthorized,
    ValidationFailed,
    WaitTimeout,
    WorkFailed,
)
from emender.pictures import Picture, Pictures
from emender.schemas.edits import Destination, EditCreate, StageOneSettings
from emender.schemas.models import License

__version__ = "0.2.0"

__all__ = [
    "ApiError",
    "AsyncClient",
    "Client",
    "Conflict",
    "ConnectionFailed",
    "Destination",
    "EditCreate",
    "EmenderError",
    "Forbidden",
    "License",
    "NotFound",
    "Picture",
    "Pictures",
    "RateLimited",
    "StageOneSettings",
    "Unauthorized",
    "ValidationFailed",
    "WaitTimeout",
    "WorkFailed",
]
