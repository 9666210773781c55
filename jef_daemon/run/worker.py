"""ROLE: claims queued jobs when there is a slot, runs them, records what became of them.

It meets the other roles only in the ledger: intake puts jobs there, notify takes what is to be told.
What it holds in memory is what runs: a job that waits costs nothing here.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import shutil
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, Protocol

import structlog

from jef_daemon.lifecycle import Completed, Event, Execution, Failed, Interrupted, Launched, Stopped
from jef_daemon.messages import JobRequest
from jef_daemon.ports import Applied, Capacity, Claimed, Ledger, Lost, Stop
from jef_daemon.run.boundary import JobInput, failed, perform
from jef_daemon.run.catalogue import Action, Catalogue, load
from jef_daemon.run.isolation import ProcessPool
from jef_daemon.run.progress import Progress
from jef_daemon.sdk import GrantedLock, lost_mark
from jef_daemon.settings import Settings
from jef_daemon.tokens import new_token
from jef_daemon.traceparent import given

log = structlog.get_logger()

_TICK_S = 1.0
"""How late a job with `notBefore` may start."""
_STOP_S = 5.0
"""For an executor to be gone after it was killed."""


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

    async def saved(self, execution_id: str) -> str | None:
        """The last checkpoint of an execution, as JSON."""
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
        settings: slots, limits, folders.
        on_claimed: told how many jobs of an action left the queue.
        leases: told which attempts hold locks.
        identity: the ledger's own name: a part of every token, so that updates find it.
    """

    def __init__(
        self,
        ledger: LedgerFutures,
        catalogue: Catalogue,
        pool: ProcessPool,
        settings: Settings,
        on_claimed: Callable[[str, int], None],
        leases: Leases,
        identity: str = "",
    ) -> None:
        self._identity = identity
        self._leases = leases
        self._attempts: dict[str, _Attempt] = {}
        """Those that run here now, by execution."""
        self._early: list[Stop] = []
        """Stops that came while the claim of their attempt was on its way to us."""
        self._ledger = ledger
        self._actions = catalogue.known
        self._pool = pool
        self._settings = settings
        self._on_claimed = on_claimed
        self._is_traced = settings.tracing.is_wanted
        self._scratch_root = str(settings.scratch_dir.absolute())
        self._running: dict[asyncio.Task[None], Execution] = {}
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
        if attempt is None or attempt.number != lost.attempt:
            return
        self.locks_lost += not attempt.has_lost_locks  # its own clock and the lock service may both say so
        attempt.has_lost_locks = True
        _mark_lost(attempt.scratch)
        if self._settings.locks.on_lost == "cancel":
            attempt.end(Failed(actor="locks", error_type="LockLost", error_message=lost.reason))

    def stop(self, stop: Stop) -> None:
        """A running attempt is not wanted any more; what it comes to while it stops is its own business."""
        attempt = self._attempts.get(stop.execution.execution_id)
        if attempt is not None and attempt.number == stop.execution.attempt:
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
        stop_s = self._settings.jobs.kill_grace_s + _STOP_S
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
            attempt = _Attempt(job.execution.attempt, self._scratch(job.execution), before)
            # From now on, not from its first step: whoever wants it stopped meanwhile is heard.
            self._attempts[job.execution.execution_id] = attempt
            task = asyncio.create_task(self._job(job, attempt), name=f"job {job.execution.execution_id}")
            attempt.task = task
            self._running[task] = job.execution
            task.add_done_callback(functools.partial(self._leave, attempt))
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

    def _leave(self, attempt: _Attempt, task: asyncio.Task[None]) -> None:
        execution = self._running.pop(task)
        self._by_action[execution.action] -= 1
        if self._attempts.get(execution.execution_id) is attempt:
            del self._attempts[execution.execution_id]
        error = None if task.cancelled() else task.exception()
        if error is not None:
            log.error("job_broke", execution_id=execution.execution_id, exc_info=error)
        if not attempt.recorded:
            # Drained before its first step, or something of ours failed: it must not stay RUNNING for nobody.
            outcome = self._interruption(self._actions[execution.action]) if error is None else failed(error)
            event = attempt.ending.result() if attempt.ending.done() else outcome
            self._ledger.applying(execution.execution_id, execution.attempt, [event])
        self.wake()

    # --- one job -----------------------------------------------------------------------------------------

    async def _job(self, claimed: Claimed, attempt: _Attempt) -> None:
        """RUNNING is recorded and told; run the executor, then record and tell its end."""
        execution = claimed.execution
        action = self._actions[execution.action]
        await attempt.alone()
        progress = Progress(
            self._settings.jobs.progress_interval_s,
            lambda event: self._ledger.applying(execution.execution_id, execution.attempt, [event]),
        )
        job = await self.input(claimed, action)
        running = asyncio.create_task(
            self._perform(action, job, progress), name=f"executor {job.execution_id}"
        )
        with self._leased(claimed, attempt):
            outcome = await self._outcome(running, action, execution, attempt.ending)
        attempt.recorded = True
        await self._ledger.applying(execution.execution_id, execution.attempt, [*progress.rest(), outcome])
        await _clean(job.scratch)
        log.info(
            "finished", execution_id=execution.execution_id, action=execution.action, outcome=_word(outcome)
        )

    @contextlib.contextmanager
    def _leased(self, claimed: Claimed, attempt: _Attempt) -> Iterator[None]:
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

    async def _outcome(
        self,
        running: asyncio.Task[Event],
        action: Action,
        execution: Execution,
        ending: asyncio.Future[Event],
    ) -> Event:
        limit = execution.execution_timeout_s
        try:
            ends: set[asyncio.Future[Any]] = {running, ending}
            await asyncio.wait(ends, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
            if running.done() and not _is_failed(ending):
                return _result(running)
            await self._stop(running, execution)
            if ending.done():
                # A completion that came while it was being cancelled is one: it was asked, not forbidden, to end. What
                # was completed without the locks is none.
                came = _result(running) if running.done() and not running.cancelled() else None
                is_one = isinstance(came, Completed | Launched)
                self.fenced += is_one and _is_failed(ending)
                return came if is_one and came is not None and not _is_failed(ending) else ending.result()
            message = f"ran longer than its limit of {limit:g} s"
            return Failed(actor="daemon", error_type="ExecutionTimeout", error_message=message)
        except asyncio.CancelledError:
            # Only drain cancels a job's task: what runs is interrupted, and the record says so.
            await self._stop(running, execution)
            return ending.result() if ending.done() else self._interruption(action)

    async def _stop(self, running: asyncio.Task[Event], execution: Execution) -> None:
        running.cancel()
        grace_s = self._settings.jobs.kill_grace_s + _STOP_S
        _, still = await asyncio.wait({running}, timeout=grace_s)
        if still:
            log.error("executor_does_not_stop", execution_id=execution.execution_id, action=execution.action)

    def _interruption(self, action: Action) -> Event:
        why = "the daemon was stopped while it ran"
        if action.may_run_again:
            return Interrupted(token=new_token(), reason=why)
        return Failed(actor="daemon", error_type="Interrupted", error_message=why)

    async def input(self, claimed: Claimed, action: Action, call: str = "execute") -> JobInput:
        """What an executor is given for a call, from what the ledger has."""
        execution = claimed.execution
        request = JobRequest.model_validate_json(claimed.body)
        held = [(lock.resource, lock.mode.value, lock.fencing_token) for lock in request.workflow_locks]
        may_have_saved = action.is_async or execution.attempt > 1
        return JobInput(
            execution_id=execution.execution_id,
            workflow_id=execution.workflow_id,
            action=execution.action,
            attempt=execution.attempt,
            configuration=request.configuration,
            job_context_variables=request.job_context_variables,
            workflow_context_variables=request.workflow_context_variables,
            scratch=self._scratch(execution),
            locks={grant[0]: GrantedLock(*grant) for grant in (*held, *claimed.grants)},
            max_variables_bytes=self._settings.jobs.max_variables_bytes,
            call=call,
            token=f"{self._identity}.{execution.token}",
            external_id=execution.external_id,
            saved=await self._ledger.saved(execution.execution_id) if may_have_saved else None,
            traceparent=given(execution, is_traced=self._is_traced) if execution.traceparent else None,
            is_traced=self._is_traced,
        )

    def _scratch(self, execution: Execution) -> str:
        # An execution id may be "..": the prefix and the attempt keep that from meaning anything.
        return f"{self._scratch_root}/job-{execution.execution_id}-{execution.attempt}"


class _Attempt:
    """One that runs here, and how others can end it."""

    __slots__ = ("_before", "ending", "has_lost_locks", "number", "recorded", "scratch", "task")

    def __init__(self, number: int, scratch: str, before: _Attempt | None = None) -> None:
        self._before = before
        self.task: asyncio.Task[None] | None = None
        self.number = number
        self.scratch = scratch
        self.has_lost_locks = False
        self.recorded = False
        """Whether its outcome is on its way into the ledger."""
        self.ending: asyncio.Future[Event] = asyncio.get_running_loop().create_future()

    async def alone(self) -> None:
        """Wait until an earlier attempt at the job, which was given up, has really stopped: two never run at once."""
        before, self._before = self._before, None
        if before is not None and before.task is not None:
            await asyncio.wait({before.task})

    def end(self, event: Event) -> None:
        """Stop it; the event is its outcome, unless it comes to another while it stops."""
        if not self.ending.done():
            self.ending.set_result(event)


def _is_failed(ending: asyncio.Future[Event]) -> bool:
    """Whether others ended an attempt as FAILED: it lost its locks."""
    return ending.done() and isinstance(ending.result(), Failed)


def _result(running: asyncio.Task[Event]) -> Event:
    error = running.exception()
    return running.result() if error is None else failed(error)


def _mark_lost(scratch: str) -> None:
    mark = Path(lost_mark(scratch))
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.touch()


async def _clean(folder: str) -> None:
    if os.path.exists(mark := lost_mark(folder)):  # noqa: ASYNC240, PTH110 - as below
        os.unlink(mark)  # noqa: PTH108
    if os.path.isdir(folder):  # noqa: ASYNC240, PTH112 - microseconds; a thread would cost more
        await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)


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


async def _all_done(running: dict[asyncio.Task[None], Execution]) -> None:
    while running:
        await asyncio.wait(set(running))


def _word(outcome: Event) -> str:
    return type(outcome).__name__.lower()
