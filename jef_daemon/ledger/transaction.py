"""One transaction: executions are read, moved by events, written; what is told and remembered is gathered.

A `Transaction` lives on the writer's thread for one group commit. Reads happen at once; histories and
outbox messages are gathered and written at the end, in the order in which things happened.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, bindparam, delete, insert, select, update
from sqlalchemy.sql.elements import ColumnElement

from jef_daemon import lifecycle, messages
from jef_daemon.errors import TransitionRefused
from jef_daemon.ledger import rows, schema
from jef_daemon.ledger.job_locks import LockBook
from jef_daemon.lifecycle import FINAL, Event, Execution, Transition
from jef_daemon.lock.requests import Limits
from jef_daemon.names import Names
from jef_daemon.ports import (
    Applied,
    LockTimes,
    Outgoing,
)

_CHUNK = 500
"""Ids per IN list; SQLite takes 32,766 parameters, PostgreSQL plans long lists slowly."""

_EX = schema.executions.c
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
        self.terms = terms
        self._history: list[rows.Row] = []
        self._outcomes: dict[str, bytes] = {}
        self._locking: list[Transition] = []
        """Transitions of executions that want locks."""
        replies = self.names.lock_replies(terms.identity)
        self.locks = LockBook(connection, now, terms.lock_times, self.names.locks, replies, self.post)
        self.next_id = next_id
        self.outbox: list[Outgoing] = []
        """What was put into the outbox, in order."""

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

    # --- keeping house -----------------------------------------------------------------------------------

    def confirm(self, ids: Iterable[int]) -> None:
        """Forget confirmed messages."""
        spans = [{"first": first, "last": last} for first, last in _spans(sorted(ids))]
        if spans:
            self.connection.execute(_DELETE_OUTBOX, spans)

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
            body = messages.notification(move, tracebacks=self.terms.tracebacks)
            execution = move.execution
            is_final = execution.status in FINAL
            if is_final:
                self._outcomes[execution.execution_id] = body
            self.tell(execution, body, execution.reply_to if is_final else None, execution.correlation_id)

    def tell(
        self, execution: Execution, body: bytes, reply_to: str | None, correlation_id: str | None
    ) -> None:
        """Post a notification, also to whoever asked to hear the end."""
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
