"""Workflows inside a transaction: what came → the law → the new state, the next requests, what is told.

State and outbox are one transaction: a coordinator that is killed anywhere finds a stage either not started, or
started with its request in the outbox. A workflow is read when something concerns it, and is nowhere else.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import structlog
from pydantic_core import to_json
from sqlalchemy import ColumnElement, func, literal_column, select

from jef_daemon.ledger import control, door, schema
from jef_daemon.ledger.transaction import Transaction
from jef_daemon.ledger.workflow_book import Workflow, WorkflowBook, body_of, tell_unreadable
from jef_daemon.lifecycle import FINAL, Status
from jef_daemon.workflow import events, law, messages
from jef_daemon.workflow.definition import MOST_AT_ONCE
from jef_daemon.workflow.inputs import (
    Became,
    Begin,
    Input,
    JobEnded,
    LocksHeard,
    RefusedRequest,
    WorkflowCommand,
)
from jef_daemon.workflow.plan import plan_of
from jef_daemon.workflow.state import State, decode, key_of, lock_owner, parsed

log = structlog.get_logger()

_BEGUN = frozenset({Status.WAITING_FOR_LOCK, Status.RUNNING})
"""Those that count among the `concurrency` of their name: whoever waits for locks, runs as soon as it has them."""
MOST_WITHIN = 10
"""Workflows within one another."""
_AT_ONCE = 200
"""Ids in one look, workflows in one step."""

_W, _D = schema.workflows.c, schema.workflow_definitions.c


def take(transaction: Transaction, inputs: Sequence[Input]) -> list[Became]:
    """Take what came, in order, with all that follows."""
    return _Step(transaction).take(inputs)


def lost_ends(transaction: Transaction, after: int) -> tuple[list[Input], int | None]:
    """Ends of jobs of this ledger that a page of workflows still waits for: their notifications never came here.

    Returns:
        The ends, and where the next page begins; None: this was the last.
    """
    page = transaction.connection.execute(
        select(_W.number, _W.key, _W.state)
        .where(_W.status == Status.RUNNING.value, _W.number > after)
        .order_by(_W.number)
        .limit(_AT_ONCE)
    ).all()
    waited = [name for row in page for name in _running(row.key, row.state)]
    found: list[Input] = []
    out = schema.outcomes.c
    for start in range(0, len(waited), _AT_ONCE):
        some = out.execution_id.in_(waited[start : start + _AT_ONCE])
        for body in transaction.connection.scalars(select(out.notification).where(some)):
            end = messages.ended(body)
            found += [JobEnded(*end)] if end is not None else []
    return found, page[-1].number if len(page) == _AT_ONCE else None


def _running(key: str, state: str) -> list[str]:
    try:
        return list(law.running(decode(state)))
    except ValueError as error:  # a daemon that did not start for it could do nothing else either
        tell_unreadable(key, error)
        return []


def end_waits(transaction: Transaction, keys: Iterable[str]) -> None:
    """End workflows that have waited for their locks as long as they may."""
    step = _Step(transaction)
    step.take([LocksHeard(key, events.LocksTimedOut()) for key in keys if step.can_read(key)])


def actions(transaction: Transaction) -> set[str]:
    """The actions of all definitions that workflows here are pinned to."""
    found: set[str] = set()
    for revision, body in transaction.connection.execute(select(_D.revision, _D.body)):
        try:
            stages = plan_of(body).definition.stages
        except ValueError as error:
            tell_unreadable(f"definition {revision}", error)
        else:
            found |= {stage.action for stage in stages if stage.action is not None}
    return found


class _Step:
    """One transaction's worth of workflows: each is read once and written once."""

    def __init__(self, transaction: Transaction) -> None:
        self._transaction = transaction
        self._connection = transaction.connection
        self._book = WorkflowBook(transaction)
        self._followed: deque[tuple[str, events.Event]] = deque()
        """What happened to other workflows by what happened to one."""
        self._queues: set[str] = set()
        """Names of definitions of which one may begin now."""

    def can_read(self, key: str) -> bool:
        """Whether a workflow is there, and can be read."""
        return self._book.find(key) is not None

    def take(self, inputs: Sequence[Input]) -> list[Became]:
        """Let inputs happen in order, with all that follows from them in other workflows."""
        self._book.read(_keys(inputs))
        answers = []
        for each in inputs:
            answers.append(self._take_one(each))
            self._follow()
        while self._queues:
            self._book.write()
            self._admit(self._queues.pop())
            self._follow()
        self._book.close()
        return answers

    def _take_one(self, each: Input) -> Became:
        if isinstance(each, JobEnded | LocksHeard):
            return self._advance(self._book.open.get(each.key), each.event)
        if isinstance(each, Begin):
            return self._begin(each)
        if isinstance(each, WorkflowCommand):
            return self._command(each)
        return self._refuse(each)

    # --- requests ----------------------------------------------------------------------------------------

    def _begin(self, asked: Begin) -> Became:
        known = self._book.open.get(key_of(asked.workflow_id))
        if known is not None:
            if known.state.status in FINAL:
                self._book.tell(known)
            return Became.KNOWN
        plan = plan_of(asked.definitions[asked.name])
        state = law.new(plan, asked.workflow_id, asked.variables, asked.priority, self._transaction.now)
        state.traceparent = asked.traceparent
        state.children = {name: self._book.keep(name, body) for name, body in asked.definitions.items()}
        workflow = Workflow(True, asked.name, state.children[asked.name], plan, state)
        cancel = control.remembered_cancel(self._transaction, asked.workflow_id)
        if cancel is not None:
            self._followed.append((state.key, events.CancelAsked(actor=cancel.actor, reason=cancel.reason)))
        self._add(workflow)
        return Became.NEW

    def _add(self, workflow: Workflow) -> None:
        self._book.add(workflow)
        self._book.note(workflow, events.Noted("Accepted", actor="producer"))
        workflow.state.sequence += 1
        self._book.tell(workflow)
        self._enqueue(workflow)

    def _enqueue(self, workflow: Workflow) -> None:
        if workflow.plan.definition.concurrency is None:
            self._followed.append((workflow.state.key, events.Begun()))
        else:
            self._queues.add(workflow.name)

    def _refuse(self, asked: RefusedRequest) -> Became:
        door.refuse(self._transaction, asked.refusal, set())
        if asked.workflow_id:
            self._book.read([key_of(asked.workflow_id)])
        if asked.workflow_id and key_of(asked.workflow_id) not in self._book.open:
            error = asked.refusal.error
            said = f"{error.code}: {error.detail}"
            body = messages.refused_notification(asked.workflow_id, asked.name, said, self._transaction.now)
            key = messages.routing_key(asked.name, Status.FAILED)
            self._transaction.post(self._transaction.names.workflow_status, key, body)
        return Became.REFUSED

    # --- commands ----------------------------------------------------------------------------------------

    def _command(self, asked: WorkflowCommand) -> Became:
        wanted = asked.control
        workflow = self._book.open.get(key_of(wanted.workflow_id or ""))
        if workflow is None or wanted.command == "resume":
            return Became.IGNORED  # another coordinator's, or jobs that only share a workflow id
        actor = f"operator:{wanted.by}"
        event: events.Event
        if wanted.command == "cancel":
            event = events.CancelAsked(actor=actor, reason=wanted.reason, force=wanted.force)
        else:
            event = events.RetryAsked(actor=actor, reason=wanted.reason, configuration=wanted.configuration)
        became, reason = Became.TAKEN, None
        try:
            self._apply(workflow, event)
            if wanted.command == "retry":
                self._enqueue(workflow)
            self._follow()
        except events.Refused as refused:
            became, reason = Became.REFUSED, str(refused)
        if asked.reply_to:
            status = workflow.state.status
            told = {"accepted": became is Became.TAKEN, "status": status, "reason": reason}
            self._transaction.post("", asked.reply_to, to_json(told), None, asked.correlation_id)
        return became

    # --- the law -----------------------------------------------------------------------------------------

    def _advance(self, workflow: Workflow | None, event: events.Event) -> Became:
        if workflow is None:
            return Became.IGNORED
        try:
            self._apply(workflow, event)
        except events.Refused:
            return Became.IGNORED
        return Became.TAKEN

    def _apply(self, workflow: Workflow, event: events.Event) -> None:
        """Apply an event, with its effects."""
        was_begun = workflow.state.status in _BEGUN
        effects = self._decided(workflow, event)
        state = workflow.state
        self._book.change(workflow)
        for effect in effects:
            self._effect(workflow, effect)
        state.sequence += 1
        self._book.tell(workflow)
        if state.status in FINAL:
            took_s = max(0.0, self._transaction.now - state.created_at)
            self._transaction.workflow_ended(workflow.name, state.status.value, took_s)
            if was_begun and workflow.plan.definition.concurrency is not None:
                self._queues.add(workflow.name)
            if state.parent is not None:
                self._tell_parent(state)

    def _decided(self, workflow: Workflow, event: events.Event) -> list[events.Effect]:
        """What the law makes of an event. A fault of the law is the end of that workflow, and of no other."""
        now, bounds = self._transaction.now, self._transaction.terms.workflow_bounds
        self._book.remember(workflow)
        try:
            return law.advance(workflow.plan, workflow.state, event, now, bounds)
        except events.Refused:
            raise
        except Exception as error:
            said = f"a fault of the coordinator, whose log says more: {type(error).__name__}: {error}"
            log.error(
                "workflow_step_failed",
                workflow_id=workflow.state.workflow_id,
                step=type(event).__name__,
                exc_info=error,
                consequence="its jobs are stopped, it has FAILED; a retry goes on",
            )
            return self._given_in(workflow, event, said)

    def _given_in(self, workflow: Workflow, event: events.Event, said: str) -> list[events.Effect]:
        now, bounds = self._transaction.now, self._transaction.terms.workflow_bounds
        for at_once in (False, True):
            workflow.state = decode(workflow.kept)
            if workflow.state.status in FINAL:
                raise events.Refused(said)
            broken = events.Broken(reason=said, of=event, at_once=at_once)
            try:
                return law.advance(workflow.plan, workflow.state, broken, now, bounds)
            except Exception:  # it meets the fault in whatever it does: without waiting it does least
                if at_once:
                    raise
        raise AssertionError("it was returned or raised")

    def _follow(self) -> None:
        while self._followed:
            key, event = self._followed.popleft()
            self._book.read([key])
            self._advance(self._book.open.get(key), event)

    def _effect(self, workflow: Workflow, effect: events.Effect) -> None:
        transaction, state = self._transaction, workflow.state
        if isinstance(effect, events.Noted):
            self._book.note(workflow, effect)
        elif isinstance(effect, events.StartJob):
            headers = {"traceparent": state.traceparent} if state.traceparent else None
            transaction.post(transaction.names.jobs, effect.action, effect.body, headers)
        elif isinstance(effect, events.StartChild):
            self._start_child(workflow, effect)
        elif isinstance(effect, events.AskLocks):
            transaction.locks.ask_for_workflow(lock_owner(state.workflow_id), effect.locks)
        elif isinstance(effect, events.ReleaseLocks):
            transaction.locks.let_go([lock_owner(state.workflow_id)])
        elif isinstance(effect, events.TellLost):
            lost = events.LocksLostAround(names=effect.names, reason=effect.reason)
            self._followed.append((key_of(effect.execution_id), lost))
        elif effect.is_child:
            cancel = events.CancelAsked(actor="workflow", reason=effect.reason, force=effect.force)
            self._followed.append((key_of(effect.execution_id), cancel))
        else:
            command = {
                "command": "cancel",
                "executionId": effect.execution_id,
                "reason": effect.reason[:1000],
                "force": effect.force,
                "by": f"workflow {state.workflow_id}"[:255],
            }
            transaction.post("", transaction.names.control, to_json(command))

    def _start_child(self, parent: Workflow, effect: events.StartChild) -> None:
        above = parent.state
        revision = above.children[effect.workflow]
        plan = plan_of(body_of(self._transaction, revision))
        # A producer may have chosen this very id; or one within an earlier workflow of this name is not purged yet.
        key = key_of(effect.execution_id)
        self._book.read([key])
        try:
            if key in self._book.open:
                raise events.Refused(f"there is a workflow {effect.execution_id!r} already")
            if above.depth + 1 >= MOST_WITHIN:
                raise events.Refused(f"{MOST_WITHIN} workflows within one another are allowed")
            law.check(plan, effect.variables, self._transaction.terms.workflow_bounds)
            state = law.new(
                plan, effect.execution_id, effect.variables, effect.priority, self._transaction.now
            )
        except events.Refused as refused:
            error = {"type": "RequestRefused", "message": str(refused)}
            self._end_child(effect.execution_id, Status.FAILED, error=error)
            return
        state.parent, state.depth = effect.execution_id, above.depth + 1
        state.around = list(effect.around)
        state.children, state.traceparent = above.children, above.traceparent
        self._add(Workflow(True, effect.workflow, revision, plan, state))

    def _tell_parent(self, state: State) -> None:
        self._end_child(
            str(state.parent),
            state.status,
            job_variables=state.context,
            error=state.error,
            reason=state.message,
        )

    def _end_child(self, execution_id: str, status: Status, **told: Any) -> None:
        found = parsed(execution_id)
        if found is not None:
            key, stage, index, attempt = found
            event = events.Ended(
                stage=stage, index=index, attempt=attempt, status=status, actor="workflow", **told
            )
            self._followed.append((key, event))

    def _admit(self, name: str) -> None:
        """Let workflows of a name begin that were queued, as many as may run."""
        running = sum(self._count(name, status) for status in _BEGUN)
        waiting = self._connection.scalars(
            select(_W.key)
            .where(_W.name == name, _is(Status.QUEUED))
            .order_by(_W.priority.desc(), _W.number)
            .limit(_AT_ONCE)
        ).all()
        has_moved = False
        for key in waiting:
            workflow = self._book.find(key)
            if workflow is None:
                continue
            limit = workflow.plan.definition.concurrency
            if limit is not None and running >= limit:
                return
            self._advance(workflow, events.Begun())
            running += workflow.state.status in _BEGUN
            has_moved = True
        if has_moved and len(waiting) == _AT_ONCE:
            self._queues.add(name)

    def _count(self, name: str, status: Status) -> int:
        # In the order of that status' own index, and bounded: else SQLite counts through those of all names.
        these = select(_W.number).where(_W.name == name, _is(status))
        bounded = these.order_by(_W.priority.desc(), _W.number).limit(MOST_AT_ONCE).subquery()
        return self._connection.scalar(select(func.count()).select_from(bounded)) or 0


def _is(status: Status) -> ColumnElement[bool]:
    """The status as a literal: SQLite finds the index of one status by nothing else."""
    return _W.status == literal_column(f"'{status.value}'")


def _keys(inputs: Sequence[Input]) -> Iterable[str]:
    for each in inputs:
        if isinstance(each, JobEnded | LocksHeard):
            yield each.key
        elif isinstance(each, Begin):
            yield key_of(each.workflow_id)
        elif isinstance(each, WorkflowCommand):
            yield key_of(each.control.workflow_id or "")
