"""Why a model, or its statistics, cannot be had."""

from uuid import UUID

from app.problems import Conflict, NotFound


class ModelNotFound(NotFound):
    title = "Model not found"

    def __init__(self, name: str) -> None:
        super().__init__(f"There is no model {name!r}; GET /v1/models lists them.")


class ModelExists(Conflict):
    title = "Model exists"

    def __init__(self, name: str, state: str) -> None:
        super().__init__(f"A model {name!r} is {state} already; choose another name.")


class ModelNotReady(Conflict):
    title = "Model not ready"

    def __init__(self, name: str, state: str) -> None:
        super().__init__(f"The model {name!r} is {state}, not ready; GET /v1/models/{name} says more.")


class StatisticsNotFound(NotFound):
    title = "Statistics not found"

    def __init__(self, model: str, statistics_id: UUID) -> None:
        super().__init__(f"The model {model!r} has no statistics {statistics_id}.")


class StatisticsUnderWay(Conflict):
    title = "Statistics under way"

    def __init__(self, model: str, statistics_id: UUID) -> None:
        super().__init__(
            f"Statistics of {model!r} are being estimated; see /v1/models/{model}/statistics/{statistics_id}."
        )
