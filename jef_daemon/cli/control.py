"""`jef cancel`, `jef retry`, `jef resume`: of one job, of some, of a workflow, of many that a filter finds."""

from __future__ import annotations

import asyncio
import getpass
import json
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jef_daemon.cli import daemon, submitting  # noqa: F401  help shows commands in the order in which they come
from jef_daemon.cli.app import app, common
from jef_daemon.cli.jobs import filter_of, print_jobs, reader
from jef_daemon.errors import ExitCode, NotFound, SettingsError

if TYPE_CHECKING:
    from jef_daemon.lifecycle import Execution
    from jef_daemon.rabbitmq.client import Answer

_CONCERNED = {
    "cancel": ("QUEUED", "WAITING_FOR_LOCK", "RUNNING", "TIMED_OUT"),
    "retry": ("FAILED", "TIMED_OUT"),
    "resume": ("TIMED_OUT",),
}
"""Statuses that a filter means where none is named."""
_SHOWN = 10
"""Jobs of a preview."""
_PAGE = 1000

Ids = Annotated[list[str] | None, typer.Argument(metavar="ID", help="Execution ids.")]
Workflow = Annotated[
    str | None, typer.Option(help="All jobs of this workflow; with filters, those it finds.")
]
StatusFilter = Annotated[
    list[str] | None, typer.Option("--status", help="Those in this status. Again for more.")
]
ActionFilter = Annotated[str | None, typer.Option("--action", help="Those of this action.")]
Since = Annotated[str | None, typer.Option(help="Those queued since: 2h, 7d, or an RFC 3339 instant.")]
Reason = Annotated[str, typer.Option("--reason", "-r", help="Why: told and kept in the history.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
AsJson = Annotated[bool, typer.Option("--json", help="Each answer as a line of JSON.")]


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What a command is about."""

    ids: list[str]
    workflow: str | None
    statuses: list[str]
    action: str | None
    since: str | None

    @property
    def filters(self) -> bool:
        """Whether the ledger is asked which they are."""
        return bool(self.statuses or self.action or self.since)


@app.command(rich_help_panel="Jobs")
def cancel(
    ids: Ids = None,
    workflow: Workflow = None,
    status: StatusFilter = None,
    action: ActionFilter = None,
    since: Since = None,
    reason: Reason = "",
    force: Annotated[
        bool, typer.Option("--force", help="Do not wait for whoever runs it; also what cannot be cancelled.")
    ] = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Stop jobs. Those that wait end at once, those that run are asked to stop; one not known yet, when it comes.

    Exit code 0: all were accepted; 1: one was refused; 4: no daemon answers.

    Examples:
      jef cancel 624

      jef cancel 624 625 --reason "wrong file"

      jef cancel --workflow w-9               # also those that come later

      jef cancel --status QUEUED --action transcode --since 2h

      jef cancel 624 --force                  # whoever runs it does not answer
    """
    wanted = _Wanted(ids or [], workflow, status or [], action, since)
    _command("cancel", wanted, {"reason": reason, "force": force}, yes=yes, as_json=as_json)


@app.command(rich_help_panel="Jobs")
def retry(
    ids: Ids = None,
    workflow: Workflow = None,
    status: StatusFilter = None,
    action: ActionFilter = None,
    since: Since = None,
    reason: Reason = "",
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Try jobs again that FAILED or are TIMED_OUT: a new attempt at once, whatever the action's policy says.

    Exit code 0: all were accepted; 1: one was refused; 4: no daemon answers; 6: no such job.

    Examples:
      jef retry 624

      jef retry --workflow w-9

      jef retry --status FAILED --action transcode --since 24h -r "disk full"

      jef retry --status FAILED --yes --json | jq .status
    """
    wanted = _Wanted(ids or [], workflow, status or [], action, since)
    _command("retry", wanted, {"reason": reason}, yes=yes, as_json=as_json)


@app.command(rich_help_panel="Jobs")
def resume(
    ids: Ids = None,
    workflow: Workflow = None,
    status: StatusFilter = None,
    action: ActionFilter = None,
    since: Since = None,
    reason: Reason = "",
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Let executors bring TIMED_OUT jobs back, within their time of grace; `jef retry` begins anew.

    Exit code 0: all were accepted; 1: one was refused; 4: no daemon answers; 6: no such job.

    Examples:
      jef resume 624

      jef resume --action render --since 1h
    """
    wanted = _Wanted(ids or [], workflow, status or [], action, since)
    _command("resume", wanted, {"reason": reason}, yes=yes, as_json=as_json)


# --- which ------------------------------------------------------------------------------------------------


def _command(word: str, wanted: _Wanted, terms: Mapping[str, Any], *, yes: bool, as_json: bool) -> None:
    if wanted.ids and (wanted.workflow or wanted.filters):
        raise SettingsError("name jobs by their ids, or by --workflow and filters: one of the two")
    if not (wanted.ids or wanted.workflow or wanted.filters):
        raise SettingsError(f"say which: `jef {word} ID`, --workflow, or a filter such as --action")
    ids = wanted.ids
    if wanted.filters:
        found = list(_found(word, wanted))
        if not found:
            typer.echo("no job is concerned", err=True)
            return
        if not yes:
            _confirm(word, found)
        ids = [execution.execution_id for execution in found]
    terms = {"command": word, **terms, "by": who()}
    commands = [{**terms, "executionId": name} for name in ids] or [{**terms, "workflowId": wanted.workflow}]
    _check(commands)
    answers = asyncio.run(_send(commands, as_json=as_json))
    refused = [answer for answer in answers if not answer.accepted]
    if refused and wanted.ids and all(answer.status is None for answer in refused):
        raise NotFound(f"{len(refused)} of {len(answers)} not found; `jef list` shows which jobs there are")
    if refused:
        raise typer.Exit(ExitCode.FAILED)


def _found(word: str, wanted: _Wanted) -> Iterator[Execution]:
    """What the ledger has, newest first; a job that was handed back is another daemon's."""
    statuses = wanted.statuses or list(_CONCERNED[word])
    which = filter_of(statuses, wanted.action, wanted.workflow, wanted.since)
    ledger, before = reader(), None
    while True:
        page = ledger.page(which, _PAGE, before)
        yield from (execution for execution in page.executions if not execution.handed_back)
        if (before := page.next_before) is None:
            return


def _confirm(word: str, found: Sequence[Execution]) -> None:
    print_jobs(found[:_SHOWN], err=True)
    if len(found) > _SHOWN:
        typer.echo(f"… and {len(found) - _SHOWN} more", err=True)
    typer.confirm(f"{word} {len(found)} {'job' if len(found) == 1 else 'jobs'}?", abort=True, err=True)


def who() -> str:
    """Who asks: told and kept."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user need not have a name
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


def _check(commands: Sequence[Mapping[str, Any]]) -> None:
    """What the daemon would refuse is refused here, before any is sent."""
    from jef_daemon.errors import RequestRefused
    from jef_daemon.messages import decode_control

    for command in commands:
        try:
            decode_control(json.dumps(command).encode())
        except RequestRefused as error:
            raise SettingsError(f"{command.get('executionId', 'the command')}: {error.detail}") from None


# --- sending and telling ----------------------------------------------------------------------------------


async def _send(commands: Sequence[Mapping[str, Any]], *, as_json: bool) -> list[Answer]:
    from jef_daemon.config import broker_url
    from jef_daemon.names import Names
    from jef_daemon.rabbitmq import client

    settings = common.settings()
    answers = []
    async for command, answer in client.control(broker_url(settings), Names(settings.prefix), commands):
        answers.append(answer)
        name = str(command.get("executionId") or command.get("workflowId"))
        typer.echo(_json(command, answer) if as_json else _line(str(command["command"]), name, answer))
    return answers


def _json(command: Mapping[str, Any], answer: Answer) -> str:
    about = {key: command[key] for key in ("executionId", "workflowId") if key in command}
    return json.dumps(about | {"accepted": answer.accepted, "status": answer.status, "reason": answer.reason})


def _line(word: str, name: str, answer: Answer) -> str:
    said = answer.reason or ""
    if answer.accepted and not said:
        said = {("cancel", "RUNNING"): "asked to stop", ("resume", "TIMED_OUT"): "asked to resume"}.get(
            (word, answer.status or ""), ""
        )
    if not answer.accepted:
        said = f"refused: {said}"
    return f"{name:<26}{answer.status or '-':<18}{said}".rstrip()
