"""What happens inside one transaction: many requests, events and claims at once, one write for each kind.

A `Transaction` lives on the writer's thread for one group commit. Reads happen at once; histories and
outbox messages are gathered and written at the end, in the order in which things happened.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic_core import to_json
from sqlalchemy import Connection, bindparam, delete, func, insert, null, select, update
from sqlalchemy.sql.elements import ColumnElement

from jef_daemon import lifecycle, messages
from jef_daemon.errors import TransitionRefused
from jef_daemon.ledger import rows, schema
from jef_daemon.ledger.hearing import Hearing
from jef_daemon.ledger.job_locks import LockBook
from jef_daemon.ledger.lock_store import LockStore
from jef_daemon.lifecycle import FINAL, UNSTARTED, Event, Execution, Started, Status, Transition
from jef_daemon.lock import protocol, wire
from jef_daemon.lock.requests import Limits, Reply, Request
from jef_daemon.names import Names
from jef_daemon.ports import (
    Accepted,
    Applied,
    Arrival,
    Capacity,
    Claimed,
    Heard,
    LockTimes,
    Lost,
    Outgoing,
    Refusal,
)

_CHUNK = 500
"""Ids per IN list; SQLite takes 32,766 parameters, PostgreSQL plans long lists slowly."""

_HEADER_BYTES = 64 * 1024
"""Of a refused message's own headers; all headers go into one frame, of 128 KiB by default."""
_LARGEST_FLOAT = 3.4e38

_EX, _JL = schema.executions.c, schema.job_locks.c
_INSERT_EXECUTION = insert(schema.executions)
_INSERT_REQUEST = insert(schema.requests)
_INSERT_HISTORY = insert(schema.history)
_INSERT_OUTBOX = insert(schema.outbox)
_UPDATE = (
    update(schema.executions)
    .where(_EX.execution_id == bindparam("key"))
    .values({name: bindparam(name) for name in rows.FIELDS if name not in rows.FIXED})
)
_DELETE_OUTCOMES = delete(schema.outcomes).where(schema.outcomes.c.execution_id == bindparam("key"))
_INSERT_OUTCOME = insert(schema.outcomes)
_DELETE_OUTBOX = delete(schema.outbox).where(
    schema.outbox.c.id.between(bindparam("first"), bindparam("last"))
)

_READY = (_EX.status == "QUEUED") & _EX.handed_back.is_(False) & _EX.wants_locks.is_(False)
_IS_DUE = _EX.not_before.is_(None) | (_EX.not_before <= bindparam("now"))
_CLAIMABLE = (
    select(*rows.COLUMNS, schema.requests.c.body, _EX.number, null().label("grants"))
    .join(schema.requests, schema.requests.c.execution_id == _EX.execution_id)
    .where(_READY, _EX.action == bindparam("wanted"), _IS_DUE)
    .order_by(_EX.priority.desc(), _EX.number)
    .limit(bindparam("most"))
    .with_for_update(skip_locked=True, of=schema.executions)
)
_GRANTED_ACTIONS = select(_JL.action).where(_JL.state == "granted").distinct()
_GRANTED = (
    select(*rows.COLUMNS, schema.requests.c.body, _EX.number, _JL.grants)
    .join_from(schema.job_locks, schema.executions, _JL.execution_id == _EX.execution_id)
    .join(schema.requests, schema.requests.c.execution_id == _EX.execution_id)
    .where(_JL.state == "granted", _JL.action == bindparam("wanted"), _JL.at > bindparam("now"))
    .where(_EX.status.in_([status.value for status in UNSTARTED]), _EX.handed_back.is_(False))
    .order_by(_EX.priority.desc(), _EX.number)
    .limit(bindparam("most"))
)
_BACKLOG = select(_EX.action, func.count()).where(_READY, _EX.not_before.is_(None)).group_by(_EX.action)


@dataclass(frozen=True, slots=True)
class Terms:
    """What is the same for all transactions of a ledger."""

    names: Names = field(default_factory=Names)
    """Exchanges and queues to tell things to."""
    tracebacks: bool = True
    """Whether FAILED notifications carry the stack trace."""
    identity: str = ""
    """The ledger's own name."""
    lock_times: LockTimes = field(default_factory=LockTimes)
    lock_limits: Limits = field(default_factory=Limits)


class Transaction:
    """The work of one group commit, on one connection.

    Args:
        connection: inside a transaction that the caller commits or rolls back.
        terms: what is the same for all of them.
        now: UTC seconds since the epoch.
        next_id: the outbox's next number.
    """

    def __init__(self, connection: Connection, terms: Terms, now: float, next_id: int) -> None:
        self.connection = connection
        self.now = now
        self.names = terms.names
        self._terms = terms
        self._history: list[rows.Row] = []
        self._outcomes: dict[str, bytes] = {}
        self._locking: list[Transition] = []
        """Transitions of executions that want locks."""
        self._times = terms.lock_times
        replies = self.names.lock_replies(terms.identity)
        self.locks = LockBook(connection, now, terms.lock_times, self.names.locks, replies, self.post)
        self.next_id = next_id
        self.outbox: list[Outgoing] = []
        """What was put into the outbox, in order."""

    # --- the door ----------------------------------------------------------------------------------------

    def accept(self, arrivals: Sequence[Arrival | Refusal]) -> list[Accepted]:
        """Record requests and refusals; see `ports.Ledger.accept`."""
        known = self.known(_ids(arrivals))
        new: dict[str, Arrival] = {}
        words = []
        for arrival in arrivals:
            if isinstance(arrival, Refusal):
                self._refuse(arrival, known)
                words.append(Accepted.REFUSED)
                continue
            execution_id = arrival.execution.execution_id
            if execution_id in known:
                words.append(self._again(arrival, known[execution_id]))
            elif execution_id in new:
                words.append(Accepted.KNOWN)
            else:
                new[execution_id] = arrival
                words.append(Accepted.NEW)
        self._record(list(new.values()))
        return words

    def _record(self, arrivals: list[Arrival]) -> None:
        if not arrivals:
            return
        moves = [lifecycle.accept(arrival.execution, self.now) for arrival in arrivals]
        self.connection.execute(_INSERT_EXECUTION, [rows.row_of(move.execution) for move in moves])
        self.connection.execute(
            _INSERT_REQUEST,
            [{"execution_id": a.execution.execution_id, "body": a.body} for a in arrivals],
        )
        for move in moves:
            self.note(move)
        self.locks.enter((a.execution, a.locks) for a in arrivals if a.execution.wants_locks)

    def _again(self, arrival: Arrival, execution: Execution) -> Accepted:
        """A redelivery or a duplicate: nothing runs twice for it."""
        if execution.handed_back and execution.status in UNSTARTED:
            execution.handed_back = False
            execution.sequence = max(execution.sequence, arrival.execution.sequence)
            self.update([execution])
            if execution.wants_locks:
                self.locks.come_back(execution)
            return Accepted.TAKEN_AGAIN
        if execution.status not in FINAL:
            return Accepted.KNOWN
        told = self.connection.scalar(
            select(schema.outcomes.c.notification).where(
                schema.outcomes.c.execution_id == execution.execution_id
            )
        )
        if told is not None:
            # The stored words go to whoever asks now; the sequence number tells others they saw them.
            self._tell(execution, told, arrival.execution.reply_to, arrival.execution.correlation_id)
        return Accepted.FINISHED

    def _refuse(self, refusal: Refusal, known: dict[str, Execution]) -> None:
        error, delivery = refusal.error, refusal.delivery
        headers = _plain(delivery.headers) | {
            "x-jef-reason": error.code,
            "x-jef-detail": error.detail[:1000],
            "x-jef-routing-key": delivery.routing_key,
        }
        self.post(
            self.names.dead,
            delivery.routing_key,
            delivery.body,
            headers,
            delivery.correlation_id,
            delivery.reply_to,
        )
        if error.execution_id and error.execution_id not in known:
            body = messages.refused_notification(refusal.action, error, self.now)
            self.post(self.names.status, messages.routing_key(refusal.action, Status.FAILED), body)

    # --- events ------------------------------------------------------------------------------------------

    def apply(self, requests: Sequence[tuple[str, int | None, Sequence[Event]]]) -> list[list[Applied]]:
        """Apply events to executions, in order; see `ports.Ledger.apply`."""
        current = self.known({execution_id for execution_id, _, _ in requests})
        changed: dict[str, Execution] = {}
        answers = []
        for execution_id, attempt, events in requests:
            answer = []
            for event in events:
                execution = current.get(execution_id)
                applied = self._apply_one(execution_id, execution, attempt, event)
                answer.append(applied)
                if applied.transition:
                    current[execution_id] = changed[execution_id] = applied.transition.execution
            answers.append(answer)
        if changed:
            self.update(changed.values())
        return answers

    def _apply_one(
        self, execution_id: str, execution: Execution | None, attempt: int | None, event: Event
    ) -> Applied:
        if execution is None:
            return Applied(None, f"no execution {execution_id} is known")
        try:
            if attempt is not None and attempt != execution.attempt:
                raise TransitionRefused(execution_id, f"at attempt {execution.attempt}", type(event).__name__)
            move = lifecycle.apply(execution, event, self.now)
        except TransitionRefused as refused:
            self._history.append(rows.refusal_entry(execution, event, str(refused), self.now))
            return Applied(None, str(refused))
        self.note(move)
        return Applied(move)

    def claim(self, capacity: Capacity) -> list[Claimed]:
        """Move queued executions to RUNNING; see `ports.Ledger.claim`."""
        candidates = self._granted(capacity)
        for wanted, places in capacity.by_action.items():
            most = min(places, capacity.total)
            if wanted in capacity.blocking:
                most = min(most, capacity.processes)
            if most > 0:
                found = {"wanted": wanted, "most": most, "now": self.now}
                candidates += self.connection.execute(_CLAIMABLE, found).all()
        # Granted ones first: others wait for the locks that they hold.
        candidates.sort(key=lambda row: (row.grants is None, -row.priority, row.number))
        claimed = [self._start(row) for row in _fitting(candidates, capacity)]
        if claimed:
            self.update(job.execution for job in claimed)
            self.locks.start([job.execution.execution_id for job in claimed if job.grants])
        return claimed

    def _granted(self, capacity: Capacity) -> list[Any]:
        """Jobs that have their locks and wait for a slot, of the actions that have one."""
        actions = self.connection.scalars(_GRANTED_ACTIONS).all()
        found: list[Any] = []
        for wanted in actions:
            if places := capacity.by_action.get(wanted, 0):
                terms = {"wanted": wanted, "most": min(places, capacity.total), "now": self.now}
                found += self.connection.execute(_GRANTED, terms).all()
        return found

    def _start(self, row: Any) -> Claimed:
        move = lifecycle.apply(rows.execution_of(row), Started(), self.now)
        self.note(move)
        grants = tuple((resource, mode, number) for resource, mode, number in json.loads(row.grants or "[]"))
        return Claimed(move.execution, row.body, grants)

    # --- locks -------------------------------------------------------------------------------------------

    @property
    def lock_store(self) -> LockStore:
        """The lock service's store."""
        return LockStore(self.connection, self.now, self._terms.lock_limits)

    def decide(self, requests: Sequence[Request]) -> set[str]:
        """The lock service's part: decide requests, post the answers; returns resources whose queue moved."""
        store = self.lock_store
        self._answer(store.run(requests))
        return store.touched

    def tell_places(self, resources: Iterable[str], listeners: str, most: int) -> None:
        """Tell the first waiters of resources where they stand, those who listen for it."""
        store = self.lock_store
        for resource in resources:
            told = protocol.places(store, resource, most)
            self._answer(reply for reply in told if (reply.reply_to or "").startswith(listeners))

    def _answer(self, replies: Iterable[Reply]) -> None:
        for reply in replies:
            if reply.reply_to:
                self.post("", reply.reply_to, wire.encode(reply), None, reply.correlation_id)

    def hear(self, heard: Sequence[Heard]) -> list[Lost]:
        """The daemon's part: take the service's answers in; returns running attempts that lost their locks."""
        return Hearing(self.locks, self, self.now, self._times).take(heard)

    def go_on_locking(self, answered_up_to: float) -> int:
        """Ask what has become due, ask again what was not heard, give back what was not used.

        Args:
            answered_up_to: requests of earlier than this were answered, or are lost.

        Returns:
            How many jobs gave their locks back.
        """
        asking = [*self.locks.due("later", self.now), *self.locks.due("asked", answered_up_to)]
        for row in asking:
            self.locks.ask(row)
        self.locks.put(asking)
        unused = self.locks.due("granted", self.now)
        Hearing(self.locks, self, self.now, self._times).give_back(unused)
        return len(unused)

    # --- keeping house -----------------------------------------------------------------------------------

    def confirm(self, ids: Iterable[int]) -> None:
        """Forget confirmed messages."""
        spans = [{"first": first, "last": last} for first, last in _spans(sorted(ids))]
        if spans:
            self.connection.execute(_DELETE_OUTBOX, spans)

    def queued(self) -> dict[str, int]:
        """The backlog: queued executions of each action that wait for a slot only."""
        return {row[0]: row[1] for row in self.connection.execute(_BACKLOG)}

    def finish(self) -> None:
        """Write what was gathered; call last, before the commit."""
        self.locks.follow(self._locking)
        if self._history:
            self.connection.execute(_INSERT_HISTORY, self._history)
        if self._outcomes:
            self.connection.execute(_DELETE_OUTCOMES, [{"key": key} for key in self._outcomes])
            stored = [{"execution_id": key, "notification": body} for key, body in self._outcomes.items()]
            self.connection.execute(_INSERT_OUTCOME, stored)
        if self.outbox:
            self.connection.execute(_INSERT_OUTBOX, [rows.outbox_row(message) for message in self.outbox])

    # --- shared ------------------------------------------------------------------------------------------

    def known(self, ids: Iterable[str]) -> dict[str, Execution]:
        """Executions by id, as they are now."""
        found: dict[str, Execution] = {}
        wanted = list(ids)
        for start in range(0, len(wanted), _CHUNK):
            is_wanted: ColumnElement[bool] = _EX.execution_id.in_(wanted[start : start + _CHUNK])
            for row in self.connection.execute(select(*rows.COLUMNS).where(is_wanted)):
                execution = rows.execution_of(row)
                found[execution.execution_id] = execution
        return found

    def update(self, changed: Iterable[Execution]) -> None:
        """Write executions back."""
        self.connection.execute(_UPDATE, [rows.changes_of(execution) for execution in changed])

    def remember(self, entry: rows.Row) -> None:
        """Add a line to a history."""
        self._history.append(entry)

    def note(self, move: Transition) -> None:
        """History and notification of a transition: the same transaction as the status itself."""
        entry = rows.entry_of(move)
        if entry:
            self._history.append(entry)
        if move.execution.wants_locks:
            self._locking.append(move)
        if lifecycle.is_told(move.event):
            body = messages.notification(move, tracebacks=self._terms.tracebacks)
            execution = move.execution
            is_final = execution.status in FINAL
            if is_final:
                self._outcomes[execution.execution_id] = body
            self._tell(execution, body, execution.reply_to if is_final else None, execution.correlation_id)

    def _tell(
        self, execution: Execution, body: bytes, reply_to: str | None, correlation_id: str | None
    ) -> None:
        key = messages.routing_key(execution.action, execution.status)
        headers = {"traceparent": execution.traceparent} if execution.traceparent else None
        self.post(self.names.status, key, body, headers)
        if reply_to:
            self.post("", reply_to, body, headers, correlation_id)

    def post(
        self,
        exchange: str,
        routing_key: str,
        body: bytes,
        headers: dict[str, Any] | None = None,
        correlation_id: str | None = None,
        reply_to: str | None = None,
    ) -> None:
        """Put a message into the outbox."""
        self.outbox.append(
            Outgoing(self.next_id, exchange, routing_key, body, headers, correlation_id, reply_to)
        )
        self.next_id += 1


def _ids(arrivals: Sequence[Arrival | Refusal]) -> set[str]:
    named = (
        arrival.error.execution_id if isinstance(arrival, Refusal) else arrival.execution.execution_id
        for arrival in arrivals
    )
    return {name for name in named if name}


def _fitting(candidates: list[Any], capacity: Capacity) -> Iterable[Any]:
    """Those candidates, best first, that together fit slots and processes."""
    slots, processes = capacity.total, capacity.processes
    for row in candidates:
        is_blocking = row.action in capacity.blocking
        if slots <= 0:
            return
        if is_blocking and processes <= 0:
            continue
        slots -= 1
        processes -= is_blocking
        yield row


def _spans(ids: Sequence[int]) -> Iterable[tuple[int, int]]:
    """Runs of consecutive numbers: confirming a thousand messages is one or two deletions."""
    first = last = None
    for number in ids:
        if first is not None and number == (last or 0) + 1:
            last = number
            continue
        if first is not None and last is not None:
            yield first, last
        first = last = number
    if first is not None and last is not None:
        yield first, last


def _plain(headers: Mapping[str, Any]) -> dict[str, Any]:
    """Those headers that survive being kept as JSON and sent again, beside ours, in one frame."""
    kept: dict[str, Any] = {}
    room = _HEADER_BYTES
    for key, value in headers.items():
        size = len(key.encode()) + _size(value)
        if _is_plain(value) and size <= room:
            kept[key] = value
            room -= size
    return kept


def _size(value: object) -> int:
    try:
        return len(to_json(value))
    except ValueError:
        return _HEADER_BYTES + 1


def _is_plain(value: object) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_plain(each) for key, each in value.items())
    if isinstance(value, list):
        return all(_is_plain(each) for each in value)
    if isinstance(value, int):
        return -(2**63) <= value < 2**63
    if isinstance(value, float):  # sent in single precision
        return abs(value) <= _LARGEST_FLOAT
    return value is None or isinstance(value, str)
