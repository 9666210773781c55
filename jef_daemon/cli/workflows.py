"""`jef workflows`: start, look at, cancel and retry workflows."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jef_daemon.cli.app import common
from jef_daemon.cli.control import who
from jef_daemon.cli.submitting import pairs_of
from jef_daemon.cli.words import took, when
from jef_daemon.cli.workflow_definitions import workflows
from jef_daemon.errors import ExitCode, NotFound, SettingsError

if TYPE_CHECKING:
    from jef_daemon.ledger.workflow_reading import WorkflowReader

_ENDS = frozenset({"COMPLETED", "FAILED", "CANCELLED"})

AsJson = Annotated[bool, typer.Option("--json", help="As JSON.")]
WorkflowId = Annotated[str, typer.Argument(metavar="ID", help="The workflow's id.")]
Reason = Annotated[str, typer.Option("--reason", "-r", help="Why: told and kept in the history.")]


@workflows.command()
def start(
    name: Annotated[str, typer.Argument(help="The workflow's name.")],
    variables: Annotated[list[str] | None, typer.Argument(help="key=value, or key:=JSON")] = None,
    identifier: Annotated[
        str | None, typer.Option("--id", help="The workflow id; default: a new one.")
    ] = None,
    priority: Annotated[int, typer.Option(help="Higher starts earlier.")] = 0,
    wait: Annotated[
        bool, typer.Option("--wait", "-w", help="Stay until it ends; exit code 1 unless COMPLETED.")
    ] = False,
) -> None:
    """Start a workflow.

    Examples:
      jef workflows start ingest asset=42 source=in/a.mov

      jef workflows start ingest asset=42 points:='[1, 5]' --id w-9 --wait
    """
    from jef_daemon.errors import RequestRefused
    from jef_daemon.messages import decode_workflow_request

    request = {
        "workflowId": identifier or uuid.uuid4().hex,
        "workflow": name,
        "variables": pairs_of(variables or []),
        "priority": priority,
    }
    try:
        decode_workflow_request(json.dumps(request).encode())
    except RequestRefused as error:
        raise SettingsError(error.detail) from None
    status = asyncio.run(_start(request, wait=wait))
    if status not in {"", "COMPLETED"}:
        raise typer.Exit(ExitCode.FAILED)


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

    page, following = _reader().page([each.upper() for each in status or []], workflow, limit, before)
    for kept in page:
        state = kept.state
        if as_json:
            typer.echo(json.dumps(heading(kept)))
        else:
            head = f"{state.workflow_id:<34}{kept.name:<18}{state.status.value:<17}{state.progress:>3}%"
            typer.echo(f"{head}  {state.message.partition(chr(10))[0]}".rstrip())
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
    state = kept.state
    typer.echo(f"{state.workflow_id}  {kept.name} ({kept.revision})  {state.status.value}  {state.progress}%")
    if state.message:
        typer.echo(state.message)
    lasted = (
        None
        if state.started_at is None or state.finished_at is None
        else state.finished_at - state.started_at
    )
    typer.echo(f"started {when(state.started_at)}  finished {when(state.finished_at)}  took {took(lasted)}")
    if told["locks"]:
        typer.echo("\nLocks")
    for lock in told["locks"]:
        held = "not held" if lock["fencingToken"] is None else f"held, number {lock['fencingToken']}"
        typer.echo(f"  {lock['resource']:<20}{lock['mode']:<11}{held}")
    typer.echo("\nStages")
    for stage in told["stages"]:
        typer.echo(f"  {stage['name']:<20}{stage['status']:<11}{_said(stage)}".rstrip())
        for job in stage["jobs"]:
            timed_out = ", TIMED_OUT" if job["timedOut"] else ""
            typer.echo(f"    {job['executionId'] or '-':<36}{job['status']}{timed_out}")
    typer.echo("\nVariables")
    for variable in told["variables"]:
        typer.echo(
            f"  {variable['name']:<20}{json.dumps(variable['value']):<40} {variable['setBy']}".rstrip()
        )


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
            why = f": {entry.reason}" if entry.reason else ""
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
        typer.Argument(help="stage.key=value, or stage.key:=JSON: changes in its configuration"),
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


def _said(stage: Mapping[str, Any]) -> str:
    error = stage["error"]
    if error:
        return f"{error['type']}: {error['message']}".partition("\n")[0]
    results = [job["result"] for job in stage["jobs"] if job["result"]]
    return "; ".join(results).partition("\n")[0][:100]


async def _start(request: Mapping[str, Any], *, wait: bool) -> str:
    from jef_daemon.config import broker_url
    from jef_daemon.names import Names
    from jef_daemon.rabbitmq import client

    settings = common.settings()
    url, names, identifier = broker_url(settings), Names(settings.prefix), request["workflowId"]
    if not wait:
        await client.start_workflow(url, names, request)
        typer.echo(identifier)
        return ""
    async with client.statuses(url, names, f"{request['workflow']}.#", of_workflows=True) as seen:
        await client.start_workflow(url, names, request)
        while True:
            told = await seen.get()
            if told.get("workflowId") != identifier:
                continue
            typer.echo(
                f"{told['timestamp']} {identifier} {told['status']} {told['progress']}% {told['message']}".rstrip()
            )
            if told["status"] in _ENDS:
                return str(told["status"])


def _command(commands: list[dict[str, Any]]) -> None:
    answers = asyncio.run(_send([{**each, "by": who()} for each in commands]))
    unknown = [name for name, answer in answers if answer.status is None]
    for name, answer in answers:
        if answer.status is not None:
            said = "" if answer.accepted else f"refused: {answer.reason or ''}"
            typer.echo(f"{name:<34}{answer.status:<11}{said}".rstrip())
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
