"""The law's part for what follows: which stages start and end now, how a list is filled, when all is over. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from jef_daemon.lifecycle import Status
from jef_daemon.workflow.definition import MOST_ITEMS, Stage
from jef_daemon.workflow.events import ReleaseLocks
from jef_daemon.workflow.expressions import Expression, ExpressionError
from jef_daemon.workflow.starting import names, passed_on, start
from jef_daemon.workflow.state import ENDED, OPEN, Phase, Run, StageState
from jef_daemon.workflow.step import Step

_PASSED = frozenset({Phase.COMPLETED, Phase.SKIPPED})
_WHY = {"CoordinatorFault": "the coordinator cannot go on"}
"""Why a workflow ends, where no stage has failed."""
_CUT_SHORT = frozenset({Phase.CANCELLED, Phase.NOT_RUN})


def settle(step: Step) -> None:
    """Start and end whatever may start and end now."""
    if step.state.status is not Status.RUNNING:
        if step.is_ending:
            give_up(step, step.plan.stages.values())
            _finish(step)
        return
    while _move(step):
        pass
    _tell(step)


def _move(step: Step) -> bool:
    """One round over all stages; whether one has ended, so that the next round may find more to do."""
    stages, ordinary = step.state.stages, step.plan.ordinary
    has_ended = False
    # All whose turn has come are opened before the first job is asked for: so one of them that fails at
    # once, for want of a value, keeps the others from starting, wherever it stands.
    for spec in ordinary:
        stage = stages[spec.name]
        if stage.phase is Phase.WAITING and _is_needed(step, spec):
            has_ended |= _open(step, spec, stage)
    for spec in ordinary:
        stage = stages[spec.name]
        if stage.phase is Phase.RUNNING:
            has_ended |= _carry_on(step, spec, stage)
    if step.is_ending:
        give_up(step, ordinary)
    if any(stages[spec.name].phase in OPEN for spec in ordinary):
        return has_ended
    if all(_is_over(step, spec, stages[spec.name]) for spec in step.plan.last):
        _finish(step)
    return False


def _is_needed(step: Step, spec: Stage) -> bool:
    if step.is_ending:
        return False
    plan, stages = step.plan, step.state.stages
    return all(_has_passed(plan.stages[need], stages[need]) for need in plan.needs[spec.name])


def _is_over(step: Step, spec: Stage, stage: StageState) -> bool:
    """Whether an `always` stage has ended; its turn has come when those before it have."""
    if stage.phase is Phase.WAITING:
        _open(step, spec, stage)
    if stage.phase is Phase.RUNNING:
        _carry_on(step, spec, stage)
    return stage.phase not in OPEN


def _open(step: Step, spec: Stage, stage: StageState) -> bool:
    """A stage's turn has come; whether it is over already."""
    name = spec.name
    try:
        if not _is_true(step, name):
            stage.phase = Phase.SKIPPED
            stage.job = passed_on(step, name)
            step.note("Skipped", name, reason=f"{spec.when} is false")
            return True
        items = _items(step, spec)
    except ExpressionError as error:
        stage.error = {"type": "ExpressionError", "message": str(error)}
        _end_stage(step, spec, stage, Phase.FAILED)
        return True
    if len(stage.runs) != len(items):
        stage.runs = [Run(attempt=stage.last_attempt) for _ in items]
    for run, item in zip(stage.runs, items, strict=True):
        run.item = item if run.phase is Phase.WAITING else run.item
    stage.phase = Phase.RUNNING
    return False


def _items(step: Step, spec: Stage) -> list[Any]:
    if spec.for_each is None:
        return [None]
    found = step.plan.lists[spec.name]
    items = found.value(names(step, spec.name)) if isinstance(found, Expression) else found
    if not isinstance(items, list):
        raise ExpressionError(f"forEach: {spec.for_each} is no list")
    if len(items) > MOST_ITEMS:
        raise ExpressionError(f"forEach: the list has {len(items)} items; {MOST_ITEMS} are allowed")
    return items


def _carry_on(step: Step, spec: Stage, stage: StageState) -> bool:
    """Start what may start of a stage; whether it has ended."""
    _fill(step, spec, stage)
    if any(run.phase in OPEN for run in stage.runs):
        return False
    _close(step, spec, stage)
    return True


def _fill(step: Step, spec: Stage, stage: StageState) -> None:
    """Start jobs of a stage, as many as its limit lets run."""
    phases = {run.phase for run in stage.runs}
    if Phase.WAITING not in phases:
        return
    stops = not step.goes_on(spec.name) or (spec.on_failure != "continue" and Phase.FAILED in phases)
    running = sum(run.phase is Phase.RUNNING for run in stage.runs)
    for index, run in enumerate(stage.runs):
        if run.phase is not Phase.WAITING:
            continue
        if stops:
            leave_out(run)
        elif spec.limit is None or running < spec.limit:
            start(step, spec, stage, index, run)
            running += run.error is None
            stops |= spec.on_failure != "continue" and run.error is not None


def _close(step: Step, spec: Stage, stage: StageState) -> None:
    """All jobs of a stage have ended."""
    phases = {run.phase for run in stage.runs}
    for run in stage.runs:  # in the order of the list, whichever ended first
        stage.job |= run.variables
    is_cut_short = not phases.isdisjoint(_CUT_SHORT)
    # One that may fail has failed when all of it has ended: else what was cut off would count as passed.
    if Phase.FAILED in phases and not (is_cut_short and spec.on_failure == "continue"):
        stage.error = next(run.error for run in stage.runs if run.phase is Phase.FAILED)
        _end_stage(step, spec, stage, Phase.FAILED)
    elif is_cut_short:
        _end_stage(step, spec, stage, Phase.CANCELLED if Phase.CANCELLED in phases else Phase.NOT_RUN)
    else:
        _end_stage(step, spec, stage, Phase.COMPLETED)


def _end_stage(step: Step, spec: Stage, stage: StageState, phase: Phase) -> None:
    stage.phase, name = phase, spec.name
    if phase is not Phase.FAILED:
        return
    if stage.error and stage.error["type"] in {"ExpressionError", "LockConflict"}:
        step.note("Failed", name, reason=stage.error["message"])
    if spec.on_failure == "fail":
        if step.state.error is None:
            step.state.failed, step.state.error = name, stage.error
    elif spec.goto:
        between = step.plan.after[name] - step.plan.after[spec.goto] - {spec.goto}
        for other in step.plan.stages:
            # NOT_RUN: the workflow had failed by then; a retry is not to begin what the flow went past.
            if other in between and step.state.stages[other].phase in {Phase.WAITING, Phase.NOT_RUN}:
                step.state.stages[other].phase = Phase.SKIPPED
                step.note("Skipped", other, reason=f"{name} failed: goto {spec.goto}")


def give_up(step: Step, specs: Iterable[Stage]) -> None:
    """Stages that will not begin."""
    for spec in specs:
        stage = step.state.stages[spec.name]
        if stage.phase is Phase.WAITING:
            stage.phase = Phase.NOT_RUN


def leave_out(run: Run) -> None:
    """A job that will not begin; one that was to be tried again has failed by now."""
    run.phase = Phase.NOT_RUN if run.error is None else Phase.FAILED


def _has_passed(spec: Stage, stage: StageState) -> bool:
    """Whether what needs it may go on."""
    if stage.phase is Phase.FAILED:
        return spec.on_failure != "fail"
    return stage.phase in _PASSED


def _is_true(step: Step, name: str) -> bool:
    condition = step.plan.conditions[name]
    if isinstance(condition, bool):
        return condition
    found = condition.value(names(step, name))
    if not isinstance(found, bool):
        raise ExpressionError(f"when: {condition.source} is neither true nor false")
    return found


# --- the workflow ------------------------------------------------------------------------------------


def _finish(step: Step) -> None:
    state = step.state
    state.finished_at = step.now
    state.waiting_for = state.due_at = None
    state.status, state.message = step.outcome, ""
    if state.status is Status.CANCELLED:
        state.message = state.cancelled_by
    elif state.error is not None:
        error = state.error
        said = f"{error.get('type', 'Failed')}: {error.get('message', '')}".removesuffix(": ")
        state.message = f"stage {state.failed}: {said}" if state.failed else said
    _count(step)
    step.note(state.status.value.capitalize(), reason=state.message)
    if state.locks:
        for held in state.locks:
            held.token = None
        step.effects.append(ReleaseLocks())


def _tell(step: Step) -> None:
    state = step.state
    if state.status is not Status.RUNNING:
        return
    _count(step)
    running = [name for name, stage in state.stages.items() if stage.phase is Phase.RUNNING]
    silent = [name for name in running if any(run.timed_out for run in state.stages[name].runs)]
    told = [_how_far(name, state.stages[name]) for name in running[:10]]
    state.message = ", ".join(told) + (f"; timed out: {', '.join(silent[:10])}" if silent else "")
    if step.is_ending:
        kind = state.error["type"] if state.error else ""
        why = f"{state.failed} failed" if state.failed else _WHY.get(kind, "its locks are lost")
        state.message = f"{'cancelling' if state.cancel_requested else why}: {state.message}"


def _how_far(name: str, stage: StageState) -> str:
    """A stage that runs; of a list, how many of its jobs have ended."""
    if not stage.is_list:
        return name
    return f"{name} ({sum(run.phase in ENDED for run in stage.runs)} of {len(stage.runs)})"


def _count(step: Step) -> None:
    stages = step.state.stages.values()
    done = sum(stage.phase in ENDED for stage in stages)
    step.state.progress = 100 * done // len(stages)
