"""ROLE: claims queued jobs when there is a slot, runs them, records what became of them.

It meets the other roles only in the ledger: intake puts jobs there, notify takes what is to be told.
What it holds in memory is what runs: a job that waits costs nothing here.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, Protocol

import structlog

from jef_daemon.errors import JefError
from jef_daemon.events import Event, Failed, Stopped
from jef_daemon.ports import Applied, Capacity, Claimed, Ledger, Lost, Stop
from jef_daemon.run.attempt import STOP_S, Attempt, interruption
from jef_daemon.run.boundary import JobInput, failed, perform
from jef_daemon.run.catalogue import Action, Catalogue, load
from jef_daemon.run.inputs import Inputs
from jef_daemon.run.isolation import ProcessPool
from jef_daemon.run.progress import Progress
from jef_daemon.settings import Settings

log = structlog.get_logger()

_TICK_S = 1.0
"""How late a job with `notBefore` may start."""


class LedgerFutures(Ledger, Protocol):
    """A ledger that takes wishes at once, so that several share a transaction."""

    def claiming(self, capacity: Capacity) -> asyncio.Future[list[Claimed]]:
        """`claim`, put in at once."""
        ...

    def applying(
        self, execution_id: str, attempt: int | None, events: list[Event]
    ) -> asyncio.Future[list[Applied]]:
        """`apply`, put in at once."""
        ...

    def saving(self, execution_id: str, attempt: int, checkpoint: str) -> asyncio.Future[bool]:
        """Keep a checkpoint of an attempt; in the order of calls."""
        ...


class Leases(Protocol):
    """Whoever keeps the locks of running jobs (`lock.client`)."""

    def started(self, execution_id: str, attempt: int) -> None:
        """An attempt that holds locks runs."""
        ...

    def ended(self, execution_id: str) -> None:
        """It runs no more."""
        ...


class Worker:
    """Runs jobs.

    Args:
        ledger: custody.
        catalogue: the actions served.
        pool: where blocking executors run.
        settings: slots, limits.
        inputs: makes what executors are given.
        on_claimed: told how many jobs of an action left the queue.
        leases: told which attempts hold locks.
    """

    def __init__(
        self,
        ledger: LedgerFutures,
        catalogue: Catalogue,
        pool: ProcessPool,
        settings: Settings,
        inputs: Inputs,
        on_claimed: Callable[[str, int], None],
        leases: Leases,
    ) -> None:
        self._inputs = inputs
        self._leases = leases
        self._attempts: dict[str, Attempt] = {}
        """Those that run here now, by execution."""
        self._early: list[Stop] = []
        """Stops that came while the claim of their attempt was on its way to us."""
        self._ledger = ledger
        self._actions = catalogue.known
        self._pool = pool
        self._settings = settings
        self._on_claimed = on_claimed
        self._running: dict[asyncio.Task[None], Attempt] = {}
        self._by_action: Counter[str] = Counter()
        self._claiming: asyncio.Future[list[Claimed]] | None = None
        self._asked_again = False
        self._draining = False
        self.locks_lost = 0
        """Attempts that lost their locks while they ran here."""
        self.fenced = 0
        """Completions that did not count, as they came without their locks."""

    @property
    def running(self) -> int:
        """Jobs that run now."""
        return len(self._running)

    async def run(self) -> None:
        """Look for due jobs until cancelled; arrivals and finished jobs look at once."""
        while not self._draining:
            self.wake()
            await asyncio.sleep(_TICK_S)

    def wake(self) -> None:
        """Claim as much as there are slots for.

        Puts the claim in at once, so that it shares the transaction of an arrival put in just before.
        """
        if self._draining:
            return
        if self._claiming is not None:
            self._asked_again = True
            return
        capacity = self._capacity()
        if capacity.total > 0:
            self._claiming = self._ledger.claiming(capacity)
            self._claiming.add_done_callback(self._start_claimed)

    def start_nothing_more(self) -> None:
        """Claim no more jobs."""
        self._draining = True

    def lock_lost(self, lost: Lost) -> None:
        """A running attempt lost its locks; by default it is stopped."""
        attempt = self._attempts.get(lost.execution_id)
        if attempt is None or attempt.execution.attempt != lost.attempt:
            return
        self.locks_lost += not attempt.has_lost_locks  # its own clock and the lock service may both say so
        attempt.lose_locks()
        if self._settings.locks.on_lost == "cancel":
            attempt.end(Failed(actor="locks", error_type="LockLost", error_message=lost.reason))

    def stop(self, stop: Stop) -> None:
        """A running attempt is not wanted any more; what it comes to while it stops is its own business."""
        attempt = self._attempts.get(stop.execution.execution_id)
        if attempt is not None and attempt.execution.attempt == stop.execution.attempt:
            attempt.end(Stopped(actor=stop.actor, reason=stop.reason))
        elif self._claiming is not None:
            # A claim and a command can share a transaction, and the command's answer may reach us first.
            self._early.append(stop)

    async def drain(self, patience_s: float, haste: asyncio.Event) -> None:
        """Let running jobs finish for a time, or until haste is asked for; then interrupt them.

        A ledger that takes no writes is not waited for longer than for the last notifications: what it has
        not recorded then is settled at the next start.
        """
        flush_s = self._settings.shutdown.flush_s
        if self._claiming is not None:
            await _within(asyncio.wait({self._claiming}), flush_s, haste)
        if self._running:
            log.info("draining", running=len(self._running), patience_s=patience_s)
            await _within(_all_done(self._running), patience_s, haste)
        for task in self._running:
            task.cancel()
        stop_s = self._settings.jobs.kill_grace_s + STOP_S
        await _within(_all_done(self._running), stop_s + flush_s, haste)
        if haste.is_set():  # they are stopped all the same, in haste or not
            await _within(_all_done(self._running), stop_s)
        if self._running:
            log.warning(
                "not_all_recorded", running=len(self._running), consequence="settled at the next start"
            )

    # --- claiming ----------------------------------------------------------------------------------------

    def _capacity(self) -> Capacity:
        slots = self._settings.slots
        total = slots.total - len(self._running)
        places = {
            name: min(total, action.concurrency - self._by_action[name] if action.concurrency else total)
            for name, action in self._actions.items()
            if not action.is_retired
        }
        blocking = frozenset(name for name, action in self._actions.items() if action.is_blocking)
        busy = sum(self._by_action[name] for name in blocking)
        free = {name: count for name, count in places.items() if count > 0}
        return Capacity(total, free, slots.blocking_processes - busy, blocking)

    def _start_claimed(self, claiming: asyncio.Future[list[Claimed]]) -> None:
        self._claiming = None
        claimed = [] if claiming.cancelled() or claiming.exception() else claiming.result()
        if not claiming.cancelled() and (error := claiming.exception()) is not None:
            log.error("claim_failed", error=str(error))
        for job in claimed:
            self._by_action[job.execution.action] += 1
            before = self._attempts.get(job.execution.execution_id)
            attempt = Attempt(job.execution, self._inputs.scratch(job.execution), self._settings, before)
            # From now on, not from its first step: whoever wants it stopped meanwhile is heard.
            self._attempts[job.execution.execution_id] = attempt
            task = asyncio.create_task(self._job(job, attempt), name=f"job {job.execution.execution_id}")
            attempt.task = task
            self._running[task] = attempt
            task.add_done_callback(self._leave)
        early, self._early = self._early, []
        for stop in early:
            self.stop(stop)
        for name, count in Counter(
            job.execution.action for job in claimed if job.execution.is_backlog
        ).items():
            self._on_claimed(name, count)
        if self._asked_again:
            self._asked_again = False
            self.wake()

    def _leave(self, task: asyncio.Task[None]) -> None:
        attempt = self._running.pop(task)
        execution = attempt.execution
        self._by_action[execution.action] -= 1
        if self._attempts.get(execution.execution_id) is attempt:
            del self._attempts[execution.execution_id]
        error = None if task.cancelled() else task.exception()
        if error is not None:
            log.error("job_broke", execution_id=execution.execution_id, exc_info=error)
        if not attempt.recorded:
            # Drained before its first step, or something of ours failed: it must not stay RUNNING for nobody.
            outcome = interruption(self._actions[execution.action]) if error is None else failed(error)
            event = attempt.ending.result() if attempt.ending.done() else outcome
            self._ledger.applying(execution.execution_id, execution.attempt, [event])
        elif error is not None and not isinstance(error, JefError | OSError):
            # What it came to could not be written, and it alone: it must not stay RUNNING either.
            self._ledger.applying(execution.execution_id, execution.attempt, [failed(error)])
        self.wake()

    # --- one job -----------------------------------------------------------------------------------------

    async def _job(self, claimed: Claimed, attempt: Attempt) -> None:
        """RUNNING is recorded and told; run the executor, then record and tell its end."""
        execution = claimed.execution
        action = self._actions[execution.action]
        await attempt.alone()
        progress = Progress(
            self._settings.jobs.progress_interval_s,
            lambda event: self._ledger.applying(execution.execution_id, execution.attempt, [event]),
        )
        job = await self._inputs.of(claimed, action)
        running = asyncio.create_task(
            self._perform(action, job, progress), name=f"executor {job.execution_id}"
        )
        with self._leased(claimed, attempt):
            outcome = await attempt.outcome(running, action)
        self.fenced += attempt.fenced
        attempt.recorded = True
        await self._ledger.applying(execution.execution_id, execution.attempt, [*progress.rest(), outcome])
        await attempt.clean()
        log.info(
            "finished", execution_id=execution.execution_id, action=execution.action, outcome=_word(outcome)
        )

    @contextlib.contextmanager
    def _leased(self, claimed: Claimed, attempt: Attempt) -> Iterator[None]:
        """While it runs, the leases of its locks are kept."""
        name = claimed.execution.execution_id
        if claimed.grants:
            self._leases.started(name, claimed.execution.attempt)
        try:
            yield
        finally:
            if claimed.grants and self._attempts.get(name) is attempt:
                # Not a successor, begun while this one was being stopped.
                self._leases.ended(name)

    async def _perform(self, action: Action, job: JobInput, progress: Progress) -> Event:
        def save(checkpoint: str) -> None:
            self._ledger.saving(job.execution_id, job.attempt, checkpoint)

        if action.is_blocking:
            event = await self._pool.perform(action.spec, job, progress.report, save)
        else:
            event = await perform(load(action.spec), job, progress.report, save)
        if event is None:
            raise AssertionError("execute always means something")
        return event


async def _within(
    step: Coroutine[Any, Any, object], patience_s: float, haste: asyncio.Event | None = None
) -> None:
    """Wait for something, but no longer than a time, nor longer than until haste is asked for."""
    waiting = {asyncio.create_task(step)}
    if haste is not None:
        waiting.add(asyncio.create_task(haste.wait()))
    await asyncio.wait(waiting, timeout=patience_s, return_when=asyncio.FIRST_COMPLETED)
    for task in waiting:
        task.cancel()


async def _all_done(running: dict[asyncio.Task[None], Attempt]) -> None:
    while running:
        await asyncio.wait(set(running))


def _word(outcome: Event) -> str:
    return type(outcome).__name__.lower()
