"""`emender webhooks`: receivers of events, with an admin's key."""

import time
from typing import Annotated, cast, get_args

import typer

from emender.cli.console import AsJson, api_client, print_result, print_table
from emender.cli.errors import CommandError, ExitCode, UsageError
from emender.schemas.webhooks import DeliveryOut, EventType, WebhookCreated, WebhookListed

webhooks = typer.Typer(help="Receivers of signed events.", no_args_is_help=True)

PING_TIMEOUT_SECONDS = 60.0

WebhookId = Annotated[str, typer.Argument(metavar="WEBHOOK", help="Id of the webhook.")]
EVENT_TYPES = "|".join(get_args(EventType))
Events = Annotated[
    list[str] | None, typer.Option("--event", metavar=f"[{EVENT_TYPES}]", help="Type of event to send (repeatable).")
]
Description = Annotated[str | None, typer.Option(help="Receiver and its purpose.")]


@webhooks.command("list")
def list_webhooks(as_json: AsJson = False) -> None:
    """List webhooks, newest first."""
    with api_client() as client:
        found = list(client.webhooks.list())
    rows = ((item.id, item.url, ", ".join(item.events), _describe_state(item), item.description) for item in found)
    columns = ("webhook", "url", "events", "state", "description")
    print_result(found, as_json=as_json, as_text=lambda: print_table(columns, rows))


@webhooks.command("create")
def create_webhook(
    url: Annotated[str, typer.Argument(help="URL: https, or http for a receiver in EMENDER_WEBHOOK_ALLOWED_NETWORKS.")],
    event: Events = None,
    description: Description = None,
    as_json: AsJson = False,
) -> None:
    """Create a webhook and print its signing secret, which is shown only once."""
    if not event:
        raise UsageError("Give --event for each type of event to send, such as --event alias.moved.")
    with api_client() as client:
        created = client.webhooks.create(url, events=cast(list[EventType], event), description=description)
    _print_secret(created, as_json=as_json)


@webhooks.command("update")
def update_webhook(
    webhook: WebhookId,
    url: Annotated[str | None, typer.Option(help="URL of the receiver.")] = None,
    event: Events = None,
    description: Description = None,
    enabled: Annotated[
        bool | None, typer.Option("--enable/--disable", help="Disabling drops pending deliveries.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Change, disable or enable a webhook. Other fields stay."""
    with api_client() as client:
        changed = client.webhooks.update(
            webhook, url=url, events=cast(list[EventType], event) or None, description=description, enabled=enabled
        )
    line = f"{changed.id} {_describe_state(changed)}"
    print_result(changed, as_json=as_json, as_text=lambda: typer.echo(line))


@webhooks.command("rotate")
def rotate_secret(webhook: WebhookId, as_json: AsJson = False) -> None:
    """Create another signing secret and print it. For 24 hours, deliveries are also signed with the previous one."""
    with api_client() as client:
        rotated = client.webhooks.rotate(webhook)
    _print_secret(rotated, as_json=as_json)


@webhooks.command("test")
def send_ping(
    webhook: WebhookId,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the first attempt. Exit with 1 if it failed.")] = False,
    as_json: AsJson = False,
) -> None:
    """Send a `webhook.ping`."""
    with api_client() as client:
        delivery = client.webhooks.test(webhook)
        deadline = time.monotonic() + PING_TIMEOUT_SECONDS
        while wait and delivery.state == "pending" and not delivery.attempts:
            if time.monotonic() > deadline:
                raise CommandError(
                    f"No attempt within {PING_TIMEOUT_SECONDS:.0f} s. Check that a worker runs with "
                    "EMENDER_WEBHOOK_SECRET_KEY."
                )
            time.sleep(0.3)
            delivery = client.webhooks.delivery(webhook, delivery.id)
    line = f"{delivery.id} {_describe_outcome(delivery)}"
    print_result(delivery, as_json=as_json, as_text=lambda: typer.echo(line))
    if wait and delivery.state != "delivered":
        raise typer.Exit(ExitCode.FAILED)


@webhooks.command("deliveries")
def list_deliveries(webhook: WebhookId, as_json: AsJson = False) -> None:
    """List deliveries, sent and pending, newest first."""
    with api_client() as client:
        found = list(client.webhooks.deliveries(webhook))
    rows = ((item.id, item.event, item.tries, _describe_outcome(item), item.next_try_at) for item in found)
    columns = ("delivery", "event", "attempts", "outcome", "next attempt")
    print_result(found, as_json=as_json, as_text=lambda: print_table(columns, rows))


@webhooks.command("redeliver")
def redeliver(
    webhook: WebhookId,
    delivery: Annotated[str, typer.Argument(help="Id of the delivery.")],
    as_json: AsJson = False,
) -> None:
    """Send a message again, with the same id."""
    with api_client() as client:
        created = client.webhooks.redeliver(webhook, delivery)
    line = f"{created.id} {_describe_outcome(created)}"
    print_result(created, as_json=as_json, as_text=lambda: typer.echo(line))


@webhooks.command("delete")
def delete_webhook(webhook: WebhookId, as_json: AsJson = False) -> None:
    """Delete a webhook and its deliveries."""
    with api_client() as client:
        client.webhooks.delete(webhook)
    print_result({"id": webhook, "deleted": True}, as_json=as_json, as_text=lambda: typer.echo(f"{webhook} deleted"))


def _print_secret(webhook: WebhookCreated, *, as_json: bool) -> None:
    def print_text() -> None:
        typer.echo(f"webhook {webhook.id}", err=True)
        if webhook.secret is None:
            raise CommandError("The response with the secret was lost. `emender webhooks rotate` creates another.")
        typer.echo(webhook.secret)

    print_result(webhook, as_json=as_json, as_text=print_text)


def _describe_state(webhook: WebhookListed) -> str:
    if not webhook.enabled:
        return f"disabled: {webhook.disabled_reason}"
    if not webhook.signable:
        return "created with another webhook key: rotate its secret"
    return f"failing since {webhook.failing_since}" if webhook.failing_since else "enabled"


def _describe_outcome(delivery: DeliveryOut) -> str:
    if not delivery.attempts:
        return delivery.state
    last = delivery.attempts[-1]
    return f"{delivery.state}: {last.error or last.status}"
