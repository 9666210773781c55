"""The law of workflows: a state and an event → what changes, and what is to be sent. Pure: no I/O, no clock.

Everything that moves a workflow is here and in its parts: `ends` (a job's end), `commands` (begin, cancel, retry, give
in), `holding` (locks across stages), then `course` (what starts and ends now), by `starting` (requests). `advance`
changes the state that it is given (the caller has just read it, and writes it back in the same transaction as what the
effects say) and refuses what does not concern it.

A stage starts when its needs have passed: COMPLETED, SKIPPED, or FAILED with an `onFailure` that goes on. A failure
that is the workflow's lets what runs come to its end and starts nothing more but the `always` stages; so a retry finds
all that was done. Variables follow the seed: a COMPLETED response's job variables are passed to the next stage, its
workflow variables override the context.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pydantic_core import to_json

from jef_daemon.workflow import holding
from jef_daemon.workflow.commands import begin, cancel, give_in, retry
from jef_daemon.workflow.course import settle
from jef_daemon.workflow.ends import end
from jef_daemon.workflow.events import (
    Begun,
    Broken,
    CancelAsked,
    Effect,
    Ended,
    Event,
    LocksAwaited,
    LocksGranted,
    LocksLost,
    LocksLostAround,
    LocksRefused,
    LocksTimedOut,
    Refused,
    RetryAsked,
)
from jef_daemon.workflow.plan import Plan
from jef_daemon.workflow.state import Bounds, Phase, StageState, State, execution_id, key_of
from jef_daemon.workflow.step import Step

DEFAULTS = Bounds()


def check(plan: Plan, variables: Mapping[str, Any], bounds: Bounds) -> None:
    """Look whether a workflow can begin with these variables.

    Raises:
        Refused: one that is required is missing, or they are too much.
    """
    missing = [name for name in plan.definition.required if variables.get(name) is None]
    if missing:
        raise Refused(f"variables: {', '.join(missing)} required by the workflow {plan.definition.name!r}")
    context = to_json(plan.definition.initial(dict(variables)))
    if said := bounds.objection(context):
        raise Refused(f"variables: {said}")


def new(plan: Plan, workflow_id: str, variables: Mapping[str, Any], priority: int, now: float) -> State:
    """A workflow that has not begun; its variables have been checked."""
    context = plan.definition.initial(dict(variables))
    origins = {name: "request" if name in variables else "definition" for name in context}
    stages = {name: StageState(is_list=stage.for_each is not None) for name, stage in plan.stages.items()}
    return State(
        workflow_id,
        key_of(workflow_id),
        priority=priority,
        context=context,
        origins=origins,
        stages=stages,
        created_at=now,
    )


def advance(plan: Plan, state: State, event: Event, now: float, bounds: Bounds = DEFAULTS) -> list[Effect]:
    """Apply an event.

    Args:
        plan: of the revision that it is pinned to.
        state: changed.
        event: what happened.
        now: UTC seconds since the epoch.
        bounds: limits.

    Raises:
        Refused: it does not concern the workflow as it is.
    """
    step = Step(plan, state, now, bounds)
    _APPLY[type(event)](step, event)
    settle(step)
    return step.effects


def running(state: State) -> Iterable[str]:
    """Execution ids of the jobs, and of the workflows within, that a workflow waits for."""
    for name, stage in state.stages.items():
        for index, run in enumerate(stage.runs):
            if run.phase is Phase.RUNNING:
                which = index if stage.is_list else None
                yield execution_id(state.key, name, which, run.attempt)


# `Any`: each function takes the one event it stands beside.
_APPLY: dict[type[Event], Callable[[Step, Any], None]] = {
    Begun: lambda step, _: begin(step),
    Ended: end,
    LocksAwaited: holding.awaited,
    LocksGranted: holding.granted,
    LocksRefused: holding.refused,
    LocksTimedOut: holding.timed_out,
    LocksLost: holding.lost,
    LocksLostAround: holding.lost_around,
    CancelAsked: cancel,
    RetryAsked: retry,
    Broken: give_in,
}
