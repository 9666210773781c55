"""The worker's races: what reaches a job between its claim and its first step, and while it is being stopped."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest

from jef_daemon import ActionExecutor, ActionExecutorResponse, ExecutionContext
from jef_daemon.errors import LedgerUnavailable
from jef_daemon.events import Completed, Event, Failed, Interrupted, Stopped
from jef_daemon.lifecycle import Execution
from jef_daemon.ports import Applied, Capacity, Claimed, Lost, Outgoing, Stop
from jef_daemon.run.catalogue import Action, ActionSpec, Catalogue
from jef_daemon.run.inputs import Inputs
from jef_daemon.run.isolation import ProcessPool
from jef_daemon.run.worker import Worker
from jef_daemon.settings import Settings
from tests.support.clock import run_at_once


class Watched(ActionExecutor):
    """Runs until it is told to answer; answers all the same when it is cancelled, if it is so inclined."""

    action = "watched"
    begun: ClassVar[list[int]] = []
    answer: ClassVar[asyncio.Event]
    answers_when_cancelled: ClassVar[bool] = False
    stops: ClassVar[asyncio.Event | None] = None
    """How long the first attempt takes to stop; None: no time."""

    async def execute(self, context: ExecutionContext[Any]) -> ActionExecutorResponse:
        self.begun.append(context.attempt)
        try:
            await self.answer.wait()
        except asyncio.CancelledError:
            if self.stops is not None and context.attempt == 1:
                await self.stops.wait()
            if not self.answers_when_cancelled:
                raise
        return ActionExecutorResponse(result="done")


class StubLedger:
    """Hands out one claim when it is told to, and keeps what is applied."""

    def __init__(self) -> None:
        self.claims: list[asyncio.Future[list[Claimed]]] = []
        self.applied: list[tuple[int | None, Event]] = []
        self.fails: Exception | None = None
        """What the first outcome meets."""

    def claiming(self, capacity: Capacity) -> asyncio.Future[list[Claimed]]:
        self.capacity = capacity
        self.claims.append(asyncio.get_running_loop().create_future())
        return self.claims[-1]

    def applying(
        self, execution_id: str, attempt: int | None, events: Sequence[Event]
    ) -> asyncio.Future[list[Applied]]:
        done: asyncio.Future[list[Applied]] = asyncio.get_running_loop().create_future()
        if self.fails is not None:
            done.set_exception(self.fails)
            self.fails = None
            return done
        self.applied += [(attempt, event) for event in events]
        done.set_result([])
        return done

    def saving(self, execution_id: str, attempt: int, checkpoint: str) -> asyncio.Future[bool]:
        raise NotImplementedError

    async def saved(self, execution_id: str) -> str | None:
        return None

    async def accept(self, messages: object) -> Any:
        raise NotImplementedError

    async def claim(self, capacity: Capacity) -> Any:
        raise NotImplementedError

    async def apply(self, execution_id: str, attempt: int | None, events: Sequence[Event]) -> Any:
        raise NotImplementedError

    async def outbox(self, after: int, limit: int) -> list[Outgoing]:
        raise NotImplementedError

    async def confirm(self, ids: Sequence[int]) -> None:
        raise NotImplementedError

    async def queued(self) -> dict[str, int]:
        raise NotImplementedError


class Leases:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []

    def started(self, execution_id: str, attempt: int) -> None:
        self.told.append(("started", execution_id, attempt))

    def ended(self, execution_id: str) -> None:
        self.told.append(("ended", execution_id))


class Bench:
    """A worker with one action."""

    def __init__(self, folder: Path, *, may_run_again: bool = False, concurrency: int | None = None) -> None:
        Watched.begun.clear()
        Watched.answer = asyncio.Event()
        Watched.answers_when_cancelled = False
        Watched.stops = None
        spec = ActionSpec("watched", f"{__name__}:Watched")
        catalogue = Catalogue({"watched": Action(spec, may_run_again=may_run_again, concurrency=concurrency)})
        settings = Settings.model_validate({"data_dir": str(folder), "shutdown": {"flush_s": 1.0}})
        self.ledger = StubLedger()
        pool = ProcessPool(1, 0, 1.0, [])
        self.catalogue = catalogue
        self.leases = Leases()
        self.left: list[tuple[str, int]] = []
        """Who was said to have left the queue."""
        self.worker = Worker(
            *(self.ledger, catalogue, pool, settings, Inputs(self.ledger, settings)),
            lambda action, count: self.left.append((action, count)),
            self.leases,
        )
        self.worker.wake()

    def claimed(self, body: str = '{"executionId": "1"}') -> Execution:
        """The ledger answers the claim; the job's first step comes a turn later."""
        execution = Execution("1", "watched")
        self.claim((execution, (("r", "EXCLUSIVE", 1),)), body=body)
        return execution

    def claim(self, *jobs: tuple[Execution, tuple[Any, ...]], body: str = '{"executionId": "1"}') -> None:
        """The ledger answers the last claim with these, and what they are granted."""
        self.ledger.claims[-1].set_result([Claimed(execution, body, grants) for execution, grants in jobs])

    async def until_begun(self) -> None:
        async with asyncio.timeout(5):
            while not Watched.begun:
                await asyncio.sleep(0)

    async def outcome(self) -> Event:
        """The only thing that is recorded."""
        async with asyncio.timeout(5):
            while self.worker.running or not self.ledger.applied:
                await asyncio.sleep(0)
        [(attempt, event)] = self.ledger.applied
        assert attempt == 1
        return event


@pytest.fixture
async def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


async def turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


@pytest.mark.parametrize("after", range(6))
async def test_a_cancel_is_heard_from_the_claim_on(bench: Bench, after: int) -> None:
    """However many turns of the loop lie between: before the claim is known here, before the first step, behind it."""
    execution = Execution("1", "watched")
    if after == 0:
        bench.worker.stop(Stop(execution, "operator:ann", "wrong file"))
        bench.claimed()
    else:
        bench.claimed()
        await turns(after - 1)
        bench.worker.stop(Stop(execution, "operator:ann", "wrong file"))
    event = await bench.outcome()
    assert isinstance(event, Stopped)
    assert (event.actor, event.reason) == ("operator:ann", "wrong file")


async def test_a_cancel_of_an_earlier_attempt_stops_nothing(bench: Bench) -> None:
    """It came too late: the attempt that it means is over."""
    bench.claimed()
    await bench.until_begun()
    bench.worker.stop(Stop(Execution("1", "watched", attempt=0), "operator:ann", ""))
    await turns(10)
    Watched.answer.set()
    assert isinstance(await bench.outcome(), Completed)


@pytest.mark.parametrize("may_run_again", [False, True])
@pytest.mark.parametrize("after", [1, 2, 3, 6])
async def test_a_drain_interrupts_what_was_claimed(tmp_path: Path, after: int, may_run_again: bool) -> None:
    """Also what has not made its first step: it must not stay RUNNING for nobody."""
    bench = Bench(tmp_path, may_run_again=may_run_again)
    bench.claimed()
    await turns(after - 1)
    haste = asyncio.Event()
    haste.set()
    bench.worker.start_nothing_more()
    await bench.worker.drain(0.0, haste)
    event = await bench.outcome()
    why = "the daemon was stopped while it ran"
    if may_run_again:
        assert isinstance(event, Interrupted)
        assert (event.reason, bool(event.token)) == (why, True)
    else:
        assert event == Failed(actor="daemon", error_type="Interrupted", error_message=why)


@pytest.mark.parametrize(
    ("patience_s", "hastens_after_s", "took_s", "outcome"),
    [(60.0, None, 30.0, Completed), (10.0, None, 10.0, Failed), (60.0, 5.0, 5.0, Failed)],
)
def test_a_drain_lets_jobs_end_for_a_time(
    tmp_path: Path, patience_s: float, hastens_after_s: float | None, took_s: float, outcome: type[Event]
) -> None:
    """No longer than that, and no longer than until haste is asked for; at once where nothing runs any more."""

    async def main() -> tuple[Event, float]:
        bench, loop, haste = Bench(tmp_path), asyncio.get_running_loop(), asyncio.Event()
        bench.claimed()
        await bench.until_begun()
        began = loop.time()
        loop.call_later(30.0, Watched.answer.set)
        if hastens_after_s is not None:
            loop.call_later(hastens_after_s, haste.set)
        bench.worker.start_nothing_more()
        await bench.worker.drain(patience_s, haste)
        return await bench.outcome(), loop.time() - began

    event, took = run_at_once(main())
    assert isinstance(event, outcome)
    assert took == pytest.approx(took_s, abs=1.0)


@pytest.mark.parametrize("may_run_again", [False, True])
async def test_a_completion_wins_over_a_drain(tmp_path: Path, may_run_again: bool) -> None:
    """Asked to stop it came to its end: it has failed no more than it has to run again."""
    bench = Bench(tmp_path, may_run_again=may_run_again)
    Watched.answers_when_cancelled = True
    bench.claimed()
    await bench.until_begun()
    bench.worker.start_nothing_more()
    await bench.worker.drain(0.0, asyncio.Event())
    assert isinstance(await bench.outcome(), Completed)


async def test_a_drain_makes_nothing_of_what_was_completed_without_its_locks(bench: Bench) -> None:
    Watched.answers_when_cancelled = True
    bench.claimed()
    await bench.until_begun()
    bench.worker.lock_lost(Lost("1", 1, "r: the lease ended"))
    bench.worker.start_nothing_more()
    await bench.worker.drain(0.0, asyncio.Event())
    event = await bench.outcome()
    assert isinstance(event, Failed)
    assert (event.error_type, bench.worker.fenced) == ("LockLost", 1)


async def test_a_job_that_breaks_around_its_executor_ends(bench: Bench) -> None:
    """A row that cannot be read, say: FAILED, and its slot is free."""
    bench.claimed(body="no JSON")
    assert isinstance(await bench.outcome(), Failed)


async def test_an_outcome_that_cannot_be_written_is_a_failure(bench: Bench) -> None:
    """By a fault of ours, whichever: else the job would be RUNNING for nobody until the daemon's next start."""
    bench.ledger.fails = ValueError("surrogates not allowed")
    bench.claimed()
    Watched.answer.set()
    event = await bench.outcome()
    assert isinstance(event, Failed)
    assert (event.error_type, event.error_message) == ("ValueError", "surrogates not allowed")


async def test_an_outcome_that_a_closed_ledger_does_not_take_is_left_to_the_next_start(bench: Bench) -> None:
    bench.ledger.fails = LedgerUnavailable("the ledger is closed")
    bench.claimed()
    Watched.answer.set()
    async with asyncio.timeout(5):
        await turns(1)
        while bench.worker.running:
            await asyncio.sleep(0)
    assert bench.ledger.applied == []


async def test_a_drain_leaves_a_cancel_what_it_is(bench: Bench) -> None:
    """Asked for before the stop: CANCELLED, not interrupted."""
    execution = bench.claimed()
    await bench.until_begun()
    bench.worker.stop(Stop(execution, "operator:ann", "wrong file"))
    haste = asyncio.Event()
    haste.set()
    bench.worker.start_nothing_more()
    await bench.worker.drain(0.0, haste)
    assert isinstance(await bench.outcome(), Stopped)


@pytest.mark.parametrize("answers", [False, True])
async def test_a_completion_wins_over_a_cancel(bench: Bench, answers: bool) -> None:
    """It was asked to stop, not forbidden to end."""
    Watched.answers_when_cancelled = answers
    execution = bench.claimed()
    await bench.until_begun()
    bench.worker.stop(Stop(execution, "operator:ann", ""))
    assert isinstance(await bench.outcome(), Completed if answers else Stopped)


@pytest.mark.parametrize("how", ["runs", "answers when cancelled", "answers at once"])
async def test_what_was_completed_without_its_locks_is_none(bench: Bench, how: str) -> None:
    """FAILED, whatever the executor came to: others may have had the resource meanwhile."""
    Watched.answers_when_cancelled = how == "answers when cancelled"
    bench.claimed()
    await bench.until_begun()
    if how == "answers at once":
        Watched.answer.set()
    bench.worker.lock_lost(Lost("1", 1, "r: the lease ended"))
    event = await bench.outcome()
    assert isinstance(event, Failed)
    assert (event.error_type, event.error_message) == ("LockLost", "r: the lease ended")
    assert (bench.worker.locks_lost, bench.worker.fenced) == (1, how != "runs")


async def test_a_loss_is_counted_once(bench: Bench) -> None:
    """Its own clock and the lock service may both tell of it; one of an attempt that is over is none."""
    Watched.answers_when_cancelled = True
    bench.claimed()
    await bench.until_begun()
    for attempt in (1, 1, 0, 2):
        bench.worker.lock_lost(Lost("1", attempt, "r: the lease ended"))
    bench.worker.lock_lost(Lost("another", 1, "r: the lease ended"))
    await bench.outcome()
    assert bench.worker.locks_lost == 1
    bench.worker.lock_lost(Lost("1", 1, "r: the lease ended"))
    assert bench.worker.locks_lost == 1


def plain(*names: str, **fields: Any) -> list[tuple[Execution, tuple[Any, ...]]]:
    return [(Execution(name, "watched", **fields), ()) for name in names]


async def test_what_runs_takes_slots_and_places_and_gives_them_back(tmp_path: Path) -> None:
    """An end claims anew, with what is free then; the backlog hears of those that were in it."""
    bench = Bench(tmp_path, concurrency=3)
    total = bench.ledger.capacity.total
    assert bench.ledger.capacity.by_action == {"watched": 3}
    bench.claim(*plain("1", "2"), *plain("3", wants_locks=True))
    await bench.until_begun()
    assert (bench.left, bench.worker.running) == ([("watched", 2)], 3)
    bench.worker.wake()
    assert (bench.ledger.capacity.total, bench.ledger.capacity.by_action) == (total - 3, {})
    bench.claim()
    claims = len(bench.ledger.claims)
    Watched.answer.set()
    async with asyncio.timeout(5):
        while bench.worker.running:
            await asyncio.sleep(0)
    assert len(bench.ledger.claims) > claims
    bench.claim()
    await turns(2)
    bench.worker.wake()
    assert (bench.ledger.capacity.total, bench.ledger.capacity.by_action) == (total, {"watched": 3})


async def test_who_wants_to_claim_while_a_claim_is_on_its_way_is_heard_after_it(bench: Bench) -> None:
    """Once, however often; what has arrived meanwhile may have come too late for the one that is on its way."""
    for _ in range(3):
        bench.worker.wake()
    assert len(bench.ledger.claims) == 1
    for _ in range(2):
        bench.claim()
        await turns(2)
    assert len(bench.ledger.claims) == 2


async def test_a_claim_that_fails_is_made_again(bench: Bench) -> None:
    bench.ledger.claims[-1].set_exception(LedgerUnavailable("the disk is full"))
    await turns(2)
    bench.worker.wake()
    assert len(bench.ledger.claims) == 2


async def test_nothing_is_claimed_once_it_drains(bench: Bench) -> None:
    """What a claim that is under way brings is a start, and is waited for."""
    haste = asyncio.Event()
    draining = asyncio.create_task(bench.worker.drain(60.0, haste))
    bench.worker.start_nothing_more()
    await turns(3)
    bench.claimed()
    await bench.until_begun()
    assert not draining.done()
    bench.worker.wake()
    Watched.answer.set()
    await asyncio.wait_for(draining, 5)
    assert isinstance(await bench.outcome(), Completed)
    assert len(bench.ledger.claims) == 1


async def test_the_next_attempt_begins_when_the_last_one_has_stopped(bench: Bench) -> None:
    """It was given up, and takes its time; the leases that are kept by then are the next one's."""
    lock = (("r", "EXCLUSIVE", 1),)
    bench.claim((Execution("1", "watched"), lock))
    await bench.until_begun()
    Watched.stops = asyncio.Event()
    bench.worker.stop(Stop(Execution("1", "watched"), "operator:ann", "hangs"))
    bench.worker.wake()
    bench.claim((Execution("1", "watched", attempt=2), lock))
    await turns(20)
    assert Watched.begun == [1]
    Watched.stops.set()
    async with asyncio.timeout(5):
        while Watched.begun != [1, 2]:
            await asyncio.sleep(0)
    assert bench.worker.running == 1
    assert bench.leases.told == [("started", "1", 1), ("started", "1", 2)]
    Watched.answer.set()
    async with asyncio.timeout(5):
        while bench.worker.running:
            await asyncio.sleep(0)
    assert bench.leases.told[2:] == [("ended", "1")]
    assert [(attempt, type(event)) for attempt, event in bench.ledger.applied] == [
        (1, Stopped),
        (2, Completed),
    ]


async def test_nothing_is_claimed_of_an_action_that_was_taken_out(bench: Bench) -> None:
    """A claim that is under way is a start: what it brings runs, and runs to its end."""
    assert bench.ledger.capacity.by_action == {"watched": 64}
    bench.catalogue.become(Catalogue({}))
    bench.claimed()
    await bench.until_begun()
    bench.worker.wake()
    assert bench.ledger.capacity.by_action == {}
    Watched.answer.set()
    assert isinstance(await bench.outcome(), Completed)


async def test_an_attempt_of_an_action_that_was_taken_out_is_interrupted_as_ever(tmp_path: Path) -> None:
    """Whether it may run again was said when it was there."""
    bench = Bench(tmp_path, may_run_again=True)
    bench.claimed()
    bench.catalogue.become(Catalogue({}))
    await turns(1)
    for task in bench.worker._running:
        task.cancel()  # before its first step
    assert isinstance(await bench.outcome(), Interrupted)
