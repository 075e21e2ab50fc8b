"""The client: what the API has, by its nouns."""

from types import TracebackType
from typing import Self

import httpx2

from emender.administration import Audit, Keys, Webhooks
from emender.checkpoints import Aliases, Checkpoints, Evaluations, Files, SigningKeys
from emender.connection import RETRIES, Connection
from emender.edits import Edits
from emender.models import Images, Models, StatisticsOfModels


class Client:
    """The service at a URL, asked with an API key. One may be used by many threads.

    Answers are the API's own schemas. Whatever breaks or comes too early is sent again, a POST under an Idempotency-Key
    of its own, so that it is done once. Every method raises `Refused` where the service says no, and `Unreachable`
    where nobody answers; both are an `EmenderError`, which says what to do.

    >>> with Client("http://127.0.0.1:8000", api_key="em_…") as client:
    ...     [model.name for model in client.models.list()]
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str,
        timeout: float = 60.0,
        retries: int = RETRIES,
        transport: httpx2.BaseTransport | None = None,
    ) -> None:
        """`timeout` in seconds for each try, of which there are one and `retries`."""
        self.api_key = api_key
        self._connection = Connection(url, api_key=api_key, timeout=timeout, retries=retries, transport=transport)
        self.url = self._connection.url
        self.models = Models(self._connection)
        self.statistics = StatisticsOfModels(self._connection)
        self.images = Images(self._connection)
        self.edits = Edits(self._connection)
        self.checkpoints = Checkpoints(self._connection, api_key=api_key)
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
        self._connection.close()
