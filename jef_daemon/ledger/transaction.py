"""What happens inside one transaction: many requests, events and claims at once, one write for each kind.

A `Transaction` lives on the writer's thread for one group commit. Reads happen at once; histories and
outbox messages are gathered and written at the end, in the order in which things happened.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from pydantic_core import to_json
from sqlalchemy import Connection, bindparam, delete, func, insert, select, update
from sqlalchemy.sql.elements import ColumnElement

from jef_daemon import lifecycle, messages
from jef_daemon.errors import TransitionRefused
from jef_daemon.ledger import rows, schema
from jef_daemon.lifecycle import FINAL, Event, Execution, Failed, Interrupted, Started, Status, Transition
from jef_daemon.names import Names
from jef_daemon.ports import Accepted, Applied, Arrival, Capacity, Claimed, Outgoing, Refusal
from jef_daemon.tokens import new_token

_CHUNK = 500
"""Ids per IN list; SQLite takes 32,766 parameters, PostgreSQL plans long lists slowly."""

_EX = schema.executions.c
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
    select(*rows.COLUMNS, schema.requests.c.body, _EX.number)
    .join(schema.requests, schema.requests.c.execution_id == _EX.execution_id)
    .where(_READY, _EX.action == bindparam("wanted"), _IS_DUE)
    .order_by(_EX.priority.desc(), _EX.number)
    .limit(bindparam("most"))
    .with_for_update(skip_locked=True, of=schema.executions)
)
_BACKLOG = select(_EX.action, func.count()).where(_READY, _EX.not_before.is_(None)).group_by(_EX.action)

MayRunAgain = Callable[[str], bool]
"""Whether an interrupted attempt of an action may simply be run again."""


class Transaction:
    """The work of one group commit, on one connection.

    Args:
        connection: inside a transaction that the caller commits or rolls back.
        names: exchanges to tell things to.
        now: UTC seconds since the epoch.
        next_id: the outbox's next number.
        tracebacks: whether FAILED notifications carry the stack trace.
    """

    def __init__(
        self, connection: Connection, names: Names, now: float, next_id: int, *, tracebacks: bool = True
    ) -> None:
        self._connection = connection
        self._names = names
        self._now = now
        self._tracebacks = tracebacks
        self._history: list[rows.Row] = []
        self._outcomes: dict[str, bytes] = {}
        self.next_id = next_id
        self.outbox: list[Outgoing] = []
        """What was put into the outbox, in order."""

    # --- the door ----------------------------------------------------------------------------------------

    def accept(self, arrivals: Sequence[Arrival | Refusal]) -> list[Accepted]:
        """Record requests and refusals; see `ports.Ledger.accept`."""
        known = self._known(_ids(arrivals))
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
        moves = [lifecycle.accept(arrival.execution, self._now) for arrival in arrivals]
        self._connection.execute(_INSERT_EXECUTION, [rows.row_of(move.execution) for move in moves])
        self._connection.execute(
            _INSERT_REQUEST,
            [{"execution_id": a.execution.execution_id, "body": a.body} for a in arrivals],
        )
        for move in moves:
            self._note(move)

    def _again(self, arrival: Arrival, execution: Execution) -> Accepted:
        """A redelivery or a duplicate: nothing runs twice for it."""
        if execution.handed_back and execution.status is Status.QUEUED:
            execution.handed_back = False
            execution.sequence = max(execution.sequence, arrival.execution.sequence)
            self._connection.execute(_UPDATE, [rows.changes_of(execution)])
            return Accepted.TAKEN_AGAIN
        if execution.status not in FINAL:
            return Accepted.KNOWN
        told = self._connection.scalar(
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
        headers = {key: value for key, value in delivery.headers.items() if _is_plain(value)} | {
            "x-jef-reason": error.code,
            "x-jef-detail": error.detail[:1000],
            "x-jef-routing-key": delivery.routing_key,
        }
        self._post(
            self._names.dead,
            delivery.routing_key,
            delivery.body,
            headers,
            delivery.correlation_id,
            delivery.reply_to,
        )
        if error.execution_id and error.execution_id not in known:
            body = messages.refused_notification(refusal.action, error, self._now)
            self._post(self._names.status, messages.routing_key(refusal.action, Status.FAILED), body)

    # --- events ------------------------------------------------------------------------------------------

    def apply(self, requests: Sequence[tuple[str, int | None, Sequence[Event]]]) -> list[list[Applied]]:
        """Apply events to executions, in order; see `ports.Ledger.apply`."""
        current = self._known({execution_id for execution_id, _, _ in requests})
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
            self._connection.execute(_UPDATE, [rows.changes_of(execution) for execution in changed.values()])
        return answers

    def _apply_one(
        self, execution_id: str, execution: Execution | None, attempt: int | None, event: Event
    ) -> Applied:
        if execution is None:
            return Applied(None, f"no execution {execution_id} is known")
        try:
            if attempt is not None and attempt != execution.attempt:
                raise TransitionRefused(execution_id, f"at attempt {execution.attempt}", type(event).__name__)
            move = lifecycle.apply(execution, event, self._now)
        except TransitionRefused as refused:
            self._history.append(rows.refusal_entry(execution, event, str(refused), self._now))
            return Applied(None, str(refused))
        self._note(move)
        return Applied(move)

    def claim(self, capacity: Capacity) -> list[Claimed]:
        """Move queued executions to RUNNING; see `ports.Ledger.claim`."""
        candidates: list[Any] = []
        for wanted, places in capacity.by_action.items():
            most = min(places, capacity.total)
            if wanted in capacity.blocking:
                most = min(most, capacity.processes)
            if most > 0:
                found = {"wanted": wanted, "most": most, "now": self._now}
                candidates += self._connection.execute(_CLAIMABLE, found).all()
        candidates.sort(key=lambda row: (-row.priority, row.number))
        claimed = [self._start(row) for row in _fitting(candidates, capacity)]
        if claimed:
            self._connection.execute(_UPDATE, [rows.changes_of(job.execution) for job in claimed])
        return claimed

    def _start(self, row: Any) -> Claimed:
        move = lifecycle.apply(rows.execution_of(row), Started(), self._now)
        self._note(move)
        return Claimed(move.execution, row.body)

    # --- start and end of a daemon -----------------------------------------------------------------------

    def interrupt(self, may_run_again: MayRunAgain, why: str, most: int = _CHUNK) -> int:
        """Settle executions that were RUNNING when their daemon went. Returns how many; call until 0."""
        found = self._connection.execute(
            select(*rows.COLUMNS).where(_EX.status == "RUNNING").order_by(_EX.number).limit(most)
        )
        moves = [
            lifecycle.apply(execution, _interruption(execution, may_run_again, why), self._now)
            for execution in map(rows.execution_of, found)
        ]
        if moves:
            self._connection.execute(_UPDATE, [rows.changes_of(move.execution) for move in moves])
        for move in moves:
            self._note(move)
        return len(moves)

    def hand_back(self, most: int = _CHUNK) -> int:
        """Give unstarted jobs back to RabbitMQ, in order. Returns how many; call until 0."""
        found = self._connection.execute(
            select(*rows.COLUMNS, schema.requests.c.body)
            .join(schema.requests, schema.requests.c.execution_id == _EX.execution_id)
            .where(_EX.status == "QUEUED", _EX.handed_back.is_(False))
            .order_by(_EX.priority.desc(), _EX.number)
            .limit(most)
        ).all()
        given = []
        for row in found:
            execution = rows.execution_of(row)
            execution.handed_back = True
            given.append(rows.changes_of(execution))
            self._return(execution, row.body)
        if given:
            self._connection.execute(_UPDATE, given)
        return len(given)

    def _return(self, execution: Execution, body: str) -> None:
        # Whoever takes it goes on counting where we stop, so that its notifications are not taken for old ones.
        headers = {"x-jef-sequence": execution.sequence, "x-jef-attempt": execution.attempt}
        if execution.traceparent:
            headers["traceparent"] = execution.traceparent  # type: ignore[assignment]
        self._post(
            self._names.jobs,
            execution.action,
            body.encode(),
            headers,
            execution.correlation_id,
            execution.reply_to,
        )

    # --- keeping house -----------------------------------------------------------------------------------

    def confirm(self, ids: Iterable[int]) -> None:
        """Forget confirmed messages."""
        spans = [{"first": first, "last": last} for first, last in _spans(sorted(ids))]
        if spans:
            self._connection.execute(_DELETE_OUTBOX, spans)

    def purge(self, before: float, most: int) -> int:
        """Delete executions that finished (or were handed back) before an instant. Returns how many."""
        finished = _EX.status.in_([status.value for status in FINAL])
        given_back = _EX.handed_back.is_(True) & (_EX.status == "QUEUED")
        old = (finished & (_EX.finished_at < before)) | (given_back & (_EX.updated_at < before))
        ids = self._connection.scalars(select(_EX.execution_id).where(old).limit(most)).all()
        for table in (schema.requests, schema.outcomes, schema.history, schema.executions):
            if ids:
                self._connection.execute(delete(table).where(table.c.execution_id.in_(ids)))
        return len(ids)

    def queued(self) -> dict[str, int]:
        """The backlog: queued executions of each action that wait for a slot only."""
        return {row[0]: row[1] for row in self._connection.execute(_BACKLOG)}

    def finish(self) -> None:
        """Write what was gathered; call last, before the commit."""
        if self._history:
            self._connection.execute(_INSERT_HISTORY, self._history)
        if self._outcomes:
            self._connection.execute(_DELETE_OUTCOMES, [{"key": key} for key in self._outcomes])
            stored = [{"execution_id": key, "notification": body} for key, body in self._outcomes.items()]
            self._connection.execute(_INSERT_OUTCOME, stored)
        if self.outbox:
            self._connection.execute(_INSERT_OUTBOX, [rows.outbox_row(message) for message in self.outbox])

    # --- shared ------------------------------------------------------------------------------------------

    def _known(self, ids: Iterable[str]) -> dict[str, Execution]:
        found: dict[str, Execution] = {}
        wanted = list(ids)
        for start in range(0, len(wanted), _CHUNK):
            is_wanted: ColumnElement[bool] = _EX.execution_id.in_(wanted[start : start + _CHUNK])
            for row in self._connection.execute(select(*rows.COLUMNS).where(is_wanted)):
                execution = rows.execution_of(row)
                found[execution.execution_id] = execution
        return found

    def _note(self, move: Transition) -> None:
        """History and notification of a transition: the same transaction as the status itself."""
        entry = rows.entry_of(move)
        if entry:
            self._history.append(entry)
        if lifecycle.is_told(move.event):
            body = messages.notification(move, tracebacks=self._tracebacks)
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
        self._post(self._names.status, key, body, headers)
        if reply_to:
            self._post("", reply_to, body, headers, correlation_id)

    def _post(
        self,
        exchange: str,
        routing_key: str,
        body: bytes,
        headers: dict[str, Any] | None = None,
        correlation_id: str | None = None,
        reply_to: str | None = None,
    ) -> None:
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


def _interruption(execution: Execution, may_run_again: MayRunAgain, why: str) -> Event:
    if may_run_again(execution.action) and not execution.cancel_requested:
        return Interrupted(token=new_token(), reason=why)
    return Failed(actor="daemon", error_type="Interrupted", error_message=why)


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


def _is_plain(value: object) -> bool:
    """Whether a header survives being kept as JSON."""
    if isinstance(value, bytes | bytearray):
        return False
    try:
        return bool(json.loads(to_json(value)) == value)
    except ValueError:
        return False
