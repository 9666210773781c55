"""One attempt that runs here, and how it comes to its end: by itself, at its limit, or as others want it.

Part in the flow: the worker makes one of each job that it claimed and hands it the running executor; commands,
lost locks and the drain say to it how it is to end. What it comes to, the worker records: nothing is written here.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path
from typing import Any

import structlog

from jef_daemon.events import Completed, Event, Failed, Interrupted, Launched
from jef_daemon.lifecycle import Execution
from jef_daemon.run.boundary import failed
from jef_daemon.run.catalogue import Action
from jef_daemon.sdk import lost_mark
from jef_daemon.settings import Settings
from jef_daemon.tokens import new_token

log = structlog.get_logger()

STOP_S = 5.0
"""For an executor to be gone after it was killed."""


class Attempt:
    """An attempt at a job, from its claim on.

    Args:
        execution: as it was claimed.
        scratch: its scratch folder.
        settings: how long an executor has to stop.
        before: an earlier attempt at the job that may still be stopping.
    """

    __slots__ = (
        "_before",
        "_settings",
        "ending",
        "execution",
        "fenced",
        "has_lost_locks",
        "recorded",
        "scratch",
        "task",
    )

    def __init__(
        self, execution: Execution, scratch: str, settings: Settings, before: Attempt | None = None
    ) -> None:
        self._before = before
        self._settings = settings
        self.task: asyncio.Task[None] | None = None
        self.execution = execution
        self.scratch = scratch
        self.has_lost_locks = False
        self.fenced = False
        """Whether it was completed without its locks, which does not count."""
        self.recorded = False
        """Whether its outcome is on its way into the ledger."""
        self.ending: asyncio.Future[Event] = asyncio.get_running_loop().create_future()

    async def alone(self) -> None:
        """Wait until an earlier attempt at the job, which was given up, has really stopped: two never run at once."""
        before, self._before = self._before, None
        if before is not None and before.task is not None:
            await asyncio.wait({before.task})

    async def outcome(self, running: asyncio.Task[Event], action: Action) -> Event:
        """What it comes to; the executor has stopped then, or was given up."""
        limit = self.execution.execution_timeout_s
        try:
            ends: set[asyncio.Future[Any]] = {running, self.ending}
            await asyncio.wait(ends, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
            if running.done() and not self._is_failed():
                return _result(running)
            await self._stop(running)
            if self.ending.done():
                return self._ended(running, self.ending.result())
            message = f"ran longer than its limit of {limit:g} s"
            return Failed(actor="daemon", error_type="ExecutionTimeout", error_message=message)
        except asyncio.CancelledError:
            # Only drain cancels a job's task: what runs is interrupted, and the record says so.
            await self._stop(running)
            return self._ended(running, self.ending.result() if self.ending.done() else interruption(action))

    def end(self, event: Event) -> None:
        """Stop it; the event is its outcome, unless it comes to another while it stops."""
        if not self.ending.done():
            self.ending.set_result(event)

    def lose_locks(self) -> None:
        """Have its executor see that it lost its locks, in whatever process it runs."""
        self.has_lost_locks = True
        mark = Path(lost_mark(self.scratch))
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()

    async def clean(self) -> None:
        """Remove what its executor left in its scratch folder."""
        folder = self.scratch
        if os.path.exists(mark := lost_mark(folder)):  # noqa: ASYNC240, PTH110 - as below
            os.unlink(mark)  # noqa: PTH108
        if os.path.isdir(folder):  # noqa: ASYNC240, PTH112 - microseconds; a thread would cost more
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)

    def _ended(self, running: asyncio.Task[Event], otherwise: Event) -> Event:
        """What others made of it, or what it came to while it was being stopped.

        A completion that came while it was being cancelled, or interrupted, is one: it was asked, not forbidden, to
        end. So is a launch: the work goes on outside. What was completed without the locks is none.
        """
        came = _result(running) if running.done() and not running.cancelled() else None
        if isinstance(came, Completed | Launched):
            self.fenced = self._is_failed()
            if not self.fenced:
                return came
        return otherwise

    def _is_failed(self) -> bool:
        """Whether others ended it as FAILED: it lost its locks."""
        return self.ending.done() and isinstance(self.ending.result(), Failed)

    async def _stop(self, running: asyncio.Task[Event]) -> None:
        running.cancel()
        grace_s = self._settings.jobs.kill_grace_s + STOP_S
        _, still = await asyncio.wait({running}, timeout=grace_s)
        if still:
            execution = self.execution
            log.error("executor_does_not_stop", execution_id=execution.execution_id, action=execution.action)


def interruption(action: Action) -> Event:
    """What becomes of an attempt that the daemon's stop cut short."""
    why = "the daemon was stopped while it ran"
    if action.may_run_again:
        return Interrupted(token=new_token(), reason=why)
    return Failed(actor="daemon", error_type="Interrupted", error_message=why)


def _result(running: asyncio.Task[Event]) -> Event:
    error = running.exception()
    return running.result() if error is None else failed(error)
