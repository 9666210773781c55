"""Delivery → valid request, duplicate or dead letter. Custody: persist, then acknowledge.

All deliveries that are there are decoded, recorded in one ledger transaction, and acknowledged with one
frame. A wrong message is recorded too, as a dead letter in the outbox, in that same transaction: so the
whole batch is dealt with, and nothing in it can stop the rest.

It takes in a bounded backlog per action: beyond it the action's queue is left to other daemons, and no
delivery waits in our hands.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import structlog

from jef_daemon.errors import RequestRefused
from jef_daemon.inbox import Inbox
from jef_daemon.lifecycle import Execution
from jef_daemon.messages import JobRequest, decode_request
from jef_daemon.ports import Accepted, Arrival, Delivery, Refusal
from jef_daemon.run.catalogue import Action
from jef_daemon.tokens import new_token

log = structlog.get_logger()

UNROUTABLE = "unroutable"
"""The source of requests whose action no queue is bound for."""

_MOST_COUNTED = 2**31
"""Highest sequence or attempt that another daemon is believed to have counted up to."""
_TRACEPARENT_CHARACTERS = 512
"""W3C's has 55; what is told with every notification must fit a frame."""

_AT_ONCE = 2000
"""Requests in one transaction, at most: as many as one queue prefetches."""

_NEWLY_QUEUED = frozenset({Accepted.NEW, Accepted.TAKEN_AGAIN})


class Custody(Protocol):
    """The part of a ledger that intake needs."""

    def accepting(self, messages: list[Arrival | Refusal]) -> asyncio.Future[list[Accepted]]:
        """`accept` of `ports.Ledger`, put in at once."""
        ...


class Acknowledger(Protocol):
    """The part of a bus that intake needs."""

    async def acknowledge(self, deliveries: Sequence[Delivery]) -> None:
        """See `ports.Bus`."""
        ...


class Intake:
    """Takes deliveries into custody.

    Args:
        ledger: where they are recorded.
        bus: where they are acknowledged.
        actions: those served, and those that were before a reload, by name.
        max_body_bytes: longest request.
        on_recorded: called as soon as a batch is on its way into the ledger, so that free slots can claim
            from it within the same transaction.
        on_arrived: told how many new jobs of an action were queued.
        begin_trace: told of each request that was read, where tracing is on; gives it a trace if it has none.
    """

    def __init__(
        self,
        ledger: Custody,
        bus: Acknowledger,
        actions: Mapping[str, Action],
        max_body_bytes: int,
        on_recorded: Callable[[], None],
        on_arrived: Callable[[str, int], None],
        begin_trace: Callable[[Execution], None] | None = None,
    ) -> None:
        self._begin_trace = begin_trace
        self._ledger = ledger
        self._bus = bus
        self._actions = actions
        self.max_body_bytes = max_body_bytes
        """Longest request."""
        self._on_recorded = on_recorded
        self._on_arrived = on_arrived
        self._inbox = Inbox(self._take, self._leave_out, _AT_ONCE)

    def deliver(self, delivery: Delivery) -> None:
        """Take a delivery; called by the bus for each, in order."""
        self._inbox.deliver(delivery)

    async def run(self) -> None:
        """Record and acknowledge, batch after batch, until cancelled."""
        await self._inbox.run()

    async def finish(self) -> None:
        """Wait until everything delivered is recorded and acknowledged."""
        await self._inbox.finish()

    async def _take(self, batch: Sequence[Delivery]) -> None:
        messages = [self._read(delivery) for delivery in batch]
        recording = self._ledger.accepting(messages)
        self._on_recorded()
        words = await recording
        await self._bus.acknowledge(batch)
        queued: Counter[str] = Counter()
        for message, word in zip(messages, words, strict=True):
            if isinstance(message, Arrival) and word in _NEWLY_QUEUED and message.execution.is_backlog:
                queued[message.execution.action] += 1
            elif isinstance(message, Refusal):
                _tell_refused(message)
        for action, count in queued.items():
            self._on_arrived(action, count)

    async def _leave_out(self, delivery: Delivery, error: RequestRefused) -> None:
        """A dead letter. FAILED is not told: sent again once the fault is mended, it becomes a job."""
        await self._ledger.accepting([Refusal(error, delivery, delivery.routing_key or delivery.source)])
        await self._bus.acknowledge([delivery])

    def _read(self, delivery: Delivery) -> Arrival | Refusal:
        try:
            request = decode_request(delivery.body, self.max_body_bytes)
            action = self._action(delivery, request)
        except RequestRefused as error:
            return Refusal(error, delivery, delivery.routing_key or delivery.source)
        wanted = tuple((lock.resource, lock.mode) for lock in request.locks)
        execution = _execution(request, delivery, action)
        if self._begin_trace is not None:
            self._begin_trace(execution)
        return Arrival(execution, delivery.body.decode(), wanted)

    def _action(self, delivery: Delivery, request: JobRequest) -> Action:
        # What could not be routed when it was published may be served by now.
        name = delivery.routing_key if delivery.source == UNROUTABLE else delivery.source
        action = self._actions.get(name)
        if action is None or (action.is_retired and delivery.source == UNROUTABLE):
            detail = f"no queue is bound for the action {name!r}: no daemon has served it yet"
            raise RequestRefused("unroutable", detail, request.execution_id)
        if action.scope == "OBSOLETE":
            detail = f"the action {name!r} is OBSOLETE: it never runs"
            raise RequestRefused("action-obsolete", detail, request.execution_id)
        return action


def _execution(request: JobRequest, delivery: Delivery, action: Action) -> Execution:
    timeouts, allowed = request.timeouts, action.retry.attempts
    return Execution(
        execution_id=request.execution_id,
        action=action.name,
        workflow_id=request.workflow_id,
        attempt=_count(delivery, "x-jef-attempt", 1),
        sequence=_count(delivery, "x-jef-sequence", 0),
        priority=request.priority,
        not_before=request.not_before.timestamp() if request.not_before else None,
        token=new_token(),
        wants_locks=bool(request.locks),
        update_timeout_s=_either(timeouts.update, action.update_timeout_s),
        execution_timeout_s=_either(timeouts.execution, action.execution_timeout_s),
        traceparent=_text(delivery.headers.get("traceparent")),
        reply_to=delivery.reply_to,
        correlation_id=delivery.correlation_id,
        max_attempts=min(request.retry.attempts, allowed) if request.retry else allowed,
        timeout_grace_s=action.timeout_grace_s,
        queue_timeout_s=_either(timeouts.queue, action.queue_timeout_s),
        lock_timeout_s=_either(timeouts.lock, action.lock_timeout_s),
        stage=request.stage,
    )


def _either(asked: float | None, otherwise: float | None) -> float | None:
    return otherwise if asked is None else asked


def _count(delivery: Delivery, header: str, least: int) -> int:
    """A number that a daemon which handed the job back counted up to."""
    value = delivery.headers.get(header)
    # Anybody can write headers: a number that leaves no room to count on is nobody's of ours.
    # A truth value, which is a number to Python, would be told as one.
    return value if type(value) is int and least <= value <= _MOST_COUNTED else least


def _text(value: object) -> str | None:
    if isinstance(value, bytes):
        value = value.decode("ascii", "replace")
    return value if isinstance(value, str) and len(value) <= _TRACEPARENT_CHARACTERS else None


def _tell_refused(refusal: Refusal) -> None:
    log.warning(
        "request_refused",
        reason=refusal.error.code,
        detail=refusal.error.detail,
        execution_id=refusal.error.execution_id,
        action=refusal.action,
    )
