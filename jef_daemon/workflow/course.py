"""The law's part for what follows: which stages start and end now, how a list is filled, when all is over. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jef_daemon.lifecycle import Status
from jef_daemon.workflow.definition import MOST_ITEMS, Stage
from jef_daemon.workflow.events import ReleaseLocks
from jef_daemon.workflow.expressions import Expression, ExpressionError
from jef_daemon.workflow.starting import names, passed_on, start
from jef_daemon.workflow.state import OPEN, Phase, Run, StageState
from jef_daemon.workflow.step import Step


def settle(step: Step) -> None:
    """Start and end whatever may start and end now."""
    if step.state.status is not Status.RUNNING:
        if step.is_ending:
            give_up(step, *step.plan.stages)
            _finish(step)
        return
    while _move(step):
        pass
    _tell(step)


def _move(step: Step) -> bool:
    """One round over all stages; whether anything has changed."""
    changed = False
    ordinary = [stage.name for stage in step.plan.ordinary]
    for name in ordinary:
        is_waiting = step.state.stages[name].phase is Phase.WAITING
        changed |= _move_stage(step, name, may_start=is_waiting and _is_needed(step, name))
    if step.is_ending:
        give_up(step, *ordinary)
    if all(step.state.stages[name].phase not in OPEN for name in ordinary):
        for stage in step.plan.last:
            changed |= _move_stage(step, stage.name, may_start=True)
            if step.state.stages[stage.name].phase in OPEN:
                return changed
        _finish(step)
        return False
    return changed


def _is_needed(step: Step, name: str) -> bool:
    if step.is_ending:
        return False
    return all(_has_passed(step.plan.stages[need], step.state.stages[need]) for need in step.plan.needs[name])


def _move_stage(step: Step, name: str, *, may_start: bool) -> bool:
    stage, spec = step.state.stages[name], step.plan.stages[name]
    if stage.phase is Phase.WAITING and may_start:
        _open(step, name, stage, spec)
        return True
    if stage.phase is not Phase.RUNNING:
        return False
    _fill(step, name, stage, spec)
    if any(run.phase in OPEN for run in stage.runs):
        return False
    _close(step, name, stage, spec)
    return True


def _open(step: Step, name: str, stage: StageState, spec: Stage) -> None:
    """A stage's turn has come."""
    try:
        if not _is_true(step.plan.conditions[name], names(step, name)):
            stage.phase = Phase.SKIPPED
            stage.job = passed_on(step, name)
            step.note("Skipped", name, reason=f"{spec.when} is false")
            return
        items = _items(step, name, spec)
    except ExpressionError as error:
        stage.error = {"type": "ExpressionError", "message": str(error)}
        _end_stage(step, name, stage, spec, Phase.FAILED)
        return
    if len(stage.runs) != len(items):
        stage.runs = [Run(attempt=stage.last_attempt) for _ in items]
    for run, item in zip(stage.runs, items, strict=True):
        run.item = item if run.phase is Phase.WAITING else run.item
    stage.phase = Phase.RUNNING


def _items(step: Step, name: str, spec: Stage) -> list[Any]:
    if spec.for_each is None:
        return [None]
    found = step.plan.lists[name]
    items = found.value(names(step, name)) if isinstance(found, Expression) else found
    if not isinstance(items, list):
        raise ExpressionError(f"forEach: {spec.for_each} is no list")
    if len(items) > MOST_ITEMS:
        raise ExpressionError(f"forEach: the list has {len(items)} items; {MOST_ITEMS} are allowed")
    return items


def _fill(step: Step, name: str, stage: StageState, spec: Stage) -> None:
    """Start jobs of a stage, as many as its limit lets run."""
    phases = {run.phase for run in stage.runs}
    stops = not step.goes_on(name) or (spec.on_failure != "continue" and Phase.FAILED in phases)
    running = sum(run.phase is Phase.RUNNING for run in stage.runs)
    for index, run in enumerate(stage.runs):
        if run.phase is not Phase.WAITING:
            continue
        if stops:
            leave_out(run)
        elif spec.limit is None or running < spec.limit:
            start(step, name, stage, spec, index, run)
            running += run.error is None
            stops |= spec.on_failure != "continue" and run.error is not None


def _close(step: Step, name: str, stage: StageState, spec: Stage) -> None:
    """All jobs of a stage have ended."""
    phases = {run.phase for run in stage.runs}
    for run in stage.runs:  # in the order of the list, whichever ended first
        stage.job |= run.variables
    is_cut_short = bool(phases & {Phase.CANCELLED, Phase.NOT_RUN})
    # One that may fail has failed when all of it has ended: else what was cut off would count as passed.
    if Phase.FAILED in phases and not (is_cut_short and spec.on_failure == "continue"):
        stage.error = next(run.error for run in stage.runs if run.phase is Phase.FAILED)
        _end_stage(step, name, stage, spec, Phase.FAILED)
    elif is_cut_short:
        word = Phase.CANCELLED if Phase.CANCELLED in phases else Phase.NOT_RUN
        _end_stage(step, name, stage, spec, word)
    else:
        _end_stage(step, name, stage, spec, Phase.COMPLETED)


def _end_stage(step: Step, name: str, stage: StageState, spec: Stage, phase: Phase) -> None:
    stage.phase = phase
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


def give_up(step: Step, *names: str) -> None:
    """Stages that will not begin."""
    for stage in (step.state.stages[name] for name in names):
        if stage.phase is Phase.WAITING:
            stage.phase = Phase.NOT_RUN


def leave_out(run: Run) -> None:
    """A job that will not begin; one that was to be tried again has failed by now."""
    run.phase = Phase.NOT_RUN if run.error is None else Phase.FAILED


def _has_passed(stage: Stage, state: StageState) -> bool:
    """Whether what needs it may go on."""
    if state.phase is Phase.FAILED:
        return stage.on_failure != "fail"
    return state.phase in {Phase.COMPLETED, Phase.SKIPPED}


def _is_true(condition: Expression | bool, names: Mapping[str, Any]) -> bool:
    if isinstance(condition, bool):
        return condition
    found = condition.value(names)
    if not isinstance(found, bool):
        raise ExpressionError(f"when: {condition.source} is neither true nor false")
    return found


# --- the workflow ------------------------------------------------------------------------------------


def _finish(step: Step) -> None:
    state = step.state
    state.finished_at = step.now
    state.waiting_for = state.due_at = None
    phases = {stage.phase for stage in state.stages.values()}
    if state.cancel_requested and phases & {Phase.CANCELLED, Phase.NOT_RUN}:
        state.status, state.message = Status.CANCELLED, state.cancelled_by
    elif state.error is not None:
        error = state.error
        said = f"{error.get('type', 'Failed')}: {error.get('message', '')}".removesuffix(": ")
        state.status, state.message = Status.FAILED, f"stage {state.failed}: {said}" if state.failed else said
    else:
        state.status, state.message = Status.COMPLETED, ""
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
    state.message = ", ".join(running[:10]) + (f"; timed out: {', '.join(silent[:10])}" if silent else "")
    if step.is_ending:
        why = f"{state.failed} failed" if state.failed else "its locks are lost"
        state.message = f"{'cancelling' if state.cancel_requested else why}: {state.message}"


def _count(step: Step) -> None:
    stages = step.state.stages.values()
    done = sum(stage.phase not in OPEN and stage.phase is not Phase.NOT_RUN for stage in stages)
    step.state.progress = 100 * done // len(stages)
