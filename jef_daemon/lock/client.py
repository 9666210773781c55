"""A daemon's side of the locks: hears the service's answers, keeps the leases of what runs and waits alive.

Its jobs' and workflows' requests and releases are not sent here: they leave by the outbox, with the status that causes
them (`ledger.job_locks`). Memory holds only the locks of jobs that run now; those that wait are rows.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import structlog
from pydantic import ValidationError

from jef_daemon.errors import RequestRefused
from jef_daemon.inbox import Inbox
from jef_daemon.lock import wire
from jef_daemon.lock.requests import Answer
from jef_daemon.ports import Delivery, Heard, LockTimes, Lost, Outgoing, seen
from jef_daemon.tokens import new_token
from jef_daemon.workflow.state import key_of_owner

log = structlog.get_logger()

_TICK_S = 1.0
_OWNERS_AT_ONCE = 250
"""In one message; the service's limit is 256."""
_WORKFLOWS_S = 60.0
"""So often at least workflows hear whether they still hold what they hold."""
_SILENCE_S = 30.0
"""So long a request may go unanswered before we ask whether the service hears us."""
_BETWEEN_PAGES_S = 0.02
"""The others' work goes on meanwhile; a hundred thousand take seconds."""
_SLACK_S = 5.0
"""Between a request's record and its publication."""


class JobLedger(Protocol):
    """The part of a ledger that the client needs."""

    def hearing(self, heard: Sequence[Heard]) -> asyncio.Future[list[Lost]]:
        """See `SqlLedger.hearing`."""
        ...

    async def go_on_locking(self, answered_up_to: float) -> int:
        """See `SqlLedger.go_on_locking`."""
        ...

    async def lock_states(self, state: str, after: str = "") -> list[str]:
        """See `SqlLedger.lock_states`."""
        ...


class ClientBus(Protocol):
    """The part of a bus that the client needs."""

    @property
    def session(self) -> int:
        """Number of the connection; 0: none."""
        ...

    async def acknowledge(self, deliveries: Sequence[Delivery]) -> None:
        """See `ports.Bus`."""
        ...

    async def publish(self, messages: Sequence[Outgoing]) -> asyncio.Future[None]:
        """See `ports.Bus`."""
        ...


@dataclass(slots=True)
class _Held:
    """Locks of a running attempt."""

    attempt: int
    until: float
    """Monotonic: by our own clock nobody else has them before."""


class LockClient:
    """Keeps the locks of this daemon's jobs.

    Args:
        ledger: what was asked, and what becomes of it.
        bus: to the service and back.
        queue: the service's.
        reply_to: ours.
        times: leases.
        on_granted: called when jobs may start.
        on_lost: told each running attempt that lost its locks.
    """

    def __init__(
        self,
        ledger: JobLedger,
        bus: ClientBus,
        queue: str,
        reply_to: str,
        times: LockTimes,
        on_granted: Callable[[], None],
        on_lost: Callable[[Lost], None],
    ) -> None:
        self._ledger = ledger
        self._bus = bus
        self._queue = queue
        self._reply_to = reply_to
        self._times = times
        self._on_granted = on_granted
        self._on_lost = on_lost
        self._inbox = Inbox(self._hear, self._leave_out)
        self._held: dict[str, _Held] = {}
        self._sent: dict[str, tuple[float, float, tuple[str, ...]]] = {}
        """Renewals on their way, by correlation id: when sent (monotonic and wall clock), of which running ones."""
        self._numbers = itertools.count(1)
        self._life = new_token()[:8]
        """Answers to an earlier life of this daemon are none to this one."""
        self._answered_up_to = 0.0
        """Wall clock: the last answer was to a message that was sent then, so the service has had all earlier ones."""

    def deliver(self, delivery: Delivery) -> None:
        """Take an answer; called by the bus for each, in order."""
        self._inbox.deliver(delivery)

    def started(self, execution_id: str, attempt: int) -> None:
        """An attempt that holds locks runs."""
        self._held[execution_id] = _Held(attempt, time.monotonic() + self._times.margin_s)

    def ended(self, execution_id: str) -> None:
        """It runs no more."""
        self._held.pop(execution_id, None)

    async def run(self) -> None:
        """Hear and keep until cancelled."""
        async with asyncio.TaskGroup() as parts:
            parts.create_task(self._inbox.run(), name="locks: answers")
            parts.create_task(self._keep_running(), name="locks: running")
            parts.create_task(self._keep_waiting(), name="locks: waiting")
            parts.create_task(self._keep_held(), name="locks: held")
            parts.create_task(self._keep_workflows(), name="locks: workflows")
            parts.create_task(self._go_on(), name="locks: due")

    # --- hearing -----------------------------------------------------------------------------------------

    async def _hear(self, batch: Sequence[Delivery]) -> None:
        sent = dict(self._sent)
        heard = [each for each in map(self._read, batch) if each is not None]
        try:
            hearing = self._ledger.hearing(heard)
            # Put in behind it: what is granted now may start within the same transaction.
            self._on_granted()
            for lost in await hearing:
                self._lose(lost)
        except Exception:
            self._sent = sent | self._sent  # the answers come again, one by one, as if nobody had read them
            raise
        await self._bus.acknowledge(batch)

    async def _leave_out(self, delivery: Delivery, _: RequestRefused) -> None:
        # No dead letter: what is not answered is asked again.
        await self._bus.acknowledge([delivery])

    def _read(self, delivery: Delivery) -> Heard | None:
        try:
            reply = wire.decode_reply(delivery.body)
        except ValidationError as error:
            log.warning("lock_answer_unreadable", detail=str(error))
            return None
        correlation_id = delivery.correlation_id or ""
        if reply.status == Answer.KEPT:
            sent = self._sent.pop(correlation_id, None)
            if sent is None:
                # Heard before, or too old: what it says is lost may have been granted since.
                return None
            self._note_kept(*sent, kept=reply.held or ())
        return Heard(reply, correlation_id)

    def _note_kept(
        self, sent_at: float, sent_wall: float, running: Iterable[str], *, kept: Iterable[str]
    ) -> None:
        # Not the latest of all: by a clock that was set back, everything that is asked would be earlier.
        self._answered_up_to = sent_wall
        still = set(kept)  # Who is named as neither held nor lost waits, and holds nothing.
        for name in running:
            held = self._held.get(name)
            if held is not None and name in still:
                held.until = max(held.until, sent_at + self._times.lease_s)

    def _lose(self, lost: Lost) -> None:
        held = self._held.get(lost.execution_id)
        if held is not None and held.attempt == lost.attempt:
            del self._held[lost.execution_id]
        # Also one that was claimed and has not told us yet that it runs: nobody says it a second time.
        log.warning("lock_lost", execution_id=lost.execution_id, reason=lost.reason)
        self._on_lost(lost)

    # --- keeping -----------------------------------------------------------------------------------------

    async def _keep_running(self) -> None:
        """Renew what is due; what could not be renewed in time is lost, whether or not anybody says so."""
        while True:
            await asyncio.sleep(_TICK_S)
            now = time.monotonic()
            for name, held in list(self._held.items()):
                if held.until <= now:
                    reason = "the lease could not be renewed in time: no word from the lock service"
                    self._lose(Lost(name, held.attempt, reason))
            due_before = now + self._times.lease_s * 2 / 3
            due = [name for name, held in self._held.items() if held.until < due_before]
            fresh = now - max(self._times.lease_s / 6, 2 * _TICK_S)
            on_their_way = {name for sent, _, names in self._sent.values() if sent > fresh for name in names}
            for owners in _pages([name for name in due if name not in on_their_way]):
                await self._keep(owners, running=True)
            self._forget_old(now)

    async def _keep_waiting(self) -> None:
        """Go round all that wait, a page at a time, thrice in a lease."""
        pause_s = self._times.wait_s / 3
        after = ""
        while True:
            names = await self._ledger.lock_states("waiting", after)
            for owners in _pages(names):
                await self._keep(owners)
            after = names[-1] if names else ""
            # A full page has another behind it; between them the others' work goes on.
            await asyncio.sleep(_TICK_S if names else pause_s)

    async def _keep_held(self) -> None:
        """Go round all that hold locks while nothing of theirs runs in memory: their work is outside, or timed out.

        What they lost, the service says. Our own clock says nothing of them: we do not know when they were renewed.
        """
        pause_s = min(self._times.lease_s / 3, self._times.margin_s / 2)
        while True:
            await self._go_round(self._times.lease_s, of_workflows=False)
            await asyncio.sleep(pause_s)

    async def _keep_workflows(self) -> None:
        """Go round all workflows that hold locks across their stages; seldom, as their leases are long."""
        pause_s = min(self._times.workflow_s / 3, _WORKFLOWS_S)
        while True:
            await self._go_round(self._times.workflow_s, of_workflows=True)
            await asyncio.sleep(pause_s)

    async def _go_round(self, lease_s: float, *, of_workflows: bool) -> None:
        after = ""
        while names := await self._ledger.lock_states("held", after):
            ours = [name for name in names if (key_of_owner(name) is not None) == of_workflows]
            for owners in _pages([name for name in ours if name not in self._held]):
                await self._keep(owners, lease_s=lease_s)
            after = names[-1]
            await asyncio.sleep(_BETWEEN_PAGES_S)

    async def _go_on(self) -> None:
        """What is due: ask at `notBefore`, ask again what got lost, give back what cannot start."""
        asked_at = time.monotonic()
        while True:
            await asyncio.sleep(_TICK_S)
            given_back = await self._ledger.go_on_locking(self._answered_up_to - _SLACK_S)
            if given_back:
                log.warning("locks_given_back", jobs=given_back, reason="no slot came free in time")
            if time.monotonic() - asked_at > _SILENCE_S and self._bus.session:
                asked_at = time.monotonic()
                if await self._ledger.lock_states("asked"):
                    await self._keep(())

    async def _keep(
        self, owners: Sequence[str], *, running: bool = False, lease_s: float | None = None
    ) -> None:
        if not self._bus.session:
            return
        correlation_id = f"keep#{self._life}#{next(self._numbers)}"
        self._sent[correlation_id] = (time.monotonic(), time.time(), tuple(owners) if running else ())
        body = wire.keep(owners, lease_s or self._times.lease_s, self._times.wait_s)
        message = Outgoing(0, "", self._queue, body, None, correlation_id, self._reply_to)
        try:
            seen(await self._bus.publish([message]))
        except ConnectionError:
            del self._sent[correlation_id]

    def _forget_old(self, now: float) -> None:
        """Renewals whose answer, should it come yet, would say nothing any more."""
        for correlation_id, (sent_at, _, _) in list(self._sent.items()):
            if now - sent_at > self._times.lease_s:
                del self._sent[correlation_id]


def _pages(names: Sequence[str]) -> Iterable[Sequence[str]]:
    for start in range(0, len(names), _OWNERS_AT_ONCE):
        yield names[start : start + _OWNERS_AT_ONCE]
