"""`emender webhooks …`: who is told of events, asked over HTTP with an admin key."""

import time
from json import dumps
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Column, Table

from app.client import Client, Json
from app.command_error import CommandError
from app.settings import get_settings

webhooks = typer.Typer(help="Receivers of signed events.", no_args_is_help=True)

PATH = "/v1/webhooks"
TRY_SECONDS = 60.0  # within which a worker that runs has tried to send

Id = Annotated[str, typer.Argument(metavar="WEBHOOK", help="The webhook's id.")]
Events = Annotated[
    list[str] | None,
    typer.Option("--event", help="edit.ready, edit.failed, checkpoint.published or alias.moved; again for more."),
]
Description = Annotated[str | None, typer.Option(help="Who receives it, and what for.")]
AsJson = Annotated[bool, typer.Option("--json", help="Write JSON.")]


@webhooks.command("list")
def list_webhooks(json: AsJson = False) -> None:
    """List webhooks, newest first."""
    with _client() as client:
        found = list(client.pages(PATH))
    if json:
        typer.echo(dumps(found))
        return
    table = Table(Column("webhook", no_wrap=True), "url", "events", "state", "description")
    for item in found:
        table.add_row(item["id"], item["url"], ", ".join(item["events"]), _state(item), item["description"] or "")
    Console().print(table)


@webhooks.command("create")
def create_webhook(
    url: Annotated[str, typer.Argument(help="https, or http for a receiver in EMENDER_WEBHOOK_NETWORKS.")],
    event: Events = None,
    description: Description = None,
    json: AsJson = False,
) -> None:
    """Create a webhook and print its signing secret, which is kept nowhere."""
    if not event:
        raise CommandError("Give --event for each kind of event that is to be sent, such as --event alias.moved.")
    with _client() as client:
        made = client.post(PATH, {"url": url, "events": event} | _given(description=description))
    _show_secret(made, json=json)


@webhooks.command("update")
def update_webhook(
    webhook: Id,
    url: Annotated[str | None, typer.Option()] = None,
    event: Events = None,
    description: Description = None,
    enabled: Annotated[
        bool | None, typer.Option("--enable/--disable", help="Disabling ends what is still to be sent.")
    ] = None,
    json: AsJson = False,
) -> None:
    """Change, disable or enable a webhook; what is not given stays."""
    change = _given(url=url, events=event or None, description=description, enabled=enabled)
    with _client() as client:
        changed = client.patch(f"{PATH}/{webhook}", change)
    typer.echo(dumps(changed) if json else f"{changed['id']} {_state(changed)}")


@webhooks.command("rotate")
def rotate_secret(webhook: Id, json: AsJson = False) -> None:
    """Make another signing secret and print it; for 24 hours deliveries are signed with the one before as well."""
    with _client() as client:
        rotated = client.post(f"{PATH}/{webhook}/rotate", {})
    _show_secret(rotated, json=json)


@webhooks.command("test")
def send_ping(
    webhook: Id,
    wait: Annotated[bool, typer.Option("--wait", help="Until it was tried; exit with 1 where it failed.")] = False,
    json: AsJson = False,
) -> None:
    """Send a `webhook.ping`."""
    with _client() as client:
        delivery = client.post(f"{PATH}/{webhook}/test", {})
        deadline = time.monotonic() + TRY_SECONDS
        while wait and delivery["state"] == "pending" and not delivery["attempts"]:
            if time.monotonic() > deadline:
                raise CommandError(
                    f"Nothing was sent within {TRY_SECONDS:.0f} s: does a worker run with EMENDER_WEBHOOK_KEY?"
                )
            time.sleep(0.3)
            delivery = client.get(f"{PATH}/{webhook}/deliveries/{delivery['id']}")
    typer.echo(dumps(delivery) if json else f"{delivery['id']} {_outcome(delivery)}")
    if wait and delivery["state"] != "delivered":
        raise typer.Exit(1)


@webhooks.command("deliveries")
def list_deliveries(webhook: Id, json: AsJson = False) -> None:
    """List what was sent or is to be sent, newest first."""
    with _client() as client:
        found = list(client.pages(f"{PATH}/{webhook}/deliveries"))
    if json:
        typer.echo(dumps(found))
        return
    table = Table(Column("delivery", no_wrap=True), "event", "tries", "outcome", "next try")
    for item in found:
        table.add_row(item["id"], item["event"], str(item["tries"]), _outcome(item), item["next_try_at"] or "")
    Console().print(table)


@webhooks.command("redeliver")
def redeliver(
    webhook: Id,
    delivery: Annotated[str, typer.Argument(help="The delivery's id.")],
    json: AsJson = False,
) -> None:
    """Send a message again under the same id."""
    with _client() as client:
        again = client.post(f"{PATH}/{webhook}/deliveries/{delivery}/redeliver", {})
    typer.echo(dumps(again) if json else f"{again['id']} {_outcome(again)}")


@webhooks.command("delete")
def delete_webhook(webhook: Id) -> None:
    """Delete a webhook and its deliveries."""
    with _client() as client:
        client.delete(f"{PATH}/{webhook}")
    typer.echo(f"{webhook} deleted")


def _show_secret(made: Json, *, json: bool) -> None:
    if json:
        typer.echo(dumps(made))
        return
    typer.echo(f"webhook {made['id']}", err=True)
    if made["secret"] is None:
        raise CommandError("The answer with its secret was lost on the way: emender webhooks rotate makes another.")
    typer.echo(made["secret"])


def _state(webhook: Json) -> str:
    if not webhook["enabled"]:
        return f"disabled: {webhook['disabled_reason']}"
    if not webhook["signable"]:
        return "made with another webhook key: rotate its secret"
    return f"failing since {webhook['failing_since']}" if webhook["failing_since"] else "enabled"


def _outcome(delivery: Json) -> str:
    if not delivery["attempts"]:
        return str(delivery["state"])
    last = delivery["attempts"][-1]
    return f"{delivery['state']}: {last['error'] or last['status']}"


def _given(**fields: object) -> Json:
    return {name: value for name, value in fields.items() if value is not None}


def _client() -> Client:
    return Client.from_settings(get_settings())
