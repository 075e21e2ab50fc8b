"""Problems of requests about webhooks."""

from uuid import UUID

from app.problems import Conflict, NotFound


class WebhookNotFound(NotFound):
    def __init__(self, webhook_id: UUID) -> None:
        super().__init__(f"There is no webhook {webhook_id}.")


class DeliveryNotFound(NotFound):
    def __init__(self, delivery_id: UUID) -> None:
        super().__init__(f"There is no delivery {delivery_id} of this webhook. Ended deliveries are kept for 30 days.")


class WebhookKeyMissing(Conflict):
    def __init__(self) -> None:
        super().__init__(
            "This service has no key to derive signing secrets from: set EMENDER_WEBHOOK_SECRET_KEY, or the "
            "secret file emender_webhook_secret_key, to at least 32 random characters (openssl rand -hex 32). "
            "Set it for the API and the workers."
        )


class TooManyWebhooks(Conflict):
    def __init__(self, limit: int) -> None:
        super().__init__(f"There are {limit} webhooks, which is the limit; delete one that is not needed.")


class WebhookDisabled(Conflict):
    def __init__(self, webhook_id: UUID) -> None:
        super().__init__(f"The webhook {webhook_id} is disabled; enable it first (PATCH, enabled: true).")
