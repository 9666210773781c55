"""`jef workflows start`: a request for a workflow, followed until it is taken in, or to its end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import uuid
from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jef_daemon.cli.app import common
from jef_daemon.cli.columns import plain
from jef_daemon.cli.submitting import pairs_of
from jef_daemon.cli.workflow_definitions import workflows
from jef_daemon.errors import BrokerError, ExitCode, SettingsError

if TYPE_CHECKING:
    from jef_daemon.rabbitmq.client import Statuses

_ENDS = ("COMPLETED", "FAILED", "CANCELLED")
_PATIENCE_S = 2.0
"""So long a coordinator that runs is listened to for a refusal; of a workflow that runs already it says nothing."""


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
    """Start a workflow, and print its id.

    Exit code 0: it was sent, and is not refused; with --wait: COMPLETED; 1: refused, FAILED, CANCELLED.

    Examples:
      jef workflows start ingest asset=42 source=in/a.mov

      jef workflows start ingest asset=42 points:='[1, 5]' --id w-9 --wait
    """
    from jef_daemon.errors import RequestRefused
    from jef_daemon.messages import decode_workflow_request

    request = {
        "workflowId": uuid.uuid4().hex if identifier is None else identifier,
        "workflow": name,
        "variables": pairs_of(variables or []),
        "priority": priority,
    }
    try:
        decode_workflow_request(json.dumps(request).encode())
    except RequestRefused as error:
        raise SettingsError(error.detail) from None
    try:
        is_well = asyncio.run(_start(request, wait=wait))
    except KeyboardInterrupt:
        _tell(
            f"{request['workflowId']} is not stopped by this; see: jef workflows show {request['workflowId']}"
        )
        raise
    if not is_well:
        raise typer.Exit(ExitCode.FAILED)


async def _start(request: Mapping[str, Any], *, wait: bool) -> bool:
    """Send it; returns whether all is well, as far as it was waited for."""
    from jef_daemon.config import broker_url
    from jef_daemon.names import Names
    from jef_daemon.rabbitmq import client

    settings = common.settings()
    url, names, identifier = broker_url(settings), Names(settings.prefix), request["workflowId"]
    async with _listening(url, names, request["workflow"], must=wait) as seen:
        is_taken = await client.start_workflow(url, names, request)
        if not is_taken:
            _tell(f"no coordinator runs on this broker: {identifier} begins when one does (jef run)")
        if wait and seen is not None:
            return await _follow(seen, request)
        first = await _first(seen, identifier) if is_taken and seen is not None else None
    if first is not None and (first.get("error") or {}).get("type") == "RequestRefused":
        _tell(f"refused: {first['message']}")
        return False
    if first is not None and _is_another(first, request):
        return False
    typer.echo(identifier)
    return True


@contextlib.asynccontextmanager
async def _listening(url: str, names: Any, workflow: str, *, must: bool) -> AsyncIterator[Statuses | None]:
    """What is told of workflows; None: whose user may only send requests need not hear of them."""
    from jef_daemon.rabbitmq import client

    # Of others only their ends: a workflow of this id may have another name.
    keys = [f"{workflow}.#", *(f"#.{end.lower()}" for end in _ENDS)]
    async with contextlib.AsyncExitStack() as stack:
        seen = None
        try:
            seen = await stack.enter_async_context(client.statuses(url, names, *keys, of_workflows=True))
        except BrokerError:
            if must:
                raise
        yield seen


async def _first(seen: Statuses, identifier: str) -> Mapping[str, Any] | None:
    """The first word about a workflow, if there is one soon."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_PATIENCE_S):
            while True:
                told = await seen.get()
                if told.get("workflowId") == identifier:
                    return told
    return None


async def _follow(seen: Statuses, request: Mapping[str, Any]) -> bool:
    """Tell how it goes, until its end; returns whether it is COMPLETED."""
    while True:
        told = await seen.get()
        if told.get("workflowId") != request["workflowId"]:
            continue
        if _is_another(told, request):
            return False
        head = f"{told['timestamp']} {told['workflowId']} {told['status']} {told['progress']}%"
        typer.echo(plain(f"{head} {told['message']}").rstrip())
        if told["status"] in _ENDS:
            return bool(told["status"] == "COMPLETED")


def _is_another(told: Mapping[str, Any], request: Mapping[str, Any]) -> bool:
    """Whether the id was taken: then what was asked for has not begun, and never will."""
    if told["workflow"] == request["workflow"]:
        return False
    _tell(f"not started: {told['workflowId']} is the id of a {told['workflow']!r}, which is {told['status']}")
    return True


def _tell(said: str) -> None:
    typer.echo(f"jef: {said}", err=True)
