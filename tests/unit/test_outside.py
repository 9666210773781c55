"""Calls of async executors, without ledger and processes: what ends a call, and what does not."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

from jef_daemon.events import Event, Failed
from jef_daemon.lifecycle import Execution
from jef_daemon.ports import Call, Consequences
from jef_daemon.run import outside as module
from jef_daemon.run.outside import Outside
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
