"""`jef locks`: who holds and who waits; claim, give up and take away locks from a shell."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import getpass
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from jef_daemon.cli.app import app, common
from jef_daemon.cli.words import duration_s, lock_of, when
from jef_daemon.errors import ExitCode, LockLost, NotFound, SettingsError

if TYPE_CHECKING:
    from jef_daemon.lock.messages import GrantInfo, LockReply
    from jef_daemon.names import Names
    from jef_daemon.rabbitmq.lock_claim import Claim
    from jef_daemon.rabbitmq.lock_client import Talk

_LOOK_EVERY_S = 1.0

locks = typer.Typer(rich_markup_mode="rich")
app.add_typer(locks, name="locks", rich_help_panel="Jobs")

AsJson = Annotated[bool, typer.Option("--json", help="A JSON object on each line.")]
Watching = Annotated[bool, typer.Option("--watch", help="Look again every second, until Ctrl-C.")]
Lease = Annotated[str, typer.Option(help="How long it lives without being renewed: 60, 15m.")]
Wait = Annotated[bool, typer.Option("--wait/--no-wait", help="Wait in the queue, or be refused.")]
Timeout = Annotated[str | None, typer.Option(help="Wait so long at most: 30, 10m.")]

_Result = TypeVar("_Result")


@locks.callback(invoke_without_command=True)
def bare(context: typer.Context, watch: Watching = False, as_json: AsJson = False) -> None:
    """Who holds which lock, who waits; claim, give up and take away locks.

    Examples:
      jef locks

      jef locks --watch

      jef locks run --exclusive asset/42 -- rsync -a in/ out/
    """
    if context.invoked_subcommand is None:
        list_(watch=watch, as_json=as_json)


@locks.command("list")
def list_(
    resources: Annotated[list[str] | None, typer.Argument(help="Only these; none: all in use.")] = None,
    watch: Watching = False,
    for_s: Annotated[float | None, typer.Option("--for", min=0, help="Watch so many seconds.")] = None,
    as_json: AsJson = False,
) -> None:
    """Resources that are held or waited for: holders, fencing numbers, leases, who waits.

    Examples:
      jef locks list

      jef locks list asset/42 disk/a --watch

      jef locks list --json | jq -r .resource
    """
    with contextlib.suppress(TimeoutError):
        _run(_list(resources or [], watch=watch or for_s is not None, for_s=for_s, as_json=as_json))


@locks.command()
def acquire(
    resources: Annotated[list[str], typer.Argument(help="resource, or resource:SHARED; all or none.")],
    owner: Annotated[str, typer.Option(help="In whose name; to release them, say it again.")],
    lease: Lease = "60",
    wait: Wait = True,
    timeout: Timeout = None,
    as_json: AsJson = False,
) -> None:
    """Have locks in a name, and print their fencing numbers; exit code 1 when they are not granted.

    They end with their lease, unless the same is said again, which renews it. Ctrl-C leaves the queue.

    Examples:
      jef locks acquire asset/42 --owner nightly --lease 15m

      jef locks acquire asset/42 disk/a:SHARED --owner nightly --timeout 10m

      jef locks acquire asset/42 --owner me --no-wait --json | jq .fencingToken
    """
    granted = _run(_acquire(resources, owner, duration_s(lease), wait=wait, timeout_s=_seconds(timeout)))
    for grant in granted:
        typer.echo(_as_json(grant) if as_json else _line(grant))


@locks.command()
def release(
    resources: Annotated[list[str] | None, typer.Argument(help="Which.")] = None,
    owner: Annotated[
        str | None, typer.Option(help="In whose name; with --force: only this holder's.")
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="All that the owner holds, and its place in the queue.")
    ] = False,
    force: Annotated[bool, typer.Option(help="Take it away from whoever holds it.")] = False,
    reason: Annotated[str | None, typer.Option(help="With --force: why; the holder is told.")] = None,
) -> None:
    """Give up locks; with --force take them away: their holders are told why, and the history keeps it.

    Examples:
      jef locks release asset/42 --owner nightly

      jef locks release --all --owner nightly

      jef locks release --force asset/42 --reason "its machine has burnt down"
    """
    if bool(resources) == everything:
        raise SettingsError("say which: resources, or --all")
    if not force:
        if owner is None:
            raise SettingsError("say in whose name: --owner; `jef locks` shows who holds what")
        if reason is not None:
            raise SettingsError("--reason goes with --force")
        _run(_release(resources or [], owner))
        return
    if everything:
        raise SettingsError("--force takes resources by name, not --all")
    if not reason and sys.stdin.isatty():
        reason = typer.prompt("why")
    if not (reason or "").strip():
        raise SettingsError('say why: --reason "..."; the holder is told, and the history keeps it')
    _run(_force(resources or [], owner, reason or ""))


@locks.command(context_settings={"allow_interspersed_args": False})
def run(
    command: Annotated[list[str], typer.Argument(help="The program and its arguments, behind --.")],
    exclusive: Annotated[list[str] | None, typer.Option(help="A resource, alone. Again for more.")] = None,
    shared: Annotated[list[str] | None, typer.Option(help="A resource, with others. Again for more.")] = None,
    owner: Annotated[
        str | None, typer.Option(help="In whose name; default: user@host and process number.")
    ] = None,
    lease: Lease = "60",
    wait: Wait = True,
    timeout: Timeout = None,
) -> None:
    """Run a command while locks are held; stop it when they are lost.

    Its environment has JEF_FENCING_TOKENS: a JSON object, resource to fencing number.

    When they are lost: SIGTERM, a grace (jobs.kill_grace_s), SIGKILL, exit code 7; else the command's own.

    Whatever the command leaves running when it ends is killed, too: nothing goes on without the locks.

    Examples:
      jef locks run --exclusive asset/42 -- rsync -a in/ out/

      jef locks run --exclusive disk/a --shared catalogue -- ./repack.sh

      jef locks run --exclusive nightly --no-wait -- make report
    """
    wanted = [_named(text, "EXCLUSIVE") for text in exclusive or []]
    wanted += [_named(text, "SHARED") for text in shared or []]
    if not wanted:
        raise SettingsError("say what is locked: --exclusive RESOURCE or --shared RESOURCE")
    in_name_of = owner or f"{_person()}#{os.getpid()}"
    code = _run(_hold(command, wanted, in_name_of, duration_s(lease), wait=wait, timeout_s=_seconds(timeout)))
    raise typer.Exit(code)


@locks.command()
def history(
    resource: Annotated[str, typer.Argument(help="Its name.")],
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="How many of the newest lines.")] = 100,
    as_json: AsJson = False,
) -> None:
    """What happened to a resource: asked, granted, ended, left; when, who, why. From the lock service's ledger.

    Examples:
      jef locks history asset/42
    """
    from jef_daemon.ledger import Reader

    ledger_url = common.settings().ledger
    entries = Reader(ledger_url).lock_history(resource, limit)
    if not entries:
        raise NotFound(
            f"the ledger {ledger_url} has no history of {resource}; it is kept where the lock service runs, "
            "see --ledger-url"
        )
    for entry in entries:
        if as_json:
            typer.echo(json.dumps(dataclasses.asdict(entry)))
            continue
        number = "" if entry.fencing_token is None else f" {entry.fencing_token}"
        reason = f": {entry.reason}" if entry.reason else ""
        typer.echo(f"{when(entry.at)}  {entry.event} by {entry.owner} {entry.mode}{number}{reason}")


# --- looking ---------------------------------------------------------------------------------------------


async def _list(resources: Sequence[str], *, watch: bool, for_s: float | None, as_json: bool) -> None:
    from rich.console import Console
    from rich.live import Live

    from jef_daemon.cli.lock_table import LockTable
    from jef_daemon.rabbitmq.lock_client import look

    console = Console()
    if not console.is_terminal:
        console.width = 200
    async with _talking() as talk:
        if not watch:
            async for page in look(talk, resources):
                if as_json:
                    for state in page:
                        typer.echo(_as_json(state))
                else:
                    console.print(LockTable(page))
            return
        is_live = console.is_terminal and not as_json
        async with asyncio.timeout(for_s):
            with Live(console=console, auto_refresh=False) if is_live else contextlib.nullcontext() as live:
                while True:
                    # Only the first page: a screen holds no more, and the lock service has other things to do.
                    page = await anext(look(talk, resources), [])
                    if live is not None:
                        live.update(LockTable(page, "watching; Ctrl-C ends it"), refresh=True)
                    elif as_json:
                        print(*map(_as_json, page), sep="\n", end="\n" if page else "", flush=True)
                    else:
                        console.print(LockTable(page))
                    await asyncio.sleep(_LOOK_EVERY_S)


# --- claiming --------------------------------------------------------------------------------------------


async def _acquire(
    resources: Sequence[str], owner: str, lease_s: float, *, wait: bool, timeout_s: float | None
) -> list[GrantInfo]:
    async with _claim(owner, [lock_of(text) for text in resources], lease_s, sole=False) as claim:
        await claim.acquire(wait=wait, timeout_s=timeout_s, on_waiting=_say_waiting)
        return list(claim.grants.values())


async def _release(resources: Sequence[str], owner: str) -> None:
    names = [{"resource": name} for name in resources]
    async with _talking() as talk:
        reply = await _asked(talk, {"operation": "release", "owner": owner, "locks": names})
    given_up = reply.grants or []
    for grant in given_up:
        typer.echo(f"{grant.resource} released")
    if missing := set(resources) - {grant.resource for grant in given_up}:
        typer.echo(f"{owner} did not hold {', '.join(sorted(missing))}", err=True)


async def _force(resources: Sequence[str], owner: str | None, reason: str) -> None:
    missing = []
    async with _talking() as talk:
        for name in resources:
            request = {"operation": "force-release", "locks": [{"resource": name}], "owner": owner or ""}
            request |= {"reason": reason, "by": _person()}
            reply = await _asked(talk, request)
            for grant in reply.grants or []:
                typer.echo(f"{grant.resource} {grant.mode} {grant.fencing_token} taken away")
            if not reply.grants:
                missing.append(name)
    if missing:
        who = owner or "nobody"
        verb = "does not hold" if owner else "holds"
        raise NotFound(f"{who} {verb} {', '.join(missing)}; `jef locks` shows who holds what")


async def _hold(
    command: Sequence[str],
    wanted: Sequence[dict[str, str]],
    owner: str,
    lease_s: float,
    *,
    wait: bool,
    timeout_s: float | None,
) -> int:
    from jef_daemon.cli.holding import hold, program_of

    program_of(command)
    grace_s = common.settings().jobs.kill_grace_s
    async with _claim(owner, wanted, lease_s, sole=True) as claim:
        try:
            await claim.acquire(wait=wait, timeout_s=timeout_s, on_waiting=_say_waiting)
            return await hold(claim, command, lease_s, grace_s)
        except LockLost as lost:
            raise LockLost(lost.resources, f"{lost.reason}; {command[0]} was stopped") from None
        finally:
            if claim.grants and not await claim.release():
                typer.echo("jef: the broker is away; the locks end with their lease", err=True)


def _say_waiting(reply: LockReply) -> None:
    from jef_daemon.rabbitmq.lock_client import told

    typer.echo(f"waiting: {told(reply)}", err=True)


# --- inside ----------------------------------------------------------------------------------------------


def _run(work: Coroutine[Any, Any, _Result]) -> _Result:
    """Run to the end, SIGTERM being as Ctrl-C."""

    async def interruptible() -> _Result:
        task = asyncio.current_task()
        if task is not None:
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        return await work

    try:
        return asyncio.run(interruptible())
    except asyncio.CancelledError:
        raise typer.Exit(ExitCode.INTERRUPTED) from None


def _broker() -> tuple[str, Names]:
    from jef_daemon.config import broker_url
    from jef_daemon.names import Names

    settings = common.settings()
    return broker_url(settings), Names(settings.prefix)


@contextlib.asynccontextmanager
async def _talking() -> AsyncIterator[Talk]:
    from jef_daemon.rabbitmq.lock_client import talking

    async with talking(*_broker()) as talk:
        yield talk


async def _asked(talk: Talk, request: dict[str, Any]) -> LockReply:
    from jef_daemon.errors import LockRefused

    reply = await talk.ask(request)
    if reply.status == "REFUSED":
        raise LockRefused(f"the lock service refuses: {reply.reason}")
    return reply


def _claim(owner: str, wanted: Sequence[dict[str, str]], lease_s: float, *, sole: bool) -> Claim:
    from jef_daemon.rabbitmq.lock_claim import Claim

    return Claim(*_broker(), owner, wanted, lease_s, sole=sole)


def _named(text: str, mode: str) -> dict[str, str]:
    return {"resource": text, "mode": mode}


def _seconds(text: str | None) -> float | None:
    return None if text is None else duration_s(text)


def _person() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


def _line(grant: GrantInfo) -> str:
    until = when(grant.lease_until.timestamp())
    return f"{grant.resource} {grant.mode} {grant.fencing_token} until {until}"


def _as_json(told: Any) -> str:
    return json.dumps(told.model_dump(mode="json", by_alias=True))
