"""Routes of webhooks and their deliveries."""

from uuid import UUID

from fastapi import APIRouter, Request, Response

from app.api.dependencies import NextPageLinkDep, PageDep, SessionDep, SettingsDep
from app.api.idempotency import store_instead
from app.api.routing import Route
from app.auth.dependencies import AdminPrincipal
from app.problems import documented
from app.webhooks import service
from app.webhooks.errors import DeliveryNotFound, TooManyWebhooks, WebhookDisabled, WebhookKeyMissing, WebhookNotFound
from emender.schemas.common import Page
from emender.schemas.webhooks import DeliveryOut, WebhookCreate, WebhookCreated, WebhookListed, WebhookUpdate

router = APIRouter(prefix="/webhooks", tags=["webhooks"], route_class=Route)


@router.post("", status_code=201, responses=documented(WebhookKeyMissing, TooManyWebhooks))
def create_webhook(
    session: SessionDep,
    settings: SettingsDep,
    principal: AdminPrincipal,
    webhook: WebhookCreate,
    request: Request,
    response: Response,
) -> WebhookCreated:
    """Create a webhook. Its signing secret is returned only once."""
    created = service.create_webhook(session, webhook, settings=settings, actor=principal.actor)
    response.headers["Location"] = f"/v1/webhooks/{created.id}"
    return _once(created, request, response)


@router.get("")
def list_webhooks(
    session: SessionDep, settings: SettingsDep, _: AdminPrincipal, page: PageDep, link_next: NextPageLinkDep
) -> Page[WebhookListed]:
    """List webhooks, newest first."""
    return link_next(service.list_webhooks(session, page=page, settings=settings))


@router.get("/{webhook_id}", responses=documented(WebhookNotFound))
def get_webhook(session: SessionDep, settings: SettingsDep, _: AdminPrincipal, webhook_id: UUID) -> WebhookListed:
    """Read a webhook, without its secret."""
    return service.read_webhook(session, webhook_id=webhook_id, settings=settings)


@router.patch("/{webhook_id}", responses=documented(WebhookNotFound))
def update_webhook(
    session: SessionDep, settings: SettingsDep, principal: AdminPrincipal, webhook_id: UUID, update: WebhookUpdate
) -> WebhookListed:
    """Change, disable or enable a webhook. Enabling it resets its failures."""
    return service.update_webhook(
        session, webhook_id=webhook_id, update=update, settings=settings, actor=principal.actor
    )


@router.delete("/{webhook_id}", status_code=204, responses=documented(WebhookNotFound))
def delete_webhook(session: SessionDep, principal: AdminPrincipal, webhook_id: UUID) -> None:
    """Delete a webhook and its deliveries. A delivery that is being sent may still arrive."""
    service.delete_webhook(session, webhook_id=webhook_id, actor=principal.actor)


@router.post("/{webhook_id}/rotate", responses=documented(WebhookNotFound, WebhookKeyMissing))
def rotate_secret(
    session: SessionDep,
    settings: SettingsDep,
    principal: AdminPrincipal,
    webhook_id: UUID,
    request: Request,
    response: Response,
) -> WebhookCreated:
    """Replace the signing secret; the new one is returned only once. For 24 hours the previous one signs too."""
    rotated = service.rotate_secret(session, webhook_id=webhook_id, settings=settings, actor=principal.actor)
    return _once(rotated, request, response)


@router.post("/{webhook_id}/test", status_code=202, responses=documented(WebhookNotFound, WebhookDisabled))
def send_ping(session: SessionDep, principal: AdminPrincipal, webhook_id: UUID) -> DeliveryOut:
    """Send a `webhook.ping`. The delivery shows the result."""
    return service.send_ping(session, webhook_id=webhook_id, actor=principal.actor)


@router.get("/{webhook_id}/deliveries", responses=documented(WebhookNotFound))
def list_deliveries(
    session: SessionDep, _: AdminPrincipal, webhook_id: UUID, page: PageDep, link_next: NextPageLinkDep
) -> Page[DeliveryOut]:
    """List deliveries with their attempts, newest first. Ended ones are kept for 30 days."""
    return link_next(service.list_deliveries(session, webhook_id=webhook_id, page=page))


@router.get("/{webhook_id}/deliveries/{delivery_id}", responses=documented(WebhookNotFound, DeliveryNotFound))
def get_delivery(session: SessionDep, _: AdminPrincipal, webhook_id: UUID, delivery_id: UUID) -> DeliveryOut:
    """Read a delivery with its attempts."""
    return service.read_delivery(session, webhook_id=webhook_id, delivery_id=delivery_id)


@router.post(
    "/{webhook_id}/deliveries/{delivery_id}/redeliver",
    status_code=202,
    responses=documented(WebhookNotFound, DeliveryNotFound, WebhookDisabled),
)
def redeliver(session: SessionDep, principal: AdminPrincipal, webhook_id: UUID, delivery_id: UUID) -> DeliveryOut:
    """Send a message again under the same `webhook-id`, as a new delivery."""
    return service.redeliver(session, webhook_id=webhook_id, delivery_id=delivery_id, actor=principal.actor)


def _once(created: WebhookCreated, request: Request, response: Response) -> WebhookCreated:
    """Return the response that shows the secret. A replayed response shows none."""
    response.headers["Cache-Control"] = "no-store"
    store_instead(request, created.model_copy(update={"secret": None}))
    return created
