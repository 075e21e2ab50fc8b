"""`emender webhooks …`: who is told of events, asked over HTTP with an admin key."""

import time
from typing import TYPE_CHECKING, Annotated, cast

import typer

from app.cli.console import AsJson, asking, show, show_table
from app.cli.errors import CommandError, WrongUsage

if TYPE_CHECKING:
    from emender.schemas.webhooks import DeliveryOut, EventType, WebhookCreated, WebhookListed

webhooks = typer.Typer(help="Receivers of signed events.", no_args_is_help=True)

TRY_SECONDS = 60.0  # within which a worker that runs has tried to send

Id = Annotated[str, typer.Argument(metavar="WEBHOOK", help="The webhook's id.")]
Events = Annotated[
    list[str] | None,
    typer.Option("--event", help="edit.ready, edit.failed, checkpoint.published or alias.moved; again for more."),
]
Description = Annotated[str | None, typer.Option(help="Who receives it, and what for.")]


@webhooks.command("list")
def list_webhooks(as_json: AsJson = False) -> None:
    """List webhooks, newest first."""
    with asking() as client:
        found = list(client.webhooks.list())
    rows = ((item.id, item.url, ", ".join(item.events), _state(item), item.description) for item in found)
    columns = ("webhook", "url", "events", "state", "description")
    show(found, as_json=as_json, otherwise=lambda: show_table(columns, rows))


@webhooks.command("create")
def create_webhook(
    url: Annotated[str, typer.Argument(help="https, or http in EMENDER_WEBHOOK_ALLOWED_NETWORKS.")],
    event: Events = None,
    description: Description = None,
    as_json: AsJson = False,
) -> None:
    """Create a webhook and print its signing secret, which is kept nowhere."""
    if not event:
        raise WrongUsage("Give --event for each kind of event that is to be sent, such as --event alias.moved.")
    with asking() as client:
        made = client.webhooks.create(url, events=cast("list[EventType]", event), description=description)
    _show_secret(made, as_json=as_json)


@webhooks.command("update")
def update_webhook(
    webhook: Id,
    url: Annotated[str | None, typer.Option(help="Where events are sent.")] = None,
    event: Events = None,
    description: Description = None,
    enabled: Annotated[
        bool | None, typer.Option("--enable/--disable", help="Disabling ends what is still to be sent.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Change, disable or enable a webhook; what is not given stays."""
    with asking() as client:
        changed = client.webhooks.update(
            webhook,
            url=url,
            events=cast("list[EventType] | None", event or None),
            description=description,
            enabled=enabled,
        )
    show(changed, as_json=as_json, otherwise=lambda: typer.echo(f"{changed.id} {_state(changed)}"))


@webhooks.command("rotate")
def rotate_secret(webhook: Id, as_json: AsJson = False) -> None:
    """Make another signing secret and print it; for 24 hours deliveries are signed with the one before as well."""
    with asking() as client:
        rotated = client.webhooks.rotate(webhook)
    _show_secret(rotated, as_json=as_json)


@webhooks.command("test")
def send_ping(
    webhook: Id,
    wait: Annotated[bool, typer.Option("--wait", help="Until it was tried; exit with 1 where it failed.")] = False,
    as_json: AsJson = False,
) -> None:
    """Send a `webhook.ping`."""
    with asking() as client:
        delivery = client.webhooks.test(webhook)
        deadline = time.monotonic() + TRY_SECONDS
        while wait and delivery.state == "pending" and not delivery.attempts:
            if time.monotonic() > deadline:
                raise CommandError(
                    f"Nothing was sent within {TRY_SECONDS:.0f} s: does a worker run with EMENDER_WEBHOOK_SECRET_KEY?"
                )
            time.sleep(0.3)
            delivery = client.webhooks.delivery(webhook, delivery.id)
    show(delivery, as_json=as_json, otherwise=lambda: typer.echo(f"{delivery.id} {_outcome(delivery)}"))
    if wait and delivery.state != "delivered":
        raise typer.Exit(1)


@webhooks.command("deliveries")
def list_deliveries(webhook: Id, as_json: AsJson = False) -> None:
    """List what was sent or is to be sent, newest first."""
    with asking() as client:
        found = list(client.webhooks.deliveries(webhook))
    rows = ((item.id, item.event, item.tries, _outcome(item), item.next_try_at) for item in found)
    columns = ("delivery", "event", "tries", "outcome", "next try")
    show(found, as_json=as_json, otherwise=lambda: show_table(columns, rows))


@webhooks.command("redeliver")
def redeliver(
    webhook: Id,
    delivery: Annotated[str, typer.Argument(help="The delivery's id.")],
    as_json: AsJson = False,
) -> None:
    """Send a message again under the same id."""
    with asking() as client:
        again = client.webhooks.redeliver(webhook, delivery)
    show(again, as_json=as_json, otherwise=lambda: typer.echo(f"{again.id} {_outcome(again)}"))


@webhooks.command("delete")
def delete_webhook(webhook: Id, as_json: AsJson = False) -> None:
    """Delete a webhook and its deliveries."""
    with asking() as client:
        client.webhooks.delete(webhook)
    show({"id": webhook, "deleted": True}, as_json=as_json, otherwise=lambda: typer.echo(f"{webhook} deleted"))


def _show_secret(made: "WebhookCreated", *, as_json: bool) -> None:
    def write() -> None:
        typer.echo(f"webhook {made.id}", err=True)
        if made.secret is None:
            raise CommandError("The answer with its secret was lost on the way: emender webhooks rotate makes another.")
        typer.echo(made.secret)

    show(made, as_json=as_json, otherwise=write)


def _state(webhook: "WebhookListed") -> str:
    if not webhook.enabled:
        return f"disabled: {webhook.disabled_reason}"
    if not webhook.signable:
        return "made with another webhook key: rotate its secret"
    return f"failing since {webhook.failing_since}" if webhook.failing_since else "enabled"


def _outcome(delivery: "DeliveryOut") -> str:
    if not delivery.attempts:
        return delivery.state
    last = delivery.attempts[-1]
    return f"{delivery.state}: {last.error or last.status}"
