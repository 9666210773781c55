"""The life cycle of an execution: seven statuses, one table of transitions. Pure: no I/O, no clock.

Part in the flow: every change of an execution, whoever asks for it, is one of `events`, applied here by `apply`.
The table below is the whole law: what is not in it is refused and changes nothing. The diagram in
`docs/life-cycle.md` is drawn from it, and the ledger writes what `apply` returns, never a status of its own.

What it does not do: decide *when* something happens (intake, worker, watcher do) or how it is told
(`notifications` encodes a `Transition`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from operator import attrgetter
from typing import Any

from jef_daemon.errors import TransitionRefused
from jef_daemon.events import (
    Accepted,
    CancelRequested,
    Completed,
    Event,
    Failed,
    FellSilent,
    GraceEnded,
    Interrupted,
    Launched,
    LockAwaited,
    Progressed,
    Resumed,
    Retried,
    Started,
    Stopped,
)


class Status(StrEnum):
    """The seven statuses that the wire shows. Everything else about an execution is a field."""

    QUEUED = "QUEUED"
    """Handled, recorded, acknowledged; not started. The worker moves it on."""
    WAITING_FOR_LOCK = "WAITING_FOR_LOCK"
    """A lock it asked for is taken. It holds nothing meanwhile. The lock service moves it on."""
    RUNNING = "RUNNING"
    """Its configuration is being processed by the executor, here or outside. The executor moves it on."""
    COMPLETED = "COMPLETED"
    """The executor answered. Final."""
    FAILED = "FAILED"
    """An unhandled exception, or interrupted and not allowed to run again. Only a retry or a cancel moves it."""
    CANCELLED = "CANCELLED"
    """Somebody stopped it: a person, its workflow, the underlying service. Final."""
    TIMED_OUT = "TIMED_OUT"
    """No update before the deadline. Not a failure: a late update may still be taken while it is open."""


class Place(StrEnum):
    """Where an execution stands in the table: its status, with TIMED_OUT's two phases told apart."""

    NEW = "(none)"
    QUEUED = "QUEUED"
    WAITING_FOR_LOCK = "WAITING_FOR_LOCK"
    RUNNING = "RUNNING"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    TIMED_OUT_OPEN = "TIMED_OUT (open)"
    TIMED_OUT_CLOSED = "TIMED_OUT (closed)"


LOCKING = frozenset({Place.QUEUED, Place.WAITING_FOR_LOCK, Place.RUNNING, Place.TIMED_OUT_OPEN})
"""Places in which an execution that wants locks holds them, waits for them or is about to ask."""

WORKING = frozenset({Place.RUNNING, Place.TIMED_OUT_OPEN})
"""Places in which an attempt's work may still be going on."""

FINAL = frozenset({Status.COMPLETED, Status.FAILED, Status.CANCELLED, Status.TIMED_OUT})
"""Statuses after which an attempt does no more work by itself (a late update or a retry may still follow)."""

UNSTARTED = frozenset({Status.QUEUED, Status.WAITING_FOR_LOCK})
"""Statuses of an attempt that has not begun: another daemon may have it."""

SETTLED = frozenset({Status.COMPLETED, Status.CANCELLED})
"""Statuses that nothing can change any more."""


@dataclass(slots=True)
class Execution:
    """One job in the ledger. Times are UTC seconds since the epoch; None means "has not happened".

    Treated as a value: `apply` copies it and never changes the one it was given.
    """

    execution_id: str
    """The producer's identifier, 1 to 128 characters; the idempotency key."""
    action: str
    """The action that runs it: the routing key of its request."""
    workflow_id: str | None = None
    status: Status = Status.QUEUED
    attempt: int = 1
    """Counts from 1; a retry and an interruption that may run again raise it."""
    sequence: int = 0
    """Number of the last notification; rises with each one. 0 before the first."""
    progress: int = 0
    """0 to 100."""
    message: str = ""
    priority: int = 0
    """Higher starts earlier among the queued ones of a daemon."""
    not_before: float | None = None
    """It does not start earlier than this."""
    token: str = ""
    """Secret of this attempt; an update must carry it."""
    external_id: str | None = None
    """The executor's own identifier for the work elsewhere."""
    fenced: bool = False
    """True once the attempt's token is worth nothing any more (TIMED_OUT closed, forced cancel)."""
    cancel_requested: bool = False
    wants_locks: bool = False
    """True when its request names locks: it starts only once they are granted."""
    handed_back: bool = False
    """True when this daemon gave an unstarted job back to RabbitMQ; whoever receives it owns it."""
    update_timeout_s: float | None = None
    """Silence allowed between updates; None: as long as it likes."""
    update_deadline: float | None = None
    execution_timeout_s: float | None = None
    """Limit of one attempt's run; None: none."""
    queued_at: float | None = None
    started_at: float | None = None
    finished_at: float | None = None
    updated_at: float | None = None
    traceparent: str | None = None
    reply_to: str | None = None
    correlation_id: str | None = None
    outside: bool = False
    """True once an async executor has launched this attempt's work: it holds no slot, updates move it on."""
    max_attempts: int = 1
    """Attempts that the action's policy and the request allow; a retry by command may go beyond."""
    timeout_grace_s: float = 300.0
    """How long TIMED_OUT stays open for late updates."""
    queue_timeout_s: float | None = None
    """Longest wait for a slot; None: as long as it takes."""
    lock_timeout_s: float | None = None
    """Longest wait for locks."""
    stage: str | None = None
    """The stage of its workflow that it is a job of: the workflow's coordinator decides what becomes of it."""
    due_at: float | None = None
    """When the clock of its place runs out: the wait for a slot or for locks, the limit of work outside, the grace of
    a time-out. None: it has none there."""

    @property
    def is_backlog(self) -> bool:
        """Whether it counts against the backlog: jobs that wait for a lock or a time would keep ready ones out."""
        return self.not_before is None and not self.wants_locks

    @property
    def place(self) -> Place:
        """The row of the transition table that this execution is in."""
        if self.status is Status.TIMED_OUT:
            return Place.TIMED_OUT_CLOSED if self.fenced else Place.TIMED_OUT_OPEN
        return Place(self.status.value)


@dataclass(frozen=True, slots=True)
class Transition:
    """One applied event: what to write, and what to tell."""

    before: Place
    execution: Execution
    event: Event
    at: float
    late: bool
    """True when it was caused by an update after TIMED_OUT."""
    was: Execution
    """As it was before: a new attempt forgets the times of the one that it follows."""


Change = Callable[[Execution, Any, float], None]
"""How an event changes the copy of an execution; the status itself is set from the table."""


def _queue(execution: Execution, event: Event, now: float) -> None:
    execution.queued_at = now
    execution.message = event.reason
    # Waiting for its time is no wait for a slot, nor for locks.
    execution.due_at = waits_until(execution, max(now, execution.not_before or now))


def _wait(execution: Execution, event: LockAwaited, now: float) -> None:
    execution.message = event.reason or f"waiting for {event.waiting_for.get('resource', 'a lock')}"


def _start(execution: Execution, event: Started, now: float) -> None:
    execution.started_at = now
    execution.message = event.reason
    execution.due_at = None
    _move_deadline(execution, now)


def _report(execution: Execution, event: Progressed, now: float) -> None:
    if event.progress is not None:
        execution.progress = event.progress
    if event.message is not None:
        execution.message = event.message
    execution.external_id = event.external_id or execution.external_id
    _move_deadline(execution, now)


def _launch(execution: Execution, event: Launched, now: float) -> None:
    execution.outside = True
    _go_on(execution)
    if event.message is not None:
        execution.message = event.message
    execution.external_id = event.external_id or execution.external_id
    _move_deadline(execution, now)


def _complete(execution: Execution, event: Completed, now: float) -> None:
    execution.progress = 100
    execution.message = event.result
    execution.external_id = event.external_id or execution.external_id
    _finish(execution, event, now)


def _fail(execution: Execution, event: Failed, now: float) -> None:
    execution.message = (
        f"{event.error_type}: {event.error_message}" if event.error_message else event.error_type
    )
    execution.external_id = event.external_id or execution.external_id
    _finish(execution, event, now)


def _note_cancel(execution: Execution, event: CancelRequested, now: float) -> None:
    execution.cancel_requested = True


def _cancel(execution: Execution, event: Event, now: float) -> None:
    execution.message = event.reason or "cancelled"
    execution.fenced = True
    _finish(execution, event, now)


def _time_out(execution: Execution, event: FellSilent, now: float) -> None:
    execution.message = event.reason or "no update before the deadline"
    _finish(execution, event, now)
    execution.due_at = now + execution.timeout_grace_s


def _close(execution: Execution, event: GraceEnded, now: float) -> None:
    execution.fenced = True
    execution.due_at = None


def _resume(execution: Execution, event: Resumed, now: float) -> None:
    _go_on(execution)
    execution.message = event.reason or "resumed"
    _move_deadline(execution, now)


def _revive(execution: Execution, event: Progressed, now: float) -> None:
    _go_on(execution)
    _report(execution, event, now)


def _new_attempt(execution: Execution, event: Retried | Interrupted, now: float) -> None:
    execution.attempt += 1
    execution.token = event.token
    execution.fenced = execution.cancel_requested = execution.outside = False
    execution.progress = 0
    execution.external_id = execution.started_at = execution.finished_at = execution.update_deadline = None
    execution.not_before = getattr(event, "not_before", None)
    _queue(execution, event, now)


def _go_on(execution: Execution) -> None:
    """The work outside goes on, up to the limit of the attempt; work here has its limit from the worker."""
    execution.finished_at = execution.due_at = None
    limit = execution.execution_timeout_s
    if execution.outside and limit is not None and execution.started_at is not None:
        execution.due_at = execution.started_at + limit


def _finish(execution: Execution, event: Event, now: float) -> None:
    execution.finished_at = now
    execution.update_deadline = execution.due_at = None


def _move_deadline(execution: Execution, now: float) -> None:
    silence = execution.update_timeout_s
    execution.update_deadline = None if silence is None else now + silence


P = Place
TABLE: Mapping[tuple[Place, type[Event]], tuple[Place, Change]] = {
    (P.NEW, Accepted): (P.QUEUED, _queue),
    (P.QUEUED, LockAwaited): (P.WAITING_FOR_LOCK, _wait),
    (P.QUEUED, Started): (P.RUNNING, _start),
    (P.QUEUED, CancelRequested): (P.CANCELLED, _cancel),
    (P.WAITING_FOR_LOCK, LockAwaited): (P.WAITING_FOR_LOCK, _wait),
    (P.WAITING_FOR_LOCK, Started): (P.RUNNING, _start),
    (P.WAITING_FOR_LOCK, CancelRequested): (P.CANCELLED, _cancel),
    (P.RUNNING, Launched): (P.RUNNING, _launch),
    (P.RUNNING, Progressed): (P.RUNNING, _report),
    (P.RUNNING, Completed): (P.COMPLETED, _complete),
    (P.RUNNING, Failed): (P.FAILED, _fail),
    (P.RUNNING, CancelRequested): (P.RUNNING, _note_cancel),
    (P.RUNNING, Stopped): (P.CANCELLED, _cancel),
    (P.RUNNING, FellSilent): (P.TIMED_OUT_OPEN, _time_out),
    (P.RUNNING, Interrupted): (P.QUEUED, _new_attempt),
    (P.TIMED_OUT_OPEN, Launched): (P.RUNNING, _launch),
    (P.TIMED_OUT_OPEN, Progressed): (P.RUNNING, _revive),
    (P.TIMED_OUT_OPEN, Resumed): (P.RUNNING, _resume),
    (P.TIMED_OUT_OPEN, Completed): (P.COMPLETED, _complete),
    (P.TIMED_OUT_OPEN, Failed): (P.FAILED, _fail),
    (P.TIMED_OUT_OPEN, Stopped): (P.CANCELLED, _cancel),
    (P.TIMED_OUT_OPEN, GraceEnded): (P.TIMED_OUT_CLOSED, _close),
    (P.TIMED_OUT_OPEN, Retried): (P.QUEUED, _new_attempt),
    (P.TIMED_OUT_OPEN, CancelRequested): (P.CANCELLED, _cancel),
    (P.TIMED_OUT_CLOSED, Retried): (P.QUEUED, _new_attempt),
    (P.TIMED_OUT_CLOSED, CancelRequested): (P.CANCELLED, _cancel),
    (P.FAILED, Retried): (P.QUEUED, _new_attempt),
    (P.FAILED, CancelRequested): (P.CANCELLED, _cancel),
}
"""(where it stands, what happens) → (where it goes, what changes). The law of `life-cycle.md`, row by row."""

_UNTOLD = frozenset({GraceEnded})
"""Events that change no status and nothing a reader of notifications needs: no notification is sent."""

_EXECUTOR = "executor"
_LATE_FROM = frozenset({Launched, Progressed, Completed, Failed, Stopped})
"""From TIMED_OUT, these are told as late where the work itself says so, by an update after the deadline."""

_FIELDS = attrgetter(*(each.name for each in dataclasses.fields(Execution)))
_STATUS_OF = {place: Status(place.value) for place in Place if place.value in Status.__members__} | {
    Place.TIMED_OUT_OPEN: Status.TIMED_OUT,
    Place.TIMED_OUT_CLOSED: Status.TIMED_OUT,
}


def accept(execution: Execution, now: float) -> Transition:
    """Let a new execution enter the life cycle as QUEUED."""
    return _moved(Place.NEW, execution, Accepted(), now)


def apply(execution: Execution, event: Event, now: float) -> Transition:
    """Apply one event; the given execution stays as it is.

    Args:
        execution: where the job stands.
        event: what happens.
        now: UTC seconds since the epoch.

    Returns:
        The transition with a changed copy, its sequence risen by one where it is told.

    Raises:
        TransitionRefused: the table has no such row; nothing changed.
    """
    return _moved(execution.place, execution, event, now)


def is_told(event: Event) -> bool:
    """Whether an event leads to a status notification."""
    return type(event) not in _UNTOLD


def waits_until(execution: Execution, since: float, *, granted: bool = False) -> float | None:
    """When an unstarted execution has waited too long; None: it waits as long as it takes.

    Args:
        execution: that waits.
        since: the instant at which this wait began.
        granted: it has all its locks, and waits for a slot.
    """
    is_for_locks = execution.wants_locks and not granted
    limit = execution.lock_timeout_s if is_for_locks else execution.queue_timeout_s
    return None if limit is None else since + limit


def _moved(place: Place, execution: Execution, event: Event, now: float) -> Transition:
    row = TABLE.get((place, type(event)))
    if row is None:
        raise TransitionRefused(execution.execution_id, place.value, type(event).__name__)
    goes_to, change = row
    # A copy: `dataclasses.replace` takes six times as long, three times for each job.
    moved = Execution(*_FIELDS(execution))
    moved.status, moved.updated_at = _STATUS_OF[goes_to], now
    change(moved, event, now)
    if is_told(event):
        moved.sequence += 1
    late = place is Place.TIMED_OUT_OPEN and type(event) in _LATE_FROM and event.actor == _EXECUTOR
    return Transition(place, moved, event, now, late, execution)
