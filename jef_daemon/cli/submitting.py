"""`jef submit`: a request from what people type, checked before it is sent, and followed to its end where they wait."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import sys
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jef_daemon.cli.app import app, common
from jef_daemon.cli.table import JobTable, line
from jef_daemon.cli.words import lock_of
from jef_daemon.errors import ExitCode, SettingsError

if TYPE_CHECKING:
    from jef_daemon.rabbitmq.client import Statuses

_ENDS = frozenset({"COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT"})
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

      jef submit transcode --json '{"source": "in/a.mov", "height": 720}'

      jef submit transcode crf:=23 source=in/a.mov --priority 5 --id order-624
    """
    request: dict[str, Any] = {
        "executionId": uuid.uuid4().hex if identifier is None else identifier,
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


async def _submit(action: str, request: dict[str, Any], *, wait: bool) -> str:
    from jef_daemon.config import broker_url
    from jef_daemon.names import Names
    from jef_daemon.rabbitmq import client

    settings = common.settings()
    names, url = Names(settings.prefix), broker_url(settings)
    if not wait:
        is_served = await client.submit(url, names, action, request)
        typer.echo(request["executionId"])
        if is_served:
            return ""
        typer.echo(
            f"jef: no daemon with the prefix {settings.prefix!r} has ever served {action!r}: the request is in the "
            "dead letters (jef dead-letters list); `jef actions` tells what is served",
            err=True,
        )
        return "unroutable"
    # Listening begins before the request is published: nothing of it can be missed.
    async with client.statuses(url, names, f"{action}.*") as seen:
        await client.submit(url, names, action, request)
        return await _follow(seen, str(request["executionId"]))


async def _follow(seen: Statuses, execution_id: str) -> str:
    from rich.console import Console
    from rich.live import Live

    table = JobTable(rows=1)
    console = Console(stderr=True)
    with (
        Live(table, console=console, refresh_per_second=8)
        if console.is_terminal
        else contextlib.nullcontext()
    ):
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
    for source, text in ((f"--file {file}", _read(file)), ("--json", as_json)):
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
    except UnicodeDecodeError:
        raise SettingsError(f"--file {file} is no JSON: it is no text in UTF-8") from None


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
