"""What the lock service answered → what becomes of the job, or the workflow: it waits, may start, lost its locks.

Answers come at least once, some late, some for an attempt that is over: a row's state and attempt say which
count, the others change nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from jef_daemon.commits import Counted
from jef_daemon.events import Event, Failed, LockAwaited, Started
from jef_daemon.ledger import rows
from jef_daemon.ledger.job_locks import JobLocks, LockBook
from jef_daemon.lifecycle import WORKING, Execution, Status, waits_until
from jef_daemon.lock.messages import LockReply
from jef_daemon.lock.requests import Answer, Refused
from jef_daemon.ports import Applied, Heard, LockTimes, Lost
from jef_daemon.workflow.events import LocksAwaited, LocksGranted, LocksLost, LocksRefused
from jef_daemon.workflow.inputs import LocksHeard

LocksEvent = LocksAwaited | LocksGranted | LocksRefused | LocksLost

_ASK_AGAIN_S = 3.0
"""When another daemon still has the locks of the same execution."""
_UNSTARTED = frozenset({"asked", "waiting", "granted"})
_IN_QUEUE = frozenset({"asked", "waiting"})


class Books(Protocol):
    """The part of a transaction that hearing needs."""

    def apply(self, requests: Sequence[tuple[str, int | None, Sequence[Event]]]) -> list[list[Applied]]:
        """See `Transaction`."""
        ...

    def known(self, ids: Sequence[str]) -> dict[str, Execution]:
        """See `Transaction`."""
        ...

    def remember(self, entry: rows.Row) -> None:
        """See `Transaction`."""
        ...

    def rearm(self, execution_id: str, due_at: float | None) -> None:
        """See `Transaction`."""
        ...

    def count(self, what: Counted, word: str = "", number: int = 1) -> None:
        """See `Transaction`."""
        ...

    def waited(self, execution: Execution, seconds: float) -> None:
        """See `Transaction`."""
        ...

    def granted(self, execution: Execution) -> None:
        """See `Transaction`."""
        ...

    def give_up(self, execution: Execution) -> None:
        """See `Transaction`."""
        ...


class Hearing:
    """Takes answers in, inside one transaction.

    Args:
        book: what was asked.
        books: executions and history.
        now: UTC seconds since the epoch.
        times: leases.
        lost_fail: whether work outside that lost its locks is FAILED for it.
    """

    def __init__(
        self, book: LockBook, books: Books, now: float, times: LockTimes, *, lost_fail: bool = True
    ) -> None:
        self._lost_fail = lost_fail
        self._book = book
        self._books = books
        self._now = now
        self._times = times
        self._events: list[tuple[str, int | None, Sequence[Event]]] = []
        self._executions: dict[str, Execution] = {}
        self._changed: dict[str, JobLocks] = {}
        self._lost: list[Lost] = []
        self.of_workflows: list[LocksHeard] = []
        """What concerns workflows; the caller has it taken."""

    def take(self, heard: Sequence[Heard]) -> list[Lost]:
        """Take answers in, in order; returns the running attempts that lost their locks."""
        owners = dict.fromkeys(owner for each in heard for owner in _owners(each.reply))
        found = self._book.of(list(owners))
        self._executions = self._books.known(list(found))
        for each in heard:
            reply = each.reply
            if reply.status == Answer.KEPT:
                self._kept(reply, found)
            elif (row := found.get(reply.owner)) and row.correlation_id == each.correlation_id:
                handle = _HANDLERS.get(reply.status)
                if handle is not None:
                    handle(self, row, reply)
                    self._changed[row.execution_id] = row
        self._book.put(self._changed.values())
        # Applied last: a refusal ends the execution, and what is released then is read from the book.
        self._books.apply(self._events)
        return self._lost

    def give_back(self, unused: Sequence[JobLocks]) -> None:
        """Granted jobs that could not start in their time: others may have the locks."""
        self._executions = self._books.known([row.execution_id for row in unused])
        for row in unused:
            limit = f"{self._times.start_within_s:g} s"
            reason = f"granted, but no slot came free within {limit}: given back and asked for again"
            self._note(row, "LockGivenBack", reason)
            resource, mode = row.wanted[0]
            self._await(row, {"resource": resource, "mode": mode, "position": 1, "holders": []}, reason)
            self._book.give_back(row)
            self._rearm(row)
        self._book.put(unused)
        self._books.apply(self._events)

    def end_outside(self, lost: Sequence[JobLocks]) -> None:
        """Attempts that lost their locks as they launched their work: whoever ran them here was done already."""
        self._executions = self._books.known([row.execution_id for row in lost])
        for row in lost:
            execution = self._executions.get(row.execution_id)
            if execution is not None and execution.outside:
                self._lose_held(row, "its locks were lost while its work was launched")
        self._books.apply(self._events)

    # --- one answer each ---------------------------------------------------------------------------------

    def _granted(self, row: JobLocks, reply: LockReply) -> None:
        grants = reply.grants
        if row.state not in _IN_QUEUE or not grants:  # no service says that nothing is granted
            return
        tokens = {grant.resource: grant.fencing_token for grant in grants}
        if self._is_workflows(row, LocksGranted(tokens=tokens)):
            row.state, row.at = "held", self._now
            return
        execution = self._executions.get(row.execution_id)
        if execution is not None and execution.status is Status.WAITING_FOR_LOCK:
            self._books.waited(execution, max(0.0, self._now - row.at))
        if execution is not None:
            self._books.granted(execution)
        until = min(grant.lease_until.timestamp() for grant in grants)
        row.state, row.at = "granted", until - self._times.margin_s
        row.grants = json.dumps([[grant.resource, grant.mode, grant.fencing_token] for grant in grants])
        self._note(row, "LockGranted", "", {"grants": json.loads(row.grants)})
        self._rearm(row)

    def _waiting(self, row: JobLocks, reply: LockReply) -> None:
        if row.state not in _IN_QUEUE:
            return
        if row.state != "waiting":
            row.state, row.at = "waiting", self._now
        if reply.resource is not None:
            place = {"resource": reply.resource, "mode": reply.mode, "position": reply.position}
            self._await(row, place | {"holders": reply.holders or []})

    def _refused(self, row: JobLocks, reply: LockReply) -> None:
        if row.state not in _IN_QUEUE:
            return
        reason = reply.reason or "refused"
        if reply.code == Refused.ELSEWHERE:
            row.state, row.at = "later", self._now + _ASK_AGAIN_S
            resource, mode = row.wanted[0]
            place = {"resource": resource, "mode": mode, "position": 1, "holders": [row.execution_id]}
            self._await(row, place, "another daemon has the same execution, with its locks")
            return
        if self._is_workflows(row, LocksRefused(reason=reason)):
            return
        refused = Failed(actor="locks", error_type="LockRefused", error_message=reason)
        self._events.append((row.execution_id, row.attempt, [Started(actor="locks"), refused]))

    def _ended(self, row: JobLocks, reply: LockReply) -> None:
        """EXPIRED, REVOKED, LOST, CANCELLED, unasked: what was granted, or the place in the queue, is gone."""
        lost = f"{', '.join(reply.lost)}: " if reply.lost else ""
        self._lose(row, f"{lost}{reply.reason or reply.status.lower()}")

    def _kept(self, reply: LockReply, found: dict[str, JobLocks]) -> None:
        for owner in reply.lost or ():
            row = found.get(owner)
            # What is asked for just now is not there yet.
            if row is not None and row.state != "asked":
                self._lose(row, "the lease ended")
                self._changed[owner] = row
        for owner in reply.held or ():
            row = found.get(owner)
            if row is not None and row.state == "waiting":
                self._book.ask(row)  # it was granted, and the answer was lost
                self._changed[owner] = row

    # --- inside ------------------------------------------------------------------------------------------

    def _lose(self, row: JobLocks, reason: str) -> None:
        if row.state == "held" and self._is_workflows(
            row, LocksLost(reason=reason, is_failure=self._lost_fail)
        ):
            self._book.lose(row)
        elif row.state == "held":
            row.state, row.at = "lost", self._now
            self._note(row, "LockLost", reason)
            execution = self._executions.get(row.execution_id)
            if execution is not None and execution.outside:
                self._books.count(Counted.LOCKS_LOST)
            self._lose_held(row, reason)
        elif row.state in _UNSTARTED:
            self._note(row, "LockLost", f"{reason}; asked for again")
            # Perhaps one of several is gone: who still holds the others would be refused.
            self._book.give_back(row)
            self._rearm(row)

    def _lose_held(self, row: JobLocks, reason: str) -> None:
        """Whoever runs the attempt here stops it; work outside has nobody to see to that but us."""
        execution = self._executions.get(row.execution_id)
        if execution is None or not execution.outside:
            self._lost.append(Lost(row.execution_id, row.attempt, reason))
        elif self._lost_fail and execution.place in WORKING:
            failed = Failed(actor="locks", error_type="LockLost", error_message=reason)
            self._events.append((row.execution_id, row.attempt, [failed]))
            self._books.give_up(execution)

    def _rearm(self, row: JobLocks) -> None:
        """The wait for locks is over, or begins anew: another clock runs."""
        execution = self._executions.get(row.execution_id)
        if execution is not None and (execution.lock_timeout_s, execution.queue_timeout_s) != (None, None):
            until = waits_until(execution, self._now, granted=row.state == "granted")
            self._books.rearm(row.execution_id, until)

    def _await(self, row: JobLocks, place: dict[str, Any], reason: str = "") -> None:
        told = json.dumps(place)
        if told == row.place:
            return
        row.place = told
        if not self._is_workflows(row, LocksAwaited(place=place, reason=reason)):
            self._events.append(
                (row.execution_id, row.attempt, [LockAwaited(waiting_for=place, reason=reason)])
            )

    def _is_workflows(self, row: JobLocks, event: LocksEvent) -> bool:
        """Whether it is a workflow's; it is told then."""
        key = row.workflow
        if key is not None:
            self.of_workflows.append(LocksHeard(key, event))
        return key is not None

    def _note(self, row: JobLocks, event: str, reason: str, detail: dict[str, Any] | None = None) -> None:
        execution = self._executions.get(row.execution_id)
        if execution is not None:
            self._books.remember(rows.lock_entry(execution, event, reason, self._now, detail or {}))


def _owners(reply: LockReply) -> Sequence[str]:
    if reply.status == Answer.KEPT:
        return [*(reply.held or ()), *(reply.lost or ())]
    return (reply.owner,)


_HANDLERS: dict[str, Callable[[Hearing, JobLocks, LockReply], None]] = {
    Answer.GRANTED: Hearing._granted,  # noqa: SLF001  the table of this very class
    Answer.WAITING: Hearing._waiting,  # noqa: SLF001
    Answer.REFUSED: Hearing._refused,  # noqa: SLF001
    Answer.EXPIRED: Hearing._ended,  # noqa: SLF001
    Answer.REVOKED: Hearing._ended,  # noqa: SLF001
    Answer.LOST: Hearing._ended,  # noqa: SLF001
    Answer.CANCELLED: Hearing._ended,  # noqa: SLF001
}
