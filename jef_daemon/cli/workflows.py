"""`jef workflows`: look at, cancel and retry workflows."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jef_daemon.cli import workflow_starting  # noqa: F401  help shows commands in the order in which they come
from jef_daemon.cli.app import common
from jef_daemon.cli.columns import columns, plain, print_columns, short
from jef_daemon.cli.control import who
from jef_daemon.cli.jobs import statuses_of
from jef_daemon.cli.submitting import pairs_of
from jef_daemon.cli.words import took, when
from jef_daemon.cli.workflow_definitions import workflows
from jef_daemon.errors import BrokerError, ExitCode, NotFound, SettingsError

if TYPE_CHECKING:
    from jef_daemon.ledger.workflow_reading import Kept, WorkflowReader
    from jef_daemon.workflow.state import State

_HEADING = ("id", "workflow", "status", "%", "began", "took", "message")
_TIMES = (4, 5)

AsJson = Annotated[bool, typer.Option("--json", help="As JSON.")]
WorkflowId = Annotated[str, typer.Argument(metavar="ID", help="The workflow's id.")]
Reason = Annotated[str, typer.Option("--reason", "-r", help="Why: told and kept in the history.")]


@workflows.command("list")
def list_(
    status: Annotated[list[str] | None, typer.Option(help="QUEUED, RUNNING, … Again for more.")] = None,
    workflow: Annotated[str | None, typer.Option(help="Only of this name.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="How many on a page.")] = 30,
    before: Annotated[
        int | None, typer.Option(help="The page that begins here; the last page says where.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON object on each line.")] = False,
) -> None:
    """Workflows in the ledger, newest first.

    Examples:
      jef workflows list

      jef workflows list --status FAILED --workflow ingest
    """
    from jef_daemon.ledger.workflow_reading import heading

    page, following = _reader().page(statuses_of(status or []), workflow, limit, before)
    if as_json:
        for kept in page:
            typer.echo(json.dumps(heading(kept)))
    else:
        print_columns([_HEADING, *map(_row, page)], spare=_TIMES)
    if following is not None:
        typer.echo(f"more: jef workflows list --before {following}", err=True)


@workflows.command()
def show(identifier: WorkflowId, as_json: AsJson = False) -> None:
    """All about one workflow: its stages with their jobs; each variable, its value and which stage set it.

    Examples:
      jef workflows show w-9

      jef workflows show w-9 --json
    """
    from jef_daemon.ledger.workflow_reading import document

    kept = _reader().find(identifier)
    told = document(kept)
    if as_json:
        typer.echo(json.dumps(told, indent=2))
        return
    for line in _lines(kept, told):
        typer.echo(line)


@workflows.command()
def history(identifier: WorkflowId, as_json: AsJson = False) -> None:
    """What happened to a workflow and its stages: when, who, why.

    Examples:
      jef workflows history w-9
    """
    reader = _reader()
    reader.find(identifier)
    for entry in reader.history(identifier):
        if as_json:
            told = {"at": entry.at, "event": entry.event, "stage": entry.stage, "actor": entry.actor}
            typer.echo(json.dumps({**told, "reason": entry.reason}))
        else:
            why = f": {plain(entry.reason)}" if entry.reason else ""
            typer.echo(f"{when(entry.at)}  {entry.stage or '-':<20}{entry.event} by {entry.actor}{why}")


@workflows.command()
def cancel(
    ids: Annotated[list[str], typer.Argument(metavar="ID", help="Workflow ids.")],
    reason: Reason = "",
    force: Annotated[
        bool, typer.Option("--force", help="Do not wait for jobs that do not answer; the always stages too.")
    ] = False,
) -> None:
    """Cancel workflows: every stage, running, waiting or not started; then the always stages run.

    Exit code 0: all were accepted; 1: one was refused; 4: no daemon answers; 6: no such workflow.

    Examples:
      jef workflows cancel w-9 --reason "wrong file"
    """
    _command([{"command": "cancel", "workflowId": each, "reason": reason, "force": force} for each in ids])


@workflows.command()
def retry(
    identifier: WorkflowId,
    changes: Annotated[
        list[str] | None,
        typer.Argument(
            help="stage.key=value, or stage.key:=JSON: changes in its configuration; null takes one back"
        ),
    ] = None,
    reason: Reason = "",
) -> None:
    """Go on from the stage that failed, with the variables as they were; its configuration may be changed.

    Exit code 0: accepted; 1: refused; 4: no daemon answers; 6: no such workflow.

    Examples:
      jef workflows retry w-9

      jef workflows retry w-9 proxy.crf:=30 --reason "too large"
    """
    configuration: dict[str, dict[str, Any]] = {}
    for key, value in pairs_of(changes or []).items():
        stage, dot, name = key.partition(".")
        if not (stage and dot and name):
            raise SettingsError(f"{key!r}: write stage.key=value")
        configuration.setdefault(stage, {})[name] = value
    command = {"command": "retry", "workflowId": identifier, "reason": reason, "configuration": configuration}
    _command([command])


# --- workflows --------------------------------------------------------------------------------------------


def _reader() -> WorkflowReader:
    from jef_daemon.ledger.workflow_reading import WorkflowReader

    return WorkflowReader(common.settings().ledger)


def _row(kept: Kept) -> tuple[str, ...]:
    state = kept.state
    return (
        state.workflow_id,
        kept.name,
        state.status.value,
        str(state.progress),
        when(state.started_at),
        took(_lasted(state)),
        state.message.partition("\n")[0],
    )


def _lasted(state: State) -> float | None:
    if state.started_at is None or state.finished_at is None:
        return None
    return state.finished_at - state.started_at


def _lines(kept: Kept, told: Mapping[str, Any]) -> Iterator[str]:
    state = kept.state
    yield f"{plain(state.workflow_id)}  {kept.name} ({kept.revision})  {state.status.value}  {state.progress}%"
    yield from map(plain, state.message.splitlines())
    yield (
        f"started {when(state.started_at)}  finished {when(state.finished_at)}  took {took(_lasted(state))}"
    )
    if told["locks"]:
        yield "\nLocks"
        yield from columns([_lock(each) for each in told["locks"]], "  ")
    yield "\nStages"
    yield from columns([row for stage in told["stages"] for row in _stage_rows(stage)], "  ")
    if told["variables"]:
        yield "\nVariables"
        rows = [(each["name"], short(json.dumps(each["value"])), each["setBy"]) for each in told["variables"]]
        yield from columns(rows, "  ")


def _lock(told: Mapping[str, Any]) -> tuple[str, ...]:
    token = told["fencingToken"]
    return told["resource"], told["mode"], "not held" if token is None else f"held, number {token}"


def _stage_rows(stage: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """A stage, and a line for each of its jobs."""
    yield stage["name"], stage["status"], _said(stage)
    for key, value in stage["changed"].items():
        yield f"  {key}", "changed", f"by a retry to {short(json.dumps(value))}"
    for job in stage["jobs"]:
        timed_out = ", TIMED_OUT" if job["timedOut"] else ""
        item = "" if job["item"] is None else f"item {short(json.dumps(job['item']))}"
        yield f"  {job['executionId'] or '-'}", f"{job['status']}{timed_out}", item


def _said(stage: Mapping[str, Any]) -> str:
    error = stage["error"]
    if error:
        return f"{error['type']}: {error['message']}".partition("\n")[0]
    results = [job["result"] for job in stage["jobs"] if job["result"]]
    return "; ".join(results).partition("\n")[0][:100]


def _command(commands: list[dict[str, Any]]) -> None:
    answers = asyncio.run(_send([{**each, "by": who()} for each in commands]))
    unknown = [name for name, answer in answers if answer.status is None]
    for name, answer in answers:
        if answer.status is not None:
            said = "" if answer.accepted else f"refused: {answer.reason or ''}"
            typer.echo(f"{name:<34}{answer.status:<11}{said}".rstrip())
    if unknown and not asyncio.run(_is_coordinated()):
        raise BrokerError(
            f"no coordinator runs that could know {', '.join(unknown)}; the command waits for one: `jef run`"
        )
    if unknown:
        raise NotFound(
            f"no coordinator knows {', '.join(unknown)}; `jef workflows list` shows which there are"
        )
    if not all(answer.accepted for _, answer in answers):
        raise typer.Exit(ExitCode.FAILED)


async def _send(commands: list[dict[str, Any]]) -> list[tuple[str, Any]]:
    from jef_daemon.config import broker_url
    from jef_daemon.names import Names
    from jef_daemon.rabbitmq import client

    settings = common.settings()
    sending = client.control(broker_url(settings), Names(settings.prefix), commands, is_coordinated=True)
    return [(str(command["workflowId"]), answer) async for command, answer in sending]


async def _is_coordinated() -> bool:
    from jef_daemon.config import broker_url
    from jef_daemon.names import Names
    from jef_daemon.rabbitmq import client

    settings = common.settings()
    return await client.is_heard(broker_url(settings), Names(settings.prefix).coordinator)
