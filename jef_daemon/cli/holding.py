"""A command that runs as long as locks are held: for `jef locks run`.

The command leads a process group of its own. What happens to it here: signals to us are passed on to it; when
the locks are lost it is stopped (SIGTERM, grace, SIGKILL), and when we die, however we die, a guardian kills it
and all that it started, so that nothing goes on unprotected.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from jef_daemon.errors import ProgramUnusable
from jef_daemon.run.guardian import Guardian

if TYPE_CHECKING:
    from jef_daemon.rabbitmq.lock_claim import Claim

TOKENS = "JEF_FENCING_TOKENS"
"""In the command's environment: a JSON object, resource → fencing number."""
_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def program_of(command: Sequence[str]) -> str:
    """Where a command's program is: to be known before anybody waits for it.

    Raises:
        ProgramUnusable: there is none.
    """
    found = shutil.which(command[0])
    if found is None:
        raise ProgramUnusable(
            f"there is no program {command[0]} that may be executed; install it, or name its full path"
        )
    return found


async def hold(claim: Claim, command: Sequence[str], lease_s: float, grace_s: float) -> int:
    """Run a command to its end while locks are kept.

    Args:
        claim: granted.
        command: the program and its arguments.
        lease_s: of the claim.
        grace_s: between SIGTERM and SIGKILL when the locks are lost.

    Returns:
        Its exit code; 128 and the signal's number where a signal ended it, as shells say it.

    Raises:
        LockLost: they are, and the command was stopped.
        ProgramUnusable: it cannot be started.
    """
    guardian = Guardian(f"locks of process {os.getpid()}")
    await asyncio.to_thread(guardian.start)
    try:
        process = await _start(command, claim)
        with _terminal(process.pid), _passing_on(process.pid):
            return await _follow(process, claim, lease_s, grace_s)
    finally:
        await asyncio.to_thread(guardian.stop)


async def _start(command: Sequence[str], claim: Claim) -> asyncio.subprocess.Process:
    tokens = {name: grant.fencing_token for name, grant in claim.grants.items()}
    environment = {**os.environ, TOKENS: json.dumps(tokens)}
    try:
        return await asyncio.create_subprocess_exec(*command, env=environment, process_group=0)
    except OSError as error:
        raise ProgramUnusable(f"{command[0]} cannot be executed: {error.strerror}") from None


async def _follow(process: asyncio.subprocess.Process, claim: Claim, lease_s: float, grace_s: float) -> int:
    # Silence is taken for loss so early that the command is dead before the lease ends and others come, also on a
    # machine that is slow just then.
    grace_s = min(grace_s, lease_s / 4)
    ending = asyncio.create_task(process.wait(), name="command")
    keeping = asyncio.create_task(claim.keep(grace_s + lease_s / 12), name="locks")
    try:
        await asyncio.wait({ending, keeping}, return_when=asyncio.FIRST_COMPLETED)
        if not ending.done():
            _signal(process.pid, signal.SIGTERM)
            _signal(process.pid, signal.SIGCONT)  # one that is stopped would not hear it
            await asyncio.wait({ending}, timeout=grace_s)
            await keeping
        code = await ending
        return code if code >= 0 else 128 - code
    finally:
        keeping.cancel()
        _signal(process.pid, signal.SIGKILL)
        await asyncio.wait({ending, keeping})


def _signal(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


@contextlib.contextmanager
def _passing_on(group: int) -> Iterator[None]:
    """Signals to us go to the command; those that our parent has us ignore stay ignored."""
    loop = asyncio.get_running_loop()
    passed_on = [number for number in _PASSED_ON if signal.getsignal(number) != signal.SIG_IGN]
    for number in passed_on:
        loop.add_signal_handler(number, _signal, group, number)
    try:
        yield
    finally:
        for number in passed_on:
            loop.remove_signal_handler(number)


@contextlib.contextmanager
def _terminal(group: int) -> Iterator[None]:
    """Lend our terminal to the command, so that it reads what is typed and hears Ctrl-C and Ctrl-Z itself."""
    if not sys.stdin.isatty() or os.tcgetpgrp(0) != os.getpgrp():
        yield
        return
    # Set when the command has started: what is ignored now is ignored by children, too.
    before = signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGCHLD, _stop_with, group)
    _lend(group)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGCHLD)
        os.tcsetpgrp(0, os.getpgrp())
        signal.signal(signal.SIGTTOU, before)


def _lend(group: int) -> None:
    with contextlib.suppress(OSError):  # it has ended already
        os.tcsetpgrp(0, group)
    _signal(group, signal.SIGCONT)  # it may have tried to read before


def _stop_with(group: int) -> None:
    """When Ctrl-Z stopped the command, stop as well: the shell waits for us. Nobody renews meanwhile."""
    try:
        stopped = os.waitid(os.P_PID, group, os.WSTOPPED | os.WNOHANG)
    except ChildProcessError:
        return
    if stopped is None or stopped.si_status in {signal.SIGTTIN, signal.SIGTTOU}:
        return
    os.tcsetpgrp(0, os.getpgrp())
    os.kill(os.getpid(), signal.SIGSTOP)
    if os.tcgetpgrp(0) == os.getpgrp():
        _lend(group)
    else:
        _signal(group, signal.SIGCONT)
