"""`jef submit`, `jef list`, `jef show`, `jef history`, `jef watch`."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import sys
import uuid
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jef_daemon.cli.app import app, common
from jef_daemon.cli.table import JobTable, line
from jef_daemon.cli.words import ago, lock_of, took, when
from jef_daemon.errors import ExitCode, SettingsError

if TYPE_CHECKING:
    from jef_daemon.ledger import Filter, Reader
    from jef_daemon.lifecycle import Execution
    from jef_daemon.rabbitmq.client import Statuses

_ENDS = frozenset({"COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT"})
_TIMES = frozenset({"queuedAt", "notBefore", "startedAt", "finishedAt"})
_CLOCKS = ("queue", "lock", "update", "execution")


@app.command(rich_help_panel="Jobs")
def submit(
    action: Annotated[str, typer.Argument(help="The action's name.")],
    configuration: Annotated[list[str] | None, typer.Argument(help="key=value, or key:=JSON")] = None,
    as_json: Annotated[str | None, typer.Option("--json", help="The configuration as a JSON object.")] = None,
    file: Annotated[
        Path | None, typer.Option(help="The configuration from a JSON file; - for standard input.")
    ] = None,
    identifier: Annotated[
        str | None, typer.Option("--id", help="The execution id; default: a new one.")
    ] = None,
    workflow_id: Annotated[str | None, typer.Option(help="The workflow it belongs to.")] = None,
    lock: Annotated[
        list[str] | None, typer.Option(help="resource, or resource:SHARED. Again for more.")
    ] = None,
    priority: Annotated[int, typer.Option(help="Higher starts earlier.")] = 0,
    not_before: Annotated[str | None, typer.Option(help="RFC 3339 instant; it starts no earlier.")] = None,
    timeout: Annotated[
        list[str] | None, typer.Option(help="clock=seconds: queue, lock, update, execution.")
    ] = None,
    variable: Annotated[list[str] | None, typer.Option(help="A job context variable, key=value.")] = None,
    wait: Annotated[
        bool, typer.Option("--wait", "-w", help="Stay until it ends; exit code 1 unless COMPLETED.")
    ] = False,
) -> None:
    """Submit a job.

    Examples:
      jef submit checksum path=movies --wait

      jef submit copy source=in/a.mov destination=out/a.mov --lock asset/42

      jef submit transcode --json '{"source": "in/a.mov", "height": 720}' --priority 5 --id order-624

      jef submit transcode crf:=23 source=in/a.mov --timeout execution=3600
    """
    request: dict[str, Any] = {
        "executionId": identifier or uuid.uuid4().hex,
        "workflowId": workflow_id,
        "configuration": _configuration(configuration or [], as_json, file),
        "jobContextVariables": pairs_of(variable or []),
        "locks": [lock_of(text) for text in lock or []],
        "priority": priority,
        "notBefore": not_before,
        "timeouts": _timeouts(timeout or []),
    }
    _check(request)
    status = asyncio.run(_submit(action, request, wait=wait))
    if status not in {"", "COMPLETED"}:
        raise typer.Exit(ExitCode.FAILED)


@app.command("list", rich_help_panel="Jobs")
def list_(
    status: Annotated[list[str] | None, typer.Option(help="QUEUED, RUNNING, … Again for more.")] = None,
    action: Annotated[str | None, typer.Option(help="Only of this action.")] = None,
    workflow: Annotated[str | None, typer.Option(help="Only of this workflow.")] = None,
    since: Annotated[str | None, typer.Option(help="Queued since: 2h, 7d, or an RFC 3339 instant.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="How many on a page.")] = 30,
    before: Annotated[
        int | None, typer.Option(help="The page that begins here; the last page says where.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON object on each line.")] = False,
) -> None:
    """Jobs in the ledger, newest first.

    Examples:
      jef list

      jef list --status FAILED --since 24h

      jef list --action transcode --json | jq .message
    """
    from jef_daemon.ledger import summary

    wanted = filter_of(status or [], action, workflow, since)
    page = reader().page(wanted, limit, before)
    if as_json:
        for execution in page.executions:
            typer.echo(json.dumps(summary(execution)))
    else:
        print_jobs(page.executions)
    if page.next_before is not None:
        typer.echo(f"more: jef list --before {page.next_before}", err=True)


@app.command(rich_help_panel="Jobs")
def show(
    identifier: Annotated[
        str, typer.Argument(help="The execution id, or the executor's own for the work elsewhere.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """All about one job: status, request, result, variables.

    Examples:
      jef show 624

      jef show render-77 --json
    """
    told = reader().document(identifier)
    if as_json:
        typer.echo(json.dumps(told, indent=2))
        return
    told["attempt"] = f"{told['attempt']} of {told.pop('maxAttempts')}"
    for key, value in told.items():
        if value not in (None, "", False):
            if key in _TIMES:
                value = when(datetime.fromisoformat(value).timestamp())  # noqa: PLW2901
            text = json.dumps(value, indent=2) if isinstance(value, dict | list) else str(value)
            typer.echo(f"{key:<18}{text.replace(chr(10), chr(10) + ' ' * 18)}")


@app.command(rich_help_panel="Jobs")
def history(
    identifier: Annotated[str, typer.Argument(help="The execution id, or the executor's own.")],
    as_json: Annotated[bool, typer.Option("--json", help="A JSON object on each line.")] = False,
) -> None:
    """What happened to a job: when, who, why, at which attempt, its locks, stack traces.

    Examples:
      jef history 624
    """
    ledger = reader()
    execution = ledger.find(identifier)
    for entry in ledger.history(execution.execution_id):
        if as_json:
            typer.echo(json.dumps(dataclasses.asdict(entry)))
            continue
        typer.echo(
            f"{when(entry.at)}  attempt {entry.attempt}  {entry.before} -> {entry.status}  "
            f"{entry.event} by {entry.actor}" + (f": {entry.reason}" if entry.reason else "")
        )
        for granted in entry.detail.get("grants", ()):
            typer.echo("    {} {} {}".format(*granted))
        if waiting := entry.detail.get("waitingFor"):
            holders = ", ".join(waiting["holders"]) or "nobody"
            typer.echo(
                f"    {waiting['resource']} {waiting['mode']}, number {waiting['position']}, held by {holders}"
            )
        error = entry.detail.get("error")
        if error:
            trace = error.get("traceback") or f"{error['type']}: {error['message']}"
            typer.echo("    " + trace.rstrip().replace("\n", "\n    "))


@app.command(rich_help_panel="Jobs")
def watch(
    action: Annotated[str, typer.Option(help="Only of this action.")] = "*",
    for_s: Annotated[float | None, typer.Option("--for", min=0, help="Stop after so many seconds.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Each notification as a line of JSON.")] = False,
) -> None:
    """Watch jobs live, from the status exchange; lines instead of a table where there is no terminal.

    Examples:
      jef watch

      jef watch --action transcode --for 60

      jef watch --json | tee statuses.jsonl
    """
    try:
        asyncio.run(_watch(action, for_s, as_json=as_json))
    except TimeoutError:
        return


# --- submitting ------------------------------------------------------------------------------------------


async def _submit(action: str, request: dict[str, Any], *, wait: bool) -> str:
    from jef_daemon.config import broker_url
    from jef_daemon.names import Names
    from jef_daemon.rabbitmq import client

    settings = common.settings()
    names, url = Names(settings.prefix), broker_url(settings)
    if not wait:
        await client.submit(url, names, action, request)
        typer.echo(request["executionId"])
        return ""
    # Listening begins before the request is published: nothing of it can be missed.
    async with client.statuses(url, names, f"{action}.*") as seen:
        await client.submit(url, names, action, request)
        return await _follow(seen, str(request["executionId"]))


async def _follow(seen: Statuses, execution_id: str) -> str:
    from rich.console import Console
    from rich.live import Live

    table = JobTable(rows=1)
    console = Console(stderr=True)
    with Live(table, console=console, refresh_per_second=8) if console.is_terminal else _nothing():
        while True:
            told = await seen.get()
            if told.get("executionId") != execution_id:
                continue
            if table.put(told) and not console.is_terminal:
                typer.echo(line(told), err=True)
            if told["status"] in _ENDS:
                break
    if told["status"] == "COMPLETED":
        typer.echo(told.get("result") or "COMPLETED")
        if told.get("jobContextVariables"):
            typer.echo(json.dumps(told["jobContextVariables"], indent=2))
    else:
        typer.echo(f"{told['status']}: {told.get('message')}", err=True)
    return str(told["status"])


def _configuration(pairs: list[str], as_json: str | None, file: Path | None) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for source, text in (("--file", _read(file)), ("--json", as_json)):
        if text is None:
            continue
        try:
            value = _json(text)
        except ValueError as error:
            raise SettingsError(f"{source} is no JSON: {error}") from None
        if not isinstance(value, dict):
            raise SettingsError(f"{source} is no JSON object")
        found |= value
    return found | pairs_of(pairs)


def _read(file: Path | None) -> str | None:
    if file is None:
        return None
    try:
        return sys.stdin.read() if str(file) == "-" else file.read_text("utf-8")
    except OSError as error:
        raise SettingsError(f"{file} cannot be read: {error.strerror}") from None


def pairs_of(pairs: list[str]) -> dict[str, Any]:
    """`key=text`, `key:=JSON`; a text that is a number, true or false is taken as that."""
    found: dict[str, Any] = {}
    for pair in pairs:
        key, sign, value = pair.partition("=")
        if not sign or not key.rstrip(":"):
            raise SettingsError(f"{pair!r} is no setting; write key=value, or key:=JSON")
        if key.endswith(":"):
            try:
                found[key[:-1]] = _json(value)
            except ValueError as error:
                raise SettingsError(f"{pair!r} is no JSON behind := ({error})") from None
        else:
            found[key] = _guess(value)
    return found


def _json(text: str) -> Any:
    """JSON as the wire takes it: Python's own reader knows numbers that JSON does not."""
    return json.loads(text, parse_constant=_finite, parse_float=_finite)


def _finite(text: str) -> float:
    if math.isfinite(value := float(text)):
        return value
    raise ValueError(f"{text} is no number of JSON")


def _guess(text: str) -> Any:
    try:
        value = _json(text)
    except ValueError:
        return text
    return value if isinstance(value, bool | int | float) else text


def _timeouts(texts: list[str]) -> dict[str, float]:
    found = {}
    for text in texts:
        clock, _, seconds = text.partition("=")
        try:
            found[clock] = _finite(seconds)
        except ValueError:
            raise SettingsError(f"{text!r} is no time-out; write execution=3600") from None
        if clock not in _CLOCKS:
            raise SettingsError(f"{clock!r} is no clock; one of {', '.join(_CLOCKS)}")
    return found


def _check(request: dict[str, Any]) -> None:
    """What the daemon would refuse is refused here, before it is sent."""
    from jef_daemon.errors import RequestRefused
    from jef_daemon.messages import decode_request

    try:
        decode_request(json.dumps(request).encode())
    except RequestRefused as error:
        raise SettingsError(f"the request is wrong: {error.detail}") from None


# --- looking ---------------------------------------------------------------------------------------------


def filter_of(statuses: Sequence[str], action: str | None, workflow: str | None, since: str | None) -> Filter:
    """The filter of the options that `list` and the commands share.

    Raises:
        SettingsError: a status or a time is none.
    """
    from jef_daemon.ledger import Filter
    from jef_daemon.lifecycle import Status

    words = [word.upper() for word in statuses]
    if unknown := [word for word in words if word not in Status.__members__]:
        raise SettingsError(f"{unknown[0]} is no status; one of {', '.join(Status.__members__)}")
    return Filter([Status(word) for word in words], action, workflow, ago(since) if since else None)


def reader() -> Reader:
    """The ledger of the settings, to look into."""
    from jef_daemon.ledger import Reader

    return Reader(common.settings().ledger)


def print_jobs(executions: Sequence[Execution], *, err: bool = False) -> None:
    """A table of jobs."""
    from rich.console import Console
    from rich.table import Table

    from jef_daemon.cli.words import styled

    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("job", "action", "status", "%", "queued", "took", "message"):
        table.add_column(column, no_wrap=column != "message", overflow="ellipsis")
    for execution in executions:
        ran = None
        if execution.started_at is not None and execution.finished_at is not None:
            ran = execution.finished_at - execution.started_at
        table.add_row(
            execution.execution_id,
            execution.action,
            styled(execution.status.value),
            str(execution.progress),
            when(execution.queued_at),
            took(ran),
            execution.message.partition("\n")[0].replace("[", r"\["),
        )
    console = Console(stderr=err)
    if not console.is_terminal:
        console.width = 200
    console.print(table)


async def _watch(action: str, for_s: float | None, *, as_json: bool) -> None:
    from rich.console import Console
    from rich.live import Live

    from jef_daemon.config import broker_url
    from jef_daemon.names import Names
    from jef_daemon.rabbitmq import client

    settings = common.settings()
    table = JobTable("watching; Ctrl-C ends it")
    console = Console()
    is_live = console.is_terminal and not as_json
    async with client.statuses(broker_url(settings), Names(settings.prefix), f"{action}.*") as seen:
        async with asyncio.timeout(for_s):
            with Live(table, console=console, refresh_per_second=8) if is_live else _nothing():
                while True:
                    told = await seen.get()
                    if is_live:
                        table.put(told)
                    else:
                        print(json.dumps(told) if as_json else line(told), flush=True)


def _nothing() -> Any:
    import contextlib

    return contextlib.nullcontext()
