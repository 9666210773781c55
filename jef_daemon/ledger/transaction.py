"""One transaction: executions are read, moved by events, written; what is told and remembered is gathered.

A `Transaction` lives on the writer's thread for one group commit. Reads happen at once; histories and
outbox messages are gathered and written at the end, in the order in which things happened.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import Connection, bindparam, delete, insert, update

from jef_daemon import lifecycle, notifications
from jef_daemon.commits import Counted, Tally
from jef_daemon.errors import TransitionRefused
from jef_daemon.events import Event, Failed, GraceEnded, Interrupted, Launched, Progressed, Retried, Stopped
from jef_daemon.ledger import rows, schema
from jef_daemon.ledger.driver import ByKey, Driver
from jef_daemon.ledger.job_locks import LockBook
from jef_daemon.ledger.refusals import Refusals
from jef_daemon.ledger.terms import NO_POLICY, Policy, Terms
from jef_daemon.lifecycle import FINAL, SETTLED, WORKING, Execution, Transition
from jef_daemon.names import WATCHED
from jef_daemon.ports import Applied, Outgoing
from jef_daemon.retry import INTERRUPTED
from jef_daemon.tokens import new_token
from jef_daemon.traceparent import carried

_EX = schema.executions.c
# Lists of ids no longer than that: SQLite takes 32,766 parameters, PostgreSQL plans long lists slowly.
_BY_ID = ByKey(rows.COLUMNS, _EX.execution_id, (1, 8, 64, 500))
_INSERT_HISTORY = insert(schema.history)
_INSERT_OUTBOX = insert(schema.outbox)
_UPDATE = (
    update(schema.executions)
    .where(_EX.execution_id == bindparam("key"))
    .values({name: bindparam(name) for name in rows.FIELDS if name not in rows.FIXED})
)
_REARM = (
    update(schema.executions)
    .where(_EX.execution_id == bindparam("key"))
    .values(due_at=bindparam("at"), updated_at=bindparam("now"))
)
_DELETE_OUTCOMES = delete(schema.outcomes).where(schema.outcomes.c.execution_id == bindparam("key"))
_INSERT_OUTCOME = insert(schema.outcomes)
_DELETE_OUTBOX = delete(schema.outbox).where(
    schema.outbox.c.id.between(bindparam("first"), bindparam("last"))
)


_INSERT_CALL = insert(schema.calls)
_DELETE_CALL = delete(schema.calls).where(
    schema.calls.c.execution_id == bindparam("key"), schema.calls.c.call == bindparam("which")
)
_DELETE_CALLS = delete(schema.calls).where(
    schema.calls.c.execution_id == bindparam("key"), schema.calls.c.call != "cancel"
)
"""A cancel is called though the attempt has ended: what runs outside does not know it. The call knows which it was."""
_DELETE_CHECKPOINT = delete(schema.checkpoints).where(schema.checkpoints.c.execution_id == bindparam("key"))

FIRST_POLL_S = 1.0
"""Between a launch and the first poll."""


class Transaction:
    """The work of one group commit, on one connection.

    Args:
        connection: inside a transaction that the caller commits or rolls back.
        terms: what is the same for all of them.
        now: UTC seconds since the epoch.
        next_id: the outbox's next number.
        tally: where is counted what is no transition; None: nobody wants to know.
    """

    def __init__(
        self, connection: Connection, terms: Terms, now: float, next_id: int, tally: Tally | None = None
    ) -> None:
        self._tally = tally
        self.connection = connection
        self.driver = Driver(connection)
        self.now = now
        self.names = terms.names
        self.terms = terms
        self._history: list[rows.Row] = []
        self.refusals = Refusals(connection, now, self.remember)
        """What changed nothing."""
        self._outcomes: dict[str, bytes] = {}
        self._locking: list[Transition] = []
        """Transitions of executions that want locks."""
        self._uncalled: list[str] = []
        """Executions whose async calls are not due any more."""
        self._settled: list[str] = []
        replies = self.names.lock_replies(terms.identity)
        self.locks = LockBook(connection, now, terms.lock_times, self.names.locks, replies, self.post)
        self.moves: list[Transition] = []
        """What was applied, in order."""
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
                if execution is None:
                    answer.append(Applied(None, f"no execution {execution_id} is known"))
                    continue
                applied = self.move(execution, attempt, event)
                answer.append(applied)
                if applied.transition:
                    current[execution_id] = changed[execution_id] = applied.transition.execution
            answers.append(answer)
        if changed:
            self.update(changed.values())
        return answers

    def move(self, execution: Execution, attempt: int | None, event: Event) -> Applied:
        """Apply one event; the caller writes the execution back. A refused one is remembered.

        A failure that is retried is two transitions, and the answer tells the second: QUEUED again.
        """
        event = _as_wished(execution, event)
        try:
            if attempt is not None and attempt != execution.attempt:
                self.count(Counted.FENCED, "progress" if isinstance(event, Progressed) else "outcome")
                raise TransitionRefused(
                    execution.execution_id, f"at attempt {execution.attempt}", type(event).__name__
                )
            move = lifecycle.apply(execution, event, self.now)
        except TransitionRefused as refused:
            self.refusals.note(execution, event, str(refused))
            return Applied(None, str(refused))
        retry = self._retry(move)
        self.note(move, is_last=retry is None)
        if retry is not None:
            if isinstance(event, GraceEnded):
                self.give_up(execution)  # silent, not ended: it may still go on beside the new attempt
            move = lifecycle.apply(move.execution, retry, self.now)
            self.note(move)
        return Applied(move)

    def _retry(self, move: Transition) -> Retried | None:
        """What the action's policy makes of a failure, or of the end of a time-out's grace."""
        event, execution = move.event, move.execution
        if not isinstance(event, Failed | GraceEnded):
            return None
        policy = self.policy(execution.action).retry
        if isinstance(event, Failed):
            wanted, why = policy.retries(execution, event), f"after {event.error_type}"
        else:
            wanted, why = policy.on_timeout and policy.has_more(execution), "after no update came"
        if not wanted:
            return None
        delay = policy.delay_s(execution.attempt)
        reason = f"attempt {execution.attempt + 1} of {execution.max_attempts} {why}, in {delay:.1f} s"
        return Retried(token=new_token(), not_before=self.now + delay, reason=reason, actor="policy")

    def policy(self, action: str) -> Policy:
        """What is known of an action; one that is not served has no retry and no hooks."""
        return self.terms.policies.get(action, NO_POLICY)

    # --- keeping house -----------------------------------------------------------------------------------

    def confirm(self, ids: Iterable[int]) -> None:
        """Forget confirmed messages."""
        spans = [{"first": first, "last": last} for first, last in _spans(sorted(ids))]
        if spans:
            self.driver.change(_DELETE_OUTBOX, *spans)

    def follow_locks(self) -> None:
        """Ask and release for what has moved so far; at the end, or before locks are given up whatever moved."""
        moves, self._locking = self._locking, []
        self.locks.follow(moves)

    def finish(self) -> None:
        """Write what was gathered; call last, before the commit."""
        self.follow_locks()
        if self._uncalled:
            self.driver.change(_DELETE_CALLS, *({"key": key} for key in self._uncalled))
        if self._settled:
            self.driver.change(_DELETE_CHECKPOINT, *({"key": key} for key in self._settled))
        if self._history:
            self.driver.change(_INSERT_HISTORY, *self._history)
        if self._outcomes:
            self.driver.change(_DELETE_OUTCOMES, *({"key": key} for key in self._outcomes))
            stored = ({"execution_id": key, "notification": body} for key, body in self._outcomes.items())
            self.driver.change(_INSERT_OUTCOME, *stored)
        if self.outbox:
            self.driver.change(
                _INSERT_OUTBOX, *(rows.outbox_row(message, self.now) for message in self.outbox)
            )

    # --- shared ------------------------------------------------------------------------------------------

    def known(self, ids: Iterable[str]) -> dict[str, Execution]:
        """Executions by id, as they are now."""
        found: dict[str, Execution] = {}
        for row in _BY_ID.find(self.driver, list(ids)):
            execution = rows.execution_of(row)
            found[execution.execution_id] = execution
        return found

    def update(self, changed: Iterable[Execution]) -> None:
        """Write executions back."""
        self.driver.change(_UPDATE, *map(rows.changes_of, changed))

    def rearm(self, execution_id: str, due_at: float | None) -> None:
        """Set the clock of an execution's place, which goes on as another: it has its locks, or lost them."""
        self.connection.execute(_REARM, {"key": execution_id, "at": due_at, "now": self.now})

    @property
    def is_counted(self) -> bool:
        """Whether anybody wants to know what is no transition."""
        return self._tally is not None

    def count(self, what: Counted, word: str = "", number: int = 1) -> None:
        """Count something that is no transition."""
        if self._tally is not None and number:
            self._tally.counts[what, word] += number

    def waited(self, execution: Execution, seconds: float) -> None:
        """Measure a wait for locks that ended with the grant."""
        if self._tally is not None:
            self._tally.lock_waits.append((execution, seconds))

    def workflow_ended(self, name: str, status: str, seconds: float) -> None:
        """Measure a workflow from the request for it to its end."""
        if self._tally is not None:
            self._tally.workflows.append((name, status, seconds))

    def granted(self, execution: Execution) -> None:
        """Tell that an execution has its locks."""
        if self._tally is not None:
            self._tally.grants.append((execution, self.now))

    def remember(self, entry: rows.Row) -> None:
        """Add a line to a history."""
        self._history.append(entry)

    def note(self, move: Transition, *, is_last: bool = True) -> None:
        """History and notification of a transition: the same transaction as the status itself.

        Args:
            move: what was applied.
            is_last: False where another follows at once: whoever waits for the end does not hear of it.
        """
        entry = rows.entry_of(move)
        if entry:
            self._history.append(entry)
        self.moves.append(move)
        if move.execution.wants_locks:
            self._locking.append(move)
        if lifecycle.is_told(move.event):
            is_retried = not is_last and isinstance(move.event, Failed)
            body = notifications.notification(move, tracebacks=self.terms.tracebacks, is_retried=is_retried)
            execution = move.execution
            is_final = execution.status in FINAL and is_last
            if is_final:
                self._outcomes[execution.execution_id] = body
            self.tell(execution, body, execution.reply_to if is_final else None, execution.correlation_id)
        self._follow_work(move)

    def _follow_work(self, move: Transition) -> None:
        """What belongs to an attempt's work outside ends with it; what was saved, with the execution."""
        execution = move.execution
        if execution.status in SETTLED:
            self._settled.append(execution.execution_id)
        if isinstance(move.event, Launched):
            hooks = self.policy(execution.action).hooks
            if "poll" in hooks:
                self.call(execution.execution_id, "poll", self.now + FIRST_POLL_S)
            if execution.cancel_requested and "cancel" in hooks:
                # Asked while it was being launched: there was nothing outside to be stopped yet.
                self.give_up(execution)
        elif isinstance(move.event, Retried | Interrupted) or (
            move.before in WORKING and execution.place not in WORKING and execution.outside
        ):
            self._uncalled.append(execution.execution_id)

    def call(self, execution_id: str, call: str, at: float, of: Execution | None = None) -> None:
        """Let a call of an async executor be due at an instant; it takes the place of an earlier one.

        Args:
            execution_id: whose work it is about.
            call: `poll`, `cancel` or `resume`.
            at: UTC seconds since the epoch.
            of: as it was while the attempt ran that is meant, where another may follow before the call is made.
        """
        due = {"execution_id": execution_id, "call": call, "at": at, "number": 0}
        about = {"attempt": of and of.attempt, "external_id": of and of.external_id}
        self.connection.execute(_DELETE_CALL, {"key": execution_id, "which": call})
        self.connection.execute(_INSERT_CALL, due | about)

    def give_up(self, execution: Execution) -> None:
        """Nobody waits for an attempt's work outside any more: its executor is asked to stop it, where it can."""
        if execution.outside and "cancel" in self.policy(execution.action).hooks:
            self.call(execution.execution_id, "cancel", self.now, execution)

    def tell(
        self, execution: Execution, body: bytes, reply_to: str | None, correlation_id: str | None
    ) -> None:
        """Post a notification, also to whoever asked to hear the end."""
        key = notifications.routing_key(execution.action, execution.status)
        traceparent = execution.traceparent
        if traceparent and self.terms.is_traced:
            traceparent = carried(execution)
        headers = {"traceparent": traceparent} if traceparent else None
        is_watched = execution.update_timeout_s is not None
        watched = (headers or {}) | {WATCHED: self.terms.identity} if is_watched else headers
        self.post(self.names.status, key, body, watched)
        self.count(Counted.NOTIFIED, execution.status.value)
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


def _as_wished(execution: Execution, event: Event) -> Event:
    """An interruption of what somebody wanted stopped has stopped it: neither failed nor run again."""
    if not execution.cancel_requested:
        return event
    if isinstance(event, Interrupted):
        return Stopped(actor="daemon", reason=f"cancelled, and {event.reason}")
    if isinstance(event, Failed) and event.error_type == INTERRUPTED:
        return Stopped(actor="daemon", reason=f"cancelled, and {event.error_message}")
    return event


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
