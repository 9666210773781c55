"""ROLE: calls the other methods of async executors when they are due: poll, cancel, resume.

What is due is in the ledger, so a restart forgets none of it. Calls hold no slot; few are made at the same time.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol

import structlog

from jef_daemon.events import Event, Failed, Progressed
from jef_daemon.ports import NOTHING_TO_POLL, Applied, Call, Claimed, Consequences
from jef_daemon.run.boundary import JobInput, failed, perform
from jef_daemon.run.catalogue import Action, load
from jef_daemon.run.isolation import ProcessPool
from jef_daemon.sdk import ExternalFailure

log = structlog.get_logger()

_TICK_S = 0.5
"""How late a call may be made."""
_AT_ONCE = 32
"""Calls under way at the same time."""
_PROCESSES = 2
"""Of them in processes of their own."""
_CALL_LIMIT_S = 60.0
"""Longest call; a longer one is given up, and made again."""
_SAYS_SOMETHING = frozenset({ExternalFailure.__name__, NOTHING_TO_POLL})
"""Exceptions of a poll that are not its own trouble."""


class CallLedger(Protocol):
    """The part of a ledger that calls need."""

    async def due_calls(self, limit: int) -> list[Call]:
        """See `SqlLedger.due_calls`."""
        ...

    def answering(self, call: Call, event: Event | None) -> asyncio.Future[Consequences]:
        """See `SqlLedger.answering`."""
        ...

    def applying(
        self, execution_id: str, attempt: int | None, events: list[Event]
    ) -> asyncio.Future[list[Applied]]:
        """`apply` of `ports.Ledger`, put in at once."""
        ...

    def saving(self, execution_id: str, attempt: int, checkpoint: str) -> asyncio.Future[bool]:
        """See `SqlLedger.saving`."""
        ...


_Key = tuple[str, str, int]
"""Of a call: execution, name, attempt."""
MakeInput = Callable[[Claimed, Action, str], Awaitable[JobInput]]


class Outside:
    """Makes calls.

    Args:
        ledger: what is due, and what came of it.
        actions: those served, and those that were before a reload.
        pool: where blocking methods run.
        make_input: what an executor is given.
        follow: does here what follows.
    """

    def __init__(
        self,
        ledger: CallLedger,
        actions: Mapping[str, Action],
        pool: ProcessPool,
        make_input: MakeInput,
        follow: Callable[[Consequences], None],
    ) -> None:
        self._ledger = ledger
        self._actions = actions
        self._pool = pool
        self._make_input = make_input
        self._follow = follow
        self._under_way: set[_Key] = set()
        self._processes = asyncio.Semaphore(_PROCESSES)
        self._wake = asyncio.Event()

    def wake(self) -> None:
        """Something became due just now."""
        self._wake.set()

    async def run(self) -> None:
        """Call until cancelled."""
        await self._has_hooks()
        async with asyncio.TaskGroup() as calls:
            while True:
                room = _AT_ONCE - len(self._under_way)
                for call in await self._ledger.due_calls(room) if room > 0 else ():
                    key = call.execution.execution_id, call.name, call.execution.attempt
                    if key in self._under_way:  # it waits for a process, so long that it became due again
                        continue
                    self._under_way.add(key)
                    task = calls.create_task(self._call(call), name=f"{call.name} {key[0]}")
                    task.add_done_callback(functools.partial(self._leave, key))
                self._wake.clear()
                try:
                    async with asyncio.timeout(_TICK_S):
                        await self._wake.wait()
                except TimeoutError:
                    continue

    async def _has_hooks(self) -> None:
        """Wait until some action has anything to call; a reload may bring one, and wakes us."""
        while not any(action.hooks for action in self._actions.values()):
            self._wake.clear()
            await self._wake.wait()

    def _leave(self, key: _Key, _: asyncio.Task[None]) -> None:
        self._under_way.discard(key)

    async def _call(self, call: Call) -> None:
        action = self._actions.get(call.execution.action)
        if action is None or call.name not in action.hooks:
            return
        try:
            event = await self._perform(action, call)
        except TimeoutError:
            event = failed(TimeoutError(f"took longer than {_CALL_LIMIT_S:g} s"))
        except Exception as error:  # noqa: BLE001  a process that does not start, an answer that does not come over
            event = failed(error)
        if call.name == "poll" and isinstance(event, Failed) and event.error_type not in _SAYS_SOMETHING:
            # A service that does not answer just now says nothing about the work: silence has its own clock.
            log.warning("poll_failed", execution_id=call.execution.execution_id, error=event.error_message)
            event = None
        self._follow(await self._ledger.answering(call, event))

    async def _perform(self, action: Action, call: Call) -> Event | None:
        execution = call.execution
        job = await self._make_input(Claimed(execution, call.body), action, call.name)

        told = Progressed()  # an answer is a sign of life, whether or not it tells progress

        def report(percent: int | None, message: str | None) -> None:
            nonlocal told
            told = Progressed(progress=percent, message=message)

        def save(checkpoint: str) -> None:
            self._ledger.saving(execution.execution_id, execution.attempt, checkpoint)

        if action.is_blocking or action.hooks[call.name]:
            # Waiting for a process is no part of the call: one that was never made has not failed.
            async with self._processes, asyncio.timeout(_CALL_LIMIT_S):
                event = await self._pool.perform(action.spec, job, report, save)
        else:
            async with asyncio.timeout(_CALL_LIMIT_S):
                event = await perform(load(action.spec), job, report, save)
        if call.name == "poll" and event is None:
            self._ledger.applying(execution.execution_id, execution.attempt, [told])
        return event
