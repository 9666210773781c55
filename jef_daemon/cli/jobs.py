"""`jef list`, `jef show`, `jef history`, `jef watch`: looking at jobs, in the ledger and live."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer

from jef_daemon.cli.app import app, common
from jef_daemon.cli.table import JobTable, line
from jef_daemon.cli.words import ago, took, when
from jef_daemon.errors import SettingsError

if TYPE_CHECKING:
    from jef_daemon.ledger import Filter, Reader
    from jef_daemon.lifecycle import Execution, Status

_TIMES = frozenset({"queuedAt", "notBefore", "startedAt", "finishedAt"})


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


# --- looking ---------------------------------------------------------------------------------------------


def filter_of(statuses: Sequence[str], action: str | None, workflow: str | None, since: str | None) -> Filter:
    """The filter of the options that `list` and the commands share.

    Raises:
        SettingsError: a status or a time is none.
    """
    from jef_daemon.ledger import Filter

    return Filter(statuses_of(statuses), action, workflow, ago(since) if since else None)


def statuses_of(words: Sequence[str]) -> list[Status]:
    """Statuses as they are typed.

    Raises:
        SettingsError: one is none.
    """
    from jef_daemon.lifecycle import Status

    words = [word.upper() for word in words]
    if unknown := [word for word in words if word not in Status.__members__]:
        raise SettingsError(f"{unknown[0]} is no status; one of {', '.join(Status.__members__)}")
    return [Status(word) for word in words]


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
            with Live(table, console=console, refresh_per_second=8) if is_live else contextlib.nullcontext():
                while True:
                    told = await seen.get()
                    if is_live:
                        table.put(told)
                    else:
                        print(json.dumps(told) if as_json else line(told), flush=True)
