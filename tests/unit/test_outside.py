"""Calls of async executors, without ledger and processes: what ends a call, and what does not."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar, cast

from jef_daemon import ActionExecutorResponse, AsyncActionExecutor, ExecutionContext, ExternalFailure
from jef_daemon.events import Completed, Event, Failed, Progressed
from jef_daemon.lifecycle import Execution
from jef_daemon.ports import NOTHING_TO_POLL, Call, Claimed, Consequences
from jef_daemon.run import outside as module
from jef_daemon.run.boundary import JobInput
from jef_daemon.run.catalogue import Action, ActionSpec
from jef_daemon.run.outside import Outside
from jef_daemon.sdk import NothingToPoll
from tests.support.clock import run_at_once

HOUR_S = 3600.0


class World:
    """A ledger in which calls are due, and a pool of processes in which they come to what the test says."""

    def __init__(self, calls: list[Call], perform: Callable[[str], Any]) -> None:
        self._calls = calls
        self._perform = perform
        self.answers: dict[str, Event | None] = {}
        self.made: list[str] = []
        self._answered = asyncio.Event()
        action = SimpleNamespace(hooks={"cancel": True}, is_blocking=True, spec=None)
        self.outside = Outside(
            self, {"f": cast("Any", action)}, cast("Any", self), self._input, lambda _: None
        )

    async def due_calls(self, limit: int) -> list[Call]:
        return self._calls[:limit]

    def answering(self, call: Call, event: Event | None) -> asyncio.Future[Consequences]:
        self.answers[call.execution.execution_id] = event
        self._calls = [each for each in self._calls if each != call]
        if not self._calls:
            self._answered.set()
        done: asyncio.Future[Consequences] = asyncio.get_running_loop().create_future()
        done.set_result(Consequences())
        return done

    def applying(self, execution_id: str, attempt: int | None, events: list[Event]) -> Any: ...

    def saving(self, execution_id: str, attempt: int, checkpoint: str) -> Any: ...

    async def _input(self, claimed: Any, action: Any, call: str) -> Any:
        return claimed.execution.execution_id

    async def perform(self, spec: Any, job: str, report: Any, save: Any) -> Event | None:
        self.made.append(job)
        await self._perform(job)
        return None

    async def run(self) -> None:
        """Until every call is answered."""
        async with asyncio.TaskGroup() as parts:
            running = parts.create_task(self.outside.run())
            async with asyncio.timeout(HOUR_S):
                await self._answered.wait()
            running.cancel()


def calls(count: int) -> list[Call]:
    return [Call("cancel", Execution(str(number), "f"), "{}", 0) for number in range(count)]


def test_a_call_that_waits_for_a_process_has_not_failed() -> None:
    """Nor is it made twice, though the ledger takes it for lost meanwhile."""
    world = World(calls(10), lambda _: asyncio.sleep(0.9 * module._CALL_LIMIT_S))
    run_at_once(world.run())
    assert world.answers == dict.fromkeys(map(str, range(10)))
    assert sorted(world.made) == sorted(world.answers)


def test_a_call_that_breaks_leaves_the_others() -> None:
    async def perform(job: str) -> None:
        if job == "1":
            raise OSError("no process starts")

    world = World(calls(3), perform)
    run_at_once(world.run())
    broken = world.answers.pop("1")
    assert isinstance(broken, Failed)
    assert (broken.error_type, broken.error_message) == ("OSError", "no process starts")
    assert world.answers == {"0": None, "2": None}


# --- each kind of call ------------------------------------------------------------------------------------


class Renders(AsyncActionExecutor):
    """Its hooks do what a test says, here or, where they block, in a process."""

    does: ClassVar[list[Callable[[ExecutionContext[Any]], Any]]] = []

    async def start(self, context: ExecutionContext[Any]) -> str:
        return "x-1"

    async def poll(self, context: ExecutionContext[Any]) -> Any:
        return await self.does[0](context)

    async def cancel(self, context: ExecutionContext[Any]) -> Any:
        return await self.does[0](context)


class Ledger:
    """Calls that are due until they are answered, and what is said of them."""

    def __init__(self, *names: str) -> None:
        self.due = [Call(name, Execution("1", "f", attempt=3), "{}", 0) for name in names]
        self.said: list[tuple[str, Event | None]] = []
        self.applied: list[tuple[str, int | None, list[Event]]] = []
        self.saved: list[tuple[str, int, str]] = []
        self.asked = 0

    async def due_calls(self, limit: int) -> list[Call]:
        self.asked += 1
        return self.due

    def answering(self, call: Call, event: Event | None) -> asyncio.Future[Consequences]:
        self.said.append((call.name, event))
        self.due = [each for each in self.due if each != call]
        done: asyncio.Future[Consequences] = asyncio.get_running_loop().create_future()
        done.set_result(Consequences())
        return done

    def applying(self, execution_id: str, attempt: int | None, events: list[Event]) -> Any:
        self.applied.append((execution_id, attempt, events))

    def saving(self, execution_id: str, attempt: int, checkpoint: str) -> Any:
        self.saved.append((execution_id, attempt, checkpoint))


async def job_of(claimed: Claimed, action: Any, call: str) -> JobInput:
    execution = claimed.execution
    return JobInput(
        configuration={},
        execution_id=execution.execution_id,
        action="f",
        scratch="s",
        attempt=execution.attempt,
        call=call,
    )


def called(name: str, does: Callable[[ExecutionContext[Any]], Any]) -> tuple[Ledger, Event | None]:
    """One call of a hook that is a coroutine, until it is answered."""
    ledger = Ledger(name)
    Renders.does[:] = [does]
    action = Action(
        ActionSpec("f", f"{__name__}:Renders"), is_async=True, hooks={"poll": False, "cancel": False}
    )
    followed: list[Consequences] = []
    outside = Outside(ledger, {"f": action}, cast("Any", None), job_of, followed.append)

    async def until_said() -> None:
        running = asyncio.create_task(outside.run())
        while not ledger.said:
            await asyncio.sleep(1)
        running.cancel()

    run_at_once(until_said())
    [(said_of, event)] = ledger.said
    assert (said_of, len(followed)) == (name, 1)
    return ledger, event


def test_a_poll_that_has_an_answer_is_a_sign_of_life() -> None:
    """Though it tells nothing: the other side is there, and has the work. What it saves is kept."""

    async def nothing(context: ExecutionContext[Any]) -> None:
        context.checkpoint({"page": 2})

    async def half(context: ExecutionContext[Any]) -> None:
        context.progress(50, "half")

    ledger, event = called("poll", nothing)
    assert (event, ledger.applied) == (None, [("1", 3, [Progressed()])])
    assert ledger.saved == [("1", 3, '{"page": 2}')]
    ledger, event = called("poll", half)
    assert (event, ledger.applied) == (None, [("1", 3, [Progressed(progress=50, message="half")])])


def test_a_poll_in_trouble_says_nothing_of_the_work() -> None:
    """Neither that it lives nor that it has failed: silence has its own clock."""

    async def breaks(context: ExecutionContext[Any]) -> None:
        context.progress(50)
        raise OSError("no route")

    async def hangs(context: ExecutionContext[Any]) -> None:
        await asyncio.sleep(HOUR_S)

    for trouble in (breaks, hangs):
        ledger, event = called("poll", trouble)
        assert (event, ledger.applied) == (None, [])


def test_a_poll_says_how_the_work_ended() -> None:
    """Well or badly; or that there is nothing to poll."""

    async def has_failed(context: ExecutionContext[Any]) -> None:
        raise ExternalFailure("no disk")

    async def has_nothing(context: ExecutionContext[Any]) -> None:
        raise NothingToPoll

    async def is_done(context: ExecutionContext[Any]) -> ActionExecutorResponse:
        return ActionExecutorResponse(result="done")

    ledger, event = called("poll", has_failed)
    assert isinstance(event, Failed)
    assert (event.error_type, event.error_message, ledger.applied) == ("ExternalFailure", "no disk", [])
    _, event = called("poll", has_nothing)
    assert isinstance(event, Failed)
    assert event.error_type == NOTHING_TO_POLL
    ledger, event = called("poll", is_done)
    assert (event, ledger.applied) == (Completed(result="done"), [])


def test_a_cancel_that_fails_says_why() -> None:
    """It is no sign of life of the work, whatever it says; one that takes too long has failed."""

    async def breaks(context: ExecutionContext[Any]) -> None:
        raise OSError("no route")

    async def hangs(context: ExecutionContext[Any]) -> None:
        await asyncio.sleep(HOUR_S)

    async def asks(context: ExecutionContext[Any]) -> bool:
        return False

    for does, message in ((breaks, "no route"), (hangs, "took longer than 60 s")):
        ledger, event = called("cancel", does)
        assert isinstance(event, Failed)
        assert (event.error_message, ledger.applied) == (message, [])
    ledger, event = called("cancel", asks)
    assert (event, ledger.applied) == (None, [])


def test_calls_wait_for_an_action_that_has_any_and_others_are_not_made() -> None:
    """A reload brings one; the ledger is not asked before, and what is due to an action that is gone waits."""
    ledger = Ledger("poll", "resume")
    ledger.due.append(Call("poll", Execution("2", "gone"), "{}", 0))
    made: list[str] = []

    async def polled(context: ExecutionContext[Any]) -> None:
        made.append(context.execution_id)

    Renders.does[:] = [polled]
    actions = {"f": Action(ActionSpec("f", f"{__name__}:Renders"))}
    outside = Outside(ledger, actions, cast("Any", None), job_of, lambda _: None)

    async def main() -> None:
        running = asyncio.create_task(outside.run())
        await asyncio.sleep(HOUR_S)
        assert ledger.asked == 0
        actions["f"] = Action(ActionSpec("f", f"{__name__}:Renders"), hooks={"poll": False})
        outside.wake()
        await asyncio.sleep(10)
        assert (made, [name for name, _ in ledger.said]) == (["1"], ["poll"])
        ledger.due.append(Call("poll", Execution("1", "f", attempt=3), "{}", 1))
        asked = ledger.asked
        outside.wake()
        await asyncio.sleep(0.1)
        assert (made, ledger.asked) == (["1", "1"], asked + 1)
        running.cancel()

    run_at_once(main())


def test_so_many_calls_are_under_way_at_once_and_no_more() -> None:
    """Two of them in processes; whoever waits is not asked for again."""
    limits: list[int] = []
    at_once = most = 0

    async def perform(job: str) -> None:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        await asyncio.sleep(1)
        at_once -= 1

    world = World(calls(70), perform)
    due = world.due_calls

    async def watched(limit: int) -> list[Call]:
        limits.append(limit)
        return await due(limit)

    world.due_calls = watched  # type: ignore[method-assign]
    run_at_once(world.run())
    assert (most, len(world.made)) == (module._PROCESSES, 70)
    assert limits[0] == module._AT_ONCE > max(limits[1:]) >= min(limits) > 0
