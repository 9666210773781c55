"""The law's part for locks that a workflow holds across its stages: asked for, awaited, granted, lost. Pure.

What a workflow holds, its own stages and the workflows within it must not wait for. They ask for a name within the
workflow instead: so they keep one another out as if nobody else were there, and everybody else is kept out already.
"""

from __future__ import annotations

from typing import Any

from pydantic_core import to_json

from jef_daemon.lifecycle import FINAL, Status
from jef_daemon.lock.state import Mode
from jef_daemon.workflow.events import (
    AskLocks,
    LocksAwaited,
    LocksGranted,
    LocksLost,
    LocksLostAround,
    LocksRefused,
    LocksTimedOut,
    Refused,
    TellLost,
)
from jef_daemon.workflow.expressions import ExpressionError, render
from jef_daemon.workflow.plan import stronger
from jef_daemon.workflow.state import MOST_CHARACTERS, Holding, Phase, State, lock_owner, within
from jef_daemon.workflow.step import Step


class Conflict(ValueError):
    """A lock is wanted EXCLUSIVE within a workflow that holds it SHARED: it would wait for ever."""


def run(step: Step) -> None:
    """All is granted, or nothing is wanted: stages may start."""
    state = step.state
    state.status = Status.RUNNING
    state.started_at = state.started_at or step.now
    step.note("Begun")


def ask(step: Step) -> None:
    """Ask for the workflow's locks; after a retry for the same ones."""
    state = step.state
    try:
        state.locks = state.locks or _wanted(step)
    except ExpressionError as error:
        return step.fail("ExpressionError", str(error))
    except Conflict as error:
        return step.fail("LockConflict", str(error))
    state.status = Status.WAITING_FOR_LOCK
    timeout = step.plan.definition.lock_timeout
    state.due_at = None if timeout is None else step.now + timeout
    return _send(step)


def _send(step: Step) -> None:
    locks = step.state.locks
    names = ", ".join(f"{held.resource} {held.mode}" for held in locks)
    step.state.message = f"asks for {names}"
    step.note("LocksAsked", reason=names)
    step.effects.append(AskLocks(tuple((held.name, held.mode) for held in locks)))


def awaited(step: Step, event: LocksAwaited) -> None:
    """Say whom it waits for."""
    _must_wait(step)
    place = step.state.waiting_for = dict(event.place)
    holders = place.get("holders")
    behind = f"held by {', '.join(holders)}" if holders else "kept for an earlier one that waits"
    step.state.message = (
        f"waits for {place.get('resource')}, {behind}, number {place.get('position')} in the queue"
    )


def granted(step: Step, event: LocksGranted) -> None:
    """Begin."""
    _must_wait(step)
    for held in step.state.locks:
        held.token = event.tokens.get(held.name)
    told = ", ".join(f"{held.resource} {held.mode}, number {held.token}" for held in step.state.locks)
    step.note("LocksGranted", actor=event.actor, reason=told)
    step.state.waiting_for = step.state.due_at = None
    run(step)


def refused(step: Step, event: LocksRefused) -> None:
    """It can never begin."""
    _must_wait(step)
    step.fail("LockRefused", event.reason, event.actor)


def timed_out(step: Step, event: LocksTimedOut) -> None:
    """It has waited long enough."""
    if step.state.due_at is None or step.state.due_at > step.now:
        raise Refused("it may wait on")
    seconds = step.plan.definition.lock_timeout or 0
    step.fail("LockTimeout", f"waited for its locks longer than {seconds:g} s", event.actor)


def lost(step: Step, event: LocksLost) -> None:
    """Whoever has them now must find nobody at work: what runs is stopped, nothing begins but the `always` stages."""
    state = step.state
    if state.status is not Status.RUNNING:
        raise Refused(f"it is {state.status}")
    gone = frozenset(held.within for held in state.locks if held.token is not None)
    for held in state.locks:
        held.token = None
    if not event.is_failure:
        reason = f"{event.reason}; it goes on: locks.on_lost is tell"
        step.note("LocksLost", actor=event.actor, reason=reason)
        _tell_within(step, gone, reason)
        return
    step.fail("LockLost", event.reason, event.actor)
    # Before they are cancelled: what cleans up there begins at once, and is not to rely on them either.
    _tell_within(step, gone, event.reason)
    for name, spec in step.plan.stages.items():
        for index, each in enumerate(state.stages[name].runs):
            if each.phase is Phase.RUNNING and not spec.always:
                step.ask_to_stop(name, index, each, "cancel", f"a lock is lost: {event.reason}", force=False)


def lost_around(step: Step, event: LocksLostAround) -> None:
    """Rely on them no more. What was asked for within them keeps nobody else out either: who waits still asks anew."""
    state = step.state
    relied = [held for held in state.around if held.within in event.names]
    if state.status in FINAL or not relied:
        raise Refused("it relies on none of them")
    state.around = [held for held in state.around if held.within not in event.names]
    names = ", ".join(held.resource for held in relied)
    step.note("LocksLost", actor=event.actor, reason=f"{names}, held around it: {event.reason}")
    inner = [held for held in state.locks if held.name in event.names]
    if inner and state.status is Status.WAITING_FOR_LOCK:
        for held in inner:
            held.name = _within(state, state.around, held.resource, held.mode)
        state.waiting_for = None
        return _send(step)
    gone = [held.within for held in inner if held.token is not None]
    for held in inner:
        held.token = None
    return _tell_within(step, event.names.union(gone), event.reason)


def forsake(step: Step, reason: str) -> None:
    """It ends before the workflows within it have: nobody keeps for them what is held around them."""
    state = step.state
    _tell_within(step, frozenset(held.within for held in (*state.locks, *state.around)), reason)


def _tell_within(step: Step, names: frozenset[str], reason: str) -> None:
    for name, spec in step.plan.stages.items():
        for index, each in enumerate(step.state.stages[name].runs):
            if spec.workflow is not None and each.phase is Phase.RUNNING:
                step.effects.append(TellLost(step.name_of(name, index, each), names, reason))


def stand_alone(state: State) -> None:
    """Rely on nothing that is held around it: the stage that it was is over, and so may be the workflow around it."""
    state.around = []
    for held in state.locks:
        held.name = held.resource


def told(state: State) -> list[dict[str, Any]]:
    """What jobs are told of the locks that are held around them: for the stores that they write to.

    Of a resource that several of the workflows hold, the number of the outermost: only that one rises with every grant
    of the resource itself.
    """
    found = {held.resource: held for held in (*state.locks, *state.around) if held.token is not None}
    return [
        {"resource": held.resource, "mode": held.mode, "fencingToken": held.token} for held in found.values()
    ]


def as_asked(state: State, resource: str, mode: Mode) -> str:
    """The name by which a stage asks for a resource; what was lost is no more kept from others than from it.

    Raises:
        Conflict: its own workflow would keep it out for ever.
    """
    held = [each for each in state.locks if each.token is not None]
    return _within(state, [*held, *state.around], resource, mode)


def _wanted(step: Step) -> list[Holding]:
    state, found = step.state, dict[str, Mode]()
    seen = {"workflow": state.context, "workflowId": state.workflow_id}
    for lock in step.plan.definition.locks:
        name = resource_name(render(lock.resource, seen))
        found[name] = stronger(found.get(name), lock.mode)
    owner = lock_owner(state.workflow_id)
    return [
        Holding(resource, mode, _within(state, state.around, resource, mode), within(owner, resource))
        for resource, mode in found.items()
    ]


def _within(state: State, held: list[Holding], resource: str, mode: Mode) -> str:
    mine = next((each for each in held if each.resource == resource), None)
    if mine is None:
        return resource
    if not mine.mode.covers(mode):
        raise Conflict(
            f"{resource} is wanted EXCLUSIVE, and {state.workflow_id} or a workflow around it holds it SHARED: "
            "let that hold it EXCLUSIVE"
        )
    return mine.within


def resource_name(found: Any) -> str:
    """What an expression made, as the name of a resource.

    Raises:
        ExpressionError: it is none.
    """
    name = found if isinstance(found, str) else to_json(found).decode()
    if not 1 <= len(name) <= MOST_CHARACTERS:
        raise ExpressionError(
            f"locks: a resource's name has 1 to {MOST_CHARACTERS} characters, not {len(name)}"
        )
    return name


def _must_wait(step: Step) -> None:
    if step.state.status is not Status.WAITING_FOR_LOCK:
        raise Refused(f"it is {step.state.status}")
