"""How an attempt that runs here comes to its end, without ledger and processes; its waits pass at once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from jef_daemon.events import Completed, Event, Failed, Interrupted, Launched, Stopped
from jef_daemon.lifecycle import Execution
from jef_daemon.run.attempt import STOP_S, Attempt
from jef_daemon.run.catalogue import Action, ActionSpec
from jef_daemon.sdk import lost_mark
from jef_daemon.settings import Settings
from tests.support.clock import run_at_once

ACTION = Action(ActionSpec("a", "x:Y"), may_run_again=True)
STOPPED = Stopped(actor="operator:ann", reason="wrong file")
LOST = Failed(actor="locks", error_type="LockLost", error_message="r: revoked")
HOUR_S = 3600.0


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings.model_validate({"data_dir": str(tmp_path), "jobs": {"kill_grace_s": 2.0}})


def made(settings: Settings, limit: float | None = None, before: Attempt | None = None) -> Attempt:
    execution = Execution("1", "a", execution_timeout_s=limit)
    return Attempt(execution, f"{settings.data_dir}/scratch/1", settings, before)


async def runs(event: Event | None, stops_in: float = 0.0) -> Event:
    """An executor that runs until it is cancelled, and then takes its time; None: it ends as cancelled."""
    try:
        await asyncio.sleep(HOUR_S)
    except asyncio.CancelledError:
        await asyncio.sleep(stops_in)
        if event is None:
            raise
    assert event is not None
    return event


def run(
    settings: Settings,
    executor: Awaitable[Event],
    limit: float | None = None,
    meanwhile: Callable[[Attempt, asyncio.Task[Event]], None] = lambda attempt, task: None,
) -> tuple[Event, float, Attempt]:
    """What it comes to, after how many seconds."""

    async def main() -> tuple[Event, float, Attempt]:
        attempt = made(settings, limit)
        loop = asyncio.get_running_loop()
        running: asyncio.Task[Event] = asyncio.ensure_future(executor)
        ending = asyncio.create_task(attempt.outcome(running, ACTION))
        await asyncio.sleep(1.0)
        began = loop.time()
        meanwhile(attempt, ending)
        event = await ending
        took_s = loop.time() - began
        running.cancel()
        return event, took_s, attempt

    return run_at_once(main())


def test_an_attempt_has_its_limit(settings: Settings) -> None:
    """It has been stopped when its end is told; what it came to beyond the limit is no completion."""
    event, took_s, _ = run(settings, runs(Completed(), stops_in=1.5), limit=10.0)
    message = "ran longer than its limit of 10 s"
    assert event == Failed(actor="daemon", error_type="ExecutionTimeout", error_message=message)
    assert took_s == pytest.approx(10.0 - 1.0 + 1.5, abs=0.5)


@pytest.mark.parametrize("came", [Completed(result="done"), Launched(external_id="x"), None, LOST])
@pytest.mark.parametrize("how", ["cancelled", "interrupted", "lost"])
def test_what_it_comes_to_while_it_is_being_stopped(settings: Settings, how: str, came: Event | None) -> None:
    """A completion and a launch count, if it had its locks; whatever else it says, others have ended it."""

    def stop(attempt: Attempt, task: asyncio.Task[Event]) -> None:
        if how == "interrupted":
            task.cancel()
        else:
            attempt.end(STOPPED if how == "cancelled" else LOST)
            attempt.end(Stopped())  # who comes second is not heard

    event, _, attempt = run(settings, runs(came), meanwhile=stop)
    is_one = isinstance(came, Completed | Launched)
    if is_one and how != "lost":
        assert event is came
    elif how == "interrupted":
        assert isinstance(event, Interrupted)
    else:
        assert event is (STOPPED if how == "cancelled" else LOST)
    assert attempt.fenced is (is_one and how == "lost")


def test_an_executor_that_does_not_stop_is_given_up(settings: Settings) -> None:
    """After the time that it has to stop, loudly: its slot is another's."""
    with capture_logs() as logs:
        event, took_s, _ = run(
            settings, runs(None, HOUR_S), meanwhile=lambda attempt, _: attempt.end(STOPPED)
        )
    assert event is STOPPED
    assert took_s == pytest.approx(2.0 + STOP_S, abs=0.5)
    assert [(line["event"], line["execution_id"]) for line in logs] == [("executor_does_not_stop", "1")]


def test_two_attempts_at_a_job_never_run_at_once(settings: Settings) -> None:
    """The one that was given up may still be stopping."""

    async def main() -> float:
        loop = asyncio.get_running_loop()
        first = made(settings)
        began, first.task = loop.time(), asyncio.create_task(asyncio.sleep(30.0))
        await made(settings, before=first).alone()
        return loop.time() - began

    assert run_at_once(main()) == pytest.approx(30.0, abs=0.5)


def test_lost_locks_are_seen_by_the_executor_until_its_attempt_is_over(settings: Settings) -> None:
    """By a file, in whatever process it runs; then its scratch folder goes, if it has made one."""

    async def main() -> None:
        attempt = made(settings)
        mark = Path(lost_mark(attempt.scratch))
        await attempt.clean()
        assert not attempt.has_lost_locks
        attempt.lose_locks()
        assert (attempt.has_lost_locks, mark.exists()) == (True, True)
        Path(attempt.scratch, "left").mkdir(parents=True)
        await attempt.clean()
        assert (mark.exists(), Path(attempt.scratch).exists()) == (False, False)

    asyncio.run(main())
