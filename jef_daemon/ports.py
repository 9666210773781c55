"""What the stages need from outside: the bus, the ledger, the clock. Adapters are picked in `daemon` only.

Bus: `jef_daemon.rabbitmq.bus` (aio-pika). Ledger: `jef_daemon.ledger` (SQLAlchemy; SQLite now, PostgreSQL
to come); what a ledger promises is in `tests/contract`. What it tells of its commits is in `commits`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from jef_daemon.errors import RequestRefused
from jef_daemon.events import Event
from jef_daemon.lifecycle import Execution, Transition
from jef_daemon.lock.messages import LockReply
from jef_daemon.messages import Control, Update


class Clock(Protocol):
    """Where time comes from: wall clock for records, monotonic for waiting."""

    def now(self) -> float:
        """UTC seconds since the epoch."""
        ...

    def monotonic(self) -> float:
        """Seconds from an arbitrary point; never goes back."""
        ...


class SystemClock:
    """The machine's own clocks."""

    now = staticmethod(time.time)
    monotonic = staticmethod(time.monotonic)


# --- the bus ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Delivery:
    """One message received. `source` is the queue's purpose: an action's name, or `unroutable`."""

    source: str
    body: bytes
    tag: int
    """Rises with each delivery of one session; used to acknowledge many at once."""
    session: int
    """Number of the connection it came by: an acknowledgement for a lost one is dropped."""
    redelivered: bool = False
    routing_key: str = ""
    headers: Mapping[str, Any] = field(default_factory=dict)
    reply_to: str | None = None
    correlation_id: str | None = None


@dataclass(frozen=True, slots=True)
class Outgoing:
    """One message to publish, persistent, confirmed."""

    id: int
    """The outbox's number: order of publishing, and what is confirmed."""
    exchange: str
    routing_key: str
    body: bytes
    headers: Mapping[str, Any] | None = None
    correlation_id: str | None = None
    reply_to: str | None = None
    is_mandatory: bool = False
    """Whether it must come into a queue: else `MessageReturned`."""


class MessageReturned(LookupError):
    """No queue is where a message should have gone: nobody has it."""


class MessageRefused(ConnectionError):
    """The broker refused a message, as a queue that takes no more does. It is there: others come through."""


class Bus(Protocol):
    """Messages in and out. Reconnects by itself; nothing here raises for a lost connection."""

    async def publish(self, messages: Sequence[Outgoing]) -> asyncio.Future[None]:
        """Send many at once, in order; waits while the window of unconfirmed messages is full.

        Returns:
            Done when the broker has confirmed all of them, and raises
            `ConnectionError` when the connection was lost, `MessageRefused` when the broker refused one: send them
            again; `MessageReturned` when there was no queue for one that is mandatory.
        """
        ...

    async def acknowledge(self, deliveries: Sequence[Delivery]) -> None:
        """Acknowledge deliveries that are persisted; those of a lost connection are dropped."""
        ...

    async def pause(self, source: str) -> None:
        """Stop the deliveries of one source; what is prefetched still arrives."""
        ...

    async def resume(self, source: str) -> None:
        """Let the deliveries of one source come again."""
        ...


# --- locks -----------------------------------------------------------------------------------------------

WantedLocks = tuple[tuple[str, str], ...]
"""Resource and mode of each lock that a request names."""


@dataclass(frozen=True, slots=True)
class LockTimes:
    """Leases of a daemon's own jobs, seconds."""

    lease_s: float = 120.0
    """Of a running job; renewed long before."""
    start_within_s: float = 30.0
    """A granted job starts so soon, or gives its locks back."""
    wait_s: float = 1800.0
    """Of a place in the queue; renewed long before."""
    workflow_s: float = 1800.0
    """Of what a workflow holds across its stages; renewed long before."""

    @property
    def margin_s(self) -> float:
        """What is left at least of a lease when its job starts: time for the first renewal."""
        return min(30.0, self.lease_s / 2)

    @property
    def start_lease_s(self) -> float:
        """Of a grant that is not used yet."""
        return self.start_within_s + self.margin_s


@dataclass(frozen=True, slots=True)
class Heard:
    """An answer of the lock service, as it came."""

    reply: LockReply
    correlation_id: str


@dataclass(frozen=True, slots=True)
class Lost:
    """A running attempt does not hold its locks any more."""

    execution_id: str
    attempt: int
    reason: str
    """A sentence that names the resource."""


# --- updates and commands --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Reported:
    """An update of an async job, and who wants to hear whether it was taken."""

    update: Update
    reply_to: str | None = None
    correlation_id: str | None = None


@dataclass(frozen=True, slots=True)
class Command:
    """Something that somebody wants of an execution, or of all of a workflow."""

    control: Control
    actor: str = "operator"
    reply_to: str | None = None
    correlation_id: str | None = None
    after: int = 0
    """Of a workflow: the executions up to this number are dealt with."""
    done: int = 0
    """How many of those did what was asked."""
    refused: str = ""
    """Why one of those did not."""


@dataclass(frozen=True, slots=True)
class Stop:
    """A running attempt is to be stopped."""

    execution: Execution
    actor: str
    reason: str


@dataclass(frozen=True, slots=True)
class Call:
    """A call of an async executor that is due."""

    name: str
    """`poll`, `cancel` or `resume`."""
    execution: Execution
    body: str
    """The request."""
    number: int
    """How often it was made before."""


NOTHING_TO_POLL = "jef_daemon.sdk.NothingToPoll"
"""The `error_type` of a poll that is not to be made again: updates tell."""


@dataclass(slots=True)
class Consequences:
    """What follows outside the ledger from updates, commands, time-outs."""

    stops: list[Stop] = field(default_factory=list)
    """Attempts that run here, or outside by our executor, and are not wanted any more."""
    queued: list[str] = field(default_factory=list)
    """Actions of executions that are queued anew, one entry each."""
    left: list[str] = field(default_factory=list)
    """Actions of executions that left the queue without having started, one entry each."""
    calls: bool = False
    """Whether calls of async executors (`resume`, `cancel`) became due."""
    more: list[Command] = field(default_factory=list)
    """Commands that go on: the rest of a workflow."""
    again: bool = False
    """Whether the same step has more to do: it took no more than a page."""
    unknown: set[str] = field(default_factory=set)
    """Executions whose cancel was remembered, as they are not here."""
    answers: list[dict[str, object]] = field(default_factory=list)
    """What whoever asked is told: one for each command that is done."""


@dataclass(slots=True)
class Silence:
    """What the ledger says of executions that seem silent."""

    lateness_s: list[float] = field(default_factory=list)
    """Of those that were flagged: how long after their deadlines."""
    later: dict[str, float] = field(default_factory=dict)
    """Those that are not silent: their true deadlines, UTC seconds since the epoch."""


# --- the ledger ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Arrival:
    """A valid request to be recorded."""

    execution: Execution
    body: str
    """The request as it came, unknown keys included."""
    locks: WantedLocks = ()
    """What the request wants locked."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """A message to be kept as a dead letter, and told where its execution can be named."""

    error: RequestRefused
    delivery: Delivery
    action: str


class Accepted(StrEnum):
    """What became of a message at the door."""

    NEW = "new"
    KNOWN = "known"
    """A duplicate of an unfinished execution: nothing changed."""
    FINISHED = "finished"
    """A duplicate of a finished one: its final notification is told again."""
    TAKEN_AGAIN = "taken-again"
    """It had been handed back, and came to us once more."""
    REFUSED = "refused"
    """A dead letter."""
    CANCELLED = "cancelled"
    """New, and cancelled by somebody before it came."""


@dataclass(frozen=True, slots=True)
class Claimed:
    """An execution moved to RUNNING for us, with its request."""

    execution: Execution
    body: str
    grants: tuple[tuple[str, str, int], ...] = ()
    """Resource, mode and fencing token of each lock that it holds."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """What the worker can start now."""

    total: int
    """Free slots."""
    by_action: Mapping[str, int]
    """Free places of each action that has any."""
    processes: int = 0
    """Free processes, shared by the actions named in `blocking`."""
    blocking: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Applied:
    """What became of an event: the transition, or why the life cycle refused it."""

    transition: Transition | None
    refused: str = ""


class Ledger(Protocol):
    """Custody: what is written here survives; every method returns only after it is on disk.

    A ledger that takes no writes for a while (disk full, locked) is waited for, told once in the log and
    seen in health: these methods then take longer, they do not raise.
    """

    async def accept(self, messages: Sequence[Arrival | Refusal]) -> list[Accepted]:
        """Record requests and refusals with what is told of them, in order."""
        ...

    async def claim(self, capacity: Capacity) -> list[Claimed]:
        """Move queued executions to RUNNING, by priority, then by age, as far as the capacity goes."""
        ...

    async def apply(self, execution_id: str, attempt: int | None, events: Sequence[Event]) -> list[Applied]:
        """Apply events in order to one attempt (None: whichever it is), all in one transaction."""
        ...

    async def outbox(self, after: int, limit: int) -> list[Outgoing]:
        """The next unconfirmed messages in order."""
        ...

    async def confirm(self, ids: Sequence[int]) -> None:
        """Forget messages that the broker has confirmed."""
        ...

    async def queued(self) -> dict[str, int]:
        """The backlog: queued executions of each action that wait for a slot only."""
        ...


def seen(confirmed: asyncio.Future[None]) -> None:
    """Let a publish go whose loss does no harm: nobody waits for its confirmation."""
    confirmed.add_done_callback(lambda done: done.cancelled() or done.exception())


OnOutbox = Callable[[list[Outgoing]], None]
"""Called in the event loop after a commit, with the messages it put into the outbox, in order."""
