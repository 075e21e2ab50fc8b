# Written by client/generate_sync.py from emender/_async. Do not edit.
"""The client, with one attribute per resource of the API."""

from types import TracebackType
from typing import Self

import httpx2

from emender._sync.administration import Audit, Keys, Webhooks
from emender._sync.checkpoints import Aliases, Checkpoints, Files, SigningKeys
from emender._sync.connection import Connection
from emender._sync.edits import Edits
from emender._sync.evaluations import Evaluations
from emender._sync.models import Images, Models, Statistics
from emender.requests import DEFAULT_RETRIES, find_api_key, find_url


class Client:
    """A client of one service. It may be shared.

    `url` and `api_key` default to EMENDER_URL (else http://127.0.0.1:8000) and EMENDER_API_KEY. `timeout` is in seconds
    for each attempt; `retries` is the number of attempts after the first. Methods return the API's schemas, and raise
    `ApiError` if the service returns an error and `ConnectionFailed` if it does not respond. Both are `EmenderError`s.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        api_key: str | None = None,
        timeout: float = 60.0,
        retries: int = DEFAULT_RETRIES,
        transport: httpx2.BaseTransport | None = None,
    ) -> None:
        self.url = find_url(url)
        self._connection = Connection(
            self.url, api_key=find_api_key(api_key), timeout=timeout, retries=retries, transport=transport
        )
        self.models = Models(self._connection)
        self.statistics = Statistics(self._connection)
        self.images = Images(self._connection)
        self.edits = Edits(self._connection)
        self.checkpoints = Checkpoints(self._connection)
        self.aliases = Aliases(self._connection)
        self.evaluations = Evaluations(self._connection)
        self.files = Files(self._connection)
        self.signing_keys = SigningKeys(self._connection)
        self.audit = Audit(self._connection)
        self.keys = Keys(self._connection)
        self.webhooks = Webhooks(self._connection)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._connection.close()
