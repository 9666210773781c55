"""Nothing that a daemon started outlives it: commands, blocking executors, and whatever they started.

Every process that runs a job carries the daemon's mark in its environment (`JEF_CUSTODY`: the ledger and
this life of the daemon). The guardian is a small process that holds a pipe to the daemon; when the daemon
goes, however it goes, the pipe ends and the guardian kills all that carry the mark. A starting daemon does
the same for earlier lives of its ledger, before it calls their jobs interrupted: so a job that may run
again never runs beside its own remains. No registration, hence no moment in which a child is unknown.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable

import psutil

VARIABLE = "JEF_CUSTODY"
_ROUNDS = 200
_PAUSE_S = 0.025
"""Processes may be born while we look, and take a moment to die: we look until there are none, for 5 s."""


class Guardian:
    """The mark of this daemon's life, and the process that watches over it.

    Args:
        ledger_url: daemons of the same ledger are lives of the same daemon.
    """

    def __init__(self, ledger_url: str) -> None:
        self._ledger = hashlib.sha256(ledger_url.encode()).hexdigest()[:16]
        self.mark = f"{self._ledger}:{uuid.uuid4().hex}"
        self._process: subprocess.Popen[bytes] | None = None

    def kill_remains(self) -> int:
        """Kill what earlier lives left; returns how many processes that were."""
        return kill_marked(lambda mark: mark.startswith(f"{self._ledger}:") and mark != self.mark)

    def start(self) -> None:
        """Mark this process' future children and set the guardian up."""
        from multiprocessing import (
            resource_tracker,
        )  # not in the guardian's own process, which is this file too

        # Not marked: it keeps account of our semaphores until we end, and ends with us by itself. Killed before, it is
        # started anew by the last one that is let go, and both say so on standard error.
        resource_tracker.ensure_running()
        environment = {key: value for key, value in os.environ.items() if key != VARIABLE}
        self._process = subprocess.Popen(  # noqa: S603  our own file, no shell
            [sys.executable, __file__, self.mark],
            stdin=subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )
        os.environ[VARIABLE] = self.mark

    def stop(self) -> None:
        """Let the guardian kill what is left, and wait for it."""
        os.environ.pop(VARIABLE, None)
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            self._process.wait()


def kill_marked(is_ours: Callable[[str], bool]) -> int:
    """Kill every process whose mark fits, and those that appear meanwhile."""
    killed: set[int] = set()
    for _ in range(_ROUNDS):
        found = [process for process in psutil.process_iter() if is_ours(_mark_of(process))]
        if not found:
            break
        for process in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
            killed.add(process.pid)
        time.sleep(_PAUSE_S)
    return len(killed)


def _mark_of(process: psutil.Process) -> str:
    """The mark a living process carries; a zombie is dead, its parent just has not looked."""
    if process.pid == os.getpid():
        return ""
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return ""
        return str(process.environ().get(VARIABLE, ""))
    except (psutil.Error, OSError):
        return ""


def main() -> None:
    """Wait for the daemon's end, then kill what carries its mark."""
    mark = sys.argv[1]
    sys.stdin.buffer.read()
    kill_marked(lambda other: other == mark)


if __name__ == "__main__":
    main()
