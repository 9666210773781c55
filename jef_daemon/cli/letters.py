"""`jef dead-letters`: messages that could not become a job. Look, send again, drop."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Annotated

import typer

from jef_daemon.cli.app import app, common
from jef_daemon.errors import NotFound, SettingsError

if TYPE_CHECKING:
    from jef_daemon.rabbitmq.dead_letters import DeadLetter

letters = typer.Typer(
    help="Messages that could not become a job: list, show, replay, drop.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)
app.add_typer(letters, name="dead-letters", rich_help_panel="Keeping house")

Which = Annotated[list[str] | None, typer.Argument(help="Numbers from `list`, or ids of jobs or workflows.")]
All = Annotated[bool, typer.Option("--all", help="All of them.")]
Reason = Annotated[str | None, typer.Option(help="All with this reason: not-json, unroutable, …")]


@letters.command("list")
def list_(
    as_json: Annotated[bool, typer.Option("--json", help="A JSON object on each line.")] = False,
) -> None:
    """What is there, and why; everything stays where it is.

    Examples:
      jef dead-letters list
    """
    for letter in _all():
        if as_json:
            typer.echo(json.dumps(_told(letter)))
        else:
            typer.echo(
                f"{letter.number:>5}  {letter.reason:<20}  {letter.routing_key:<18}  "
                f"{letter.execution_id or letter.workflow_id or '-':<32}  {letter.detail}"
            )


@letters.command()
def show(
    which: Annotated[str, typer.Argument(help="A number from `list`, or the id of a job or workflow.")],
) -> None:
    """One of them, with headers and body.

    Examples:
      jef dead-letters show 1
    """
    for letter in _chosen(_all(), [which], everything=False, reason=None):
        typer.echo(
            json.dumps(_told(letter) | {"headers": {k: str(v) for k, v in letter.headers.items()}}, indent=2)
        )
        typer.echo(letter.body.decode("utf-8", "backslashreplace"))


@letters.command()
def replay(which: Which = None, everything: All = False, reason: Reason = None) -> None:
    """Send them again, as they came, to where they were sent.

    Examples:
      jef dead-letters replay 1 3

      jef dead-letters replay --reason unroutable
    """
    _take(which, everything=everything, reason=reason, replay=True)


@letters.command()
def drop(which: Which = None, everything: All = False, reason: Reason = None) -> None:
    """Throw them away.

    Examples:
      jef dead-letters drop 2

      jef dead-letters drop --all
    """
    _take(which, everything=everything, reason=reason, replay=False)


def _take(which: list[str] | None, *, everything: bool, reason: str | None, replay: bool) -> None:
    from jef_daemon.config import broker_url
    from jef_daemon.names import Names
    from jef_daemon.rabbitmq import dead_letters

    settings = common.settings()
    chosen = _chosen(_all(), which or [], everything=everything, reason=reason)
    done = asyncio.run(
        dead_letters.take_dead_letters(broker_url(settings), Names(settings.prefix), chosen, replay=replay)
    )
    typer.echo(f"{done} {'sent again' if replay else 'dropped'}")


def _chosen(
    found: list[DeadLetter], which: list[str], *, everything: bool, reason: str | None
) -> list[DeadLetter]:
    if everything:
        return found
    if reason is not None:
        return [letter for letter in found if letter.reason == reason]
    if not which:
        raise SettingsError("say which: numbers from `jef dead-letters list`, --reason or --all")
    for text in which:
        if not any(text in {str(letter.number), letter.execution_id, letter.workflow_id} for letter in found):
            raise NotFound(f"there is no dead letter {text}; `jef dead-letters list` shows which are")
    named = set(which)
    return [
        letter for letter in found if named & {str(letter.number), letter.execution_id, letter.workflow_id}
    ]


def _all() -> list[DeadLetter]:
    from jef_daemon.config import broker_url
    from jef_daemon.names import Names
    from jef_daemon.rabbitmq import dead_letters

    settings = common.settings()
    return asyncio.run(dead_letters.dead_letters(broker_url(settings), Names(settings.prefix)))


def _told(letter: DeadLetter) -> dict[str, object]:
    return {
        "number": letter.number,
        "reason": letter.reason,
        "detail": letter.detail,
        "routingKey": letter.routing_key,
        "executionId": letter.execution_id or None,
        "workflowId": letter.workflow_id or None,
        "bytes": len(letter.body),
    }
