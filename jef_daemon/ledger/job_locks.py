"""What this daemon's jobs and workflows asked of the lock service, beside these: asked, told, granted, released.

Every message to the lock service leaves by the outbox of the transaction that causes it: a request with the job
that is recorded, a release with the status that ends it. So neither is ever forgotten, whoever dies when.

A row's `state`, and what its `at` means:

    later       it asks when `at` has come (`notBefore`, or another daemon still has the same execution)
    asked       at `at`; no answer yet
    waiting     it stands in the queue, since `at`
    granted     all is granted; it starts before `at`, or gives the locks back
    held        its attempt runs, since `at`
    lost        the lease ended under a running attempt, or an operator took a lock away
    released    nothing is wanted now; a retry asks anew

Of a workflow, `execution_id` is the name that it holds locks by (`workflow.state.lock_owner`). It needs no slot: what
is granted is held at once. What it lost, it lets go.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from sqlalchemy import Connection, bindparam, insert, select, update

from jef_daemon.events import Interrupted, Retried
from jef_daemon.ledger import schema
from jef_daemon.lifecycle import LOCKING, Execution, Transition
from jef_daemon.lock import wire
from jef_daemon.ports import LockTimes, WantedLocks
from jef_daemon.workflow.state import key_of_owner

_JL = schema.job_locks.c
_MOST = 500
"""Rows that one step looks at."""
_NEW_ATTEMPT = (Retried, Interrupted)

_CHANGING = ("attempt", "number", "locks", "state", "at", "grants", "place")

_INSERT = insert(schema.job_locks)
_SET = (
    update(schema.job_locks)
    .where(_JL.execution_id == bindparam("key"))
    .values({name: bindparam(f"new_{name}") for name in _CHANGING})
)
_DUE = (
    select(schema.job_locks)
    .where(_JL.state == bindparam("wanted"), _JL.at <= bindparam("until"))
    .order_by(_JL.at)
    .limit(_MOST)
)
_NEXT_OF_STATE = (
    select(_JL.execution_id)
    .where(_JL.state == bindparam("wanted"), _JL.execution_id > bindparam("after"))
    .order_by(_JL.execution_id)
    .limit(_MOST)
)


@dataclass(slots=True)
class JobLocks:
    """A row."""

    execution_id: str
    action: str
    attempt: int
    number: int
    """Of the request: it rises with each one that follows a release."""
    locks: str
    state: str
    at: float
    grants: str | None = None
    place: str | None = None

    @property
    def workflow(self) -> str | None:
        """Key of the workflow; None: it is a job's."""
        return key_of_owner(self.execution_id)

    @property
    def wanted(self) -> WantedLocks:
        """Resources and modes."""
        return tuple((resource, mode) for resource, mode in json.loads(self.locks))

    @property
    def correlation_id(self) -> str:
        """By which answers are told apart from those to earlier requests; it rises from one to the next.

        Not the attempt: a release that the broker repeats must not undo what the same attempt asked for after it.
        """
        return f"{self.execution_id}#{self.number:09d}"


class Post(Protocol):
    """Puts a message into the outbox."""

    def __call__(
        self,
        exchange: str,
        routing_key: str,
        body: bytes,
        headers: dict[str, Any] | None = None,
        correlation_id: str | None = None,
        reply_to: str | None = None,
    ) -> None:
        """In order."""
        ...


class LockBook:
    """The rows, inside one transaction.

    Args:
        connection: in the transaction.
        now: UTC seconds since the epoch.
        times: leases.
        queue: of the lock service.
        reply_to: where this daemon hears the answers.
        post: into the outbox.
    """

    def __init__(
        self, connection: Connection, now: float, times: LockTimes, queue: str, reply_to: str, post: Post
    ) -> None:
        self._connection = connection
        self._now = now
        self._times = times
        self._queue = queue
        self._reply_to = reply_to
        self._post = post

    # --- from the jobs' side -----------------------------------------------------------------------------

    def enter(self, wanting: Iterable[tuple[Execution, WantedLocks]]) -> None:
        """New jobs ask, those with a `notBefore` when it has come."""
        new = []
        for execution, locks in wanting:
            row = JobLocks(
                execution.execution_id, execution.action, execution.attempt, 1, json.dumps(locks), "later", 0
            )
            self._ask_or_wait(row, execution.not_before)
            new.append({name: getattr(row, name) for name in JobLocks.__slots__})
        if new:
            self._connection.execute(_INSERT, new)

    def follow(self, moves: Sequence[Transition]) -> None:
        """After transitions of executions that want locks: a new attempt asks anew, an ended one releases."""
        over = {move.execution.execution_id: move for move in moves if _ends_holding(move)}
        found = self.of(list(over))
        for name, row in found.items():
            move = over[name]
            if isinstance(move.event, _NEW_ATTEMPT):
                self._begin_again(row, move.execution)
            else:
                self._let_go(row)
        self.put(found.values())

    def let_go(self, ids: Sequence[str]) -> None:
        """These executions go to another daemon."""
        found = self.of(ids).values()
        for row in found:
            self._let_go(row)
        self.put(found)

    def come_back(self, execution: Execution) -> None:
        """An execution that had gone to another daemon is ours again."""
        for row in self.of([execution.execution_id]).values():
            self._begin_again(row, execution)
            self.put([row])

    def ask_for_workflow(self, owner: str, locks: WantedLocks) -> None:
        """A workflow asks for what it is to hold across its stages, again after a retry."""
        row = self.of([owner]).get(owner)
        if row is not None:
            self._release(row)
            # By other names than before, where it was within another one.
            row.locks, row.place = json.dumps(locks), None
            self.ask(row)
            self.put([row])
            return
        row = JobLocks(owner, "", 1, 1, json.dumps(locks), "later", 0)
        self.ask(row)
        self._connection.execute(_INSERT, [{name: getattr(row, name) for name in JobLocks.__slots__}])

    def start(self, started: Sequence[str]) -> None:
        """Granted executions run now."""
        found = self.of(started).values()
        for row in found:
            row.state, row.at = "held", self._now
        self.put(found)

    # --- from the lock service's side --------------------------------------------------------------------

    def of(self, ids: Sequence[str]) -> dict[str, JobLocks]:
        """Rows by execution."""
        found: dict[str, JobLocks] = {}
        for start in range(0, len(ids), _MOST):
            wanted = _JL.execution_id.in_(ids[start : start + _MOST])
            for row in self._connection.execute(select(schema.job_locks).where(wanted)):
                found[row.execution_id] = JobLocks(*row)
        return found

    def put(self, changed: Iterable[JobLocks]) -> None:
        """Write rows back."""
        values = [
            {"key": row.execution_id} | {f"new_{name}": getattr(row, name) for name in _CHANGING}
            for row in changed
        ]
        if values:
            self._connection.execute(_SET, values)

    def ask(self, row: JobLocks) -> None:
        """Send the request (again); the caller puts the row."""
        row.state, row.at, row.grants = "asked", self._now, None
        lease_s = self._times.start_lease_s if row.workflow is None else self._times.workflow_s
        self._send(row, wire.acquire(row.execution_id, row.wanted, lease_s, self._times.wait_s))

    def lose(self, row: JobLocks) -> None:
        """A workflow lost a lock: it lets go of any others; the caller puts the row."""
        self._let_go(row)

    def give_back(self, row: JobLocks) -> None:
        """Release what is granted, and ask anew behind those who wait; the caller puts the row."""
        self._release(row)
        self.ask(row)

    def due(self, state: str, until: float) -> list[JobLocks]:
        """The first rows of a state whose `at` is not later than an instant."""
        found = self._connection.execute(_DUE, {"wanted": state, "until": until})
        return [JobLocks(*row) for row in found]

    def names(self, state: str, after: str = "") -> list[str]:
        """A page of executions in a state, by id."""
        return list(self._connection.scalars(_NEXT_OF_STATE, {"wanted": state, "after": after}))

    # --- inside ------------------------------------------------------------------------------------------

    def _begin_again(self, row: JobLocks, execution: Execution) -> None:
        self._release(row)
        row.attempt = execution.attempt
        self._ask_or_wait(row, execution.not_before)

    def _let_go(self, row: JobLocks) -> None:
        self._release(row)
        row.state, row.at, row.grants, row.place = "released", self._now, None, None

    def _ask_or_wait(self, row: JobLocks, not_before: float | None) -> None:
        row.grants = row.place = None
        if not_before is not None and not_before > self._now:
            row.state, row.at = "later", not_before
        else:
            self.ask(row)

    def _release(self, row: JobLocks) -> None:
        if row.state not in {"later", "released"}:
            self._send(row, wire.release(row.execution_id))
            row.number += 1

    def _send(self, row: JobLocks, body: bytes) -> None:
        self._post("", self._queue, body, None, row.correlation_id, self._reply_to)


def _ends_holding(move: Transition) -> bool:
    """Whether an attempt's locks, or its place in the queue, end with a transition."""
    return isinstance(move.event, _NEW_ATTEMPT) or (
        move.execution.place not in LOCKING and move.before in LOCKING
    )
