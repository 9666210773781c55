"""The law's part for what people and the coordinator want of a workflow: begin, cancel, retry. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jef_daemon.lifecycle import FINAL, Status
from jef_daemon.workflow import holding
from jef_daemon.workflow.course import give_up, leave_out
from jef_daemon.workflow.events import Broken, CancelAsked, Ended, Refused, RetryAsked
from jef_daemon.workflow.state import Phase, Run, StageState
from jef_daemon.workflow.step import Step


def begin(step: Step) -> None:
    """Let stages start, or ask for the locks that they are to run under."""
    if step.state.status is not Status.QUEUED:
        raise Refused(f"it is {step.state.status}")
    if step.plan.definition.locks:
        holding.ask(step)
    else:
        holding.run(step)


def cancel(step: Step, event: CancelAsked) -> None:
    """Stop what runs, start nothing more but the `always` stages."""
    state = step.state
    if state.status in FINAL:
        raise Refused(f"it is {state.status} already")
    if state.cancel_requested and not event.force:
        raise Refused("it is being cancelled already; force does not wait")
    step.note("CancelRequested", actor=event.actor, reason=event.reason)
    state.cancel_requested, state.cancelled_by = True, event.reason or f"cancelled by {event.actor}"
    for name, stage in step.plan.stages.items():
        if stage.always and not event.force:
            continue
        for index, run in enumerate(state.stages[name].runs):
            if run.phase is Phase.RUNNING:
                step.ask_to_stop(name, index, run, "cancel", state.cancelled_by, force=event.force)
            elif stage.always and run.phase is Phase.WAITING:  # of the others, `settle` leaves them out
                leave_out(run)
        give_up(step, [step.plan.stages[name]])


def give_in(step: Step, event: Broken) -> None:
    """Let it end as FAILED rather than leave it where nothing can move it any more; a retry goes on from here.

    It waits for its jobs to be stopped, and holds its locks so long; at once, where that does not help either.
    """
    state = step.state
    if state.status in FINAL:
        raise Refused(f"it is {state.status} already")
    if event.at_once:
        holding.forsake(step, event.reason)
    for name, spec in step.plan.stages.items():
        stage = state.stages[name]
        for index, run in enumerate(stage.runs):
            if run.phase is Phase.RUNNING:
                _give_in(step, name, index, run, event)
            elif run.phase is Phase.WAITING and event.at_once:
                leave_out(run)
        if event.at_once:
            stage.phase = Phase.CANCELLED if stage.phase is Phase.RUNNING else stage.phase
            give_up(step, [spec])
    step.fail("CoordinatorFault", event.reason, event.actor)


def _give_in(step: Step, name: str, index: int, run: Run, event: Broken) -> None:
    of = event.of
    has_ended = (
        isinstance(of, Ended)
        and of.status is not Status.TIMED_OUT
        and (of.stage, of.index or 0, of.attempt) == (name, index, run.attempt)
    )
    if has_ended:  # nobody tells it again
        run.phase = Phase.CANCELLED
    elif event.at_once or not step.plan.stages[name].always:
        step.ask_to_stop(name, index, run, "cancel", event.reason, force=False)
        run.phase = Phase.CANCELLED if event.at_once else run.phase


def retry(step: Step, event: RetryAsked) -> None:
    """Go on from the stages that failed, with the variables as they are."""
    state = step.state
    if state.status is not Status.FAILED:
        raise Refused(f"it is {state.status}: only a FAILED one is retried")
    _configure(step, event.configuration)
    for name, stage in state.stages.items():
        spec = step.plan.stages[name]
        is_failed = stage.phase is Phase.FAILED and spec.on_failure == "fail"
        # CANCELLED: it was stopped as a lock was lost.
        if spec.always or is_failed or stage.phase in {Phase.NOT_RUN, Phase.CANCELLED}:
            _renew(stage, keep=not spec.always)
    state.status, state.failed, state.error, state.finished_at = Status.QUEUED, "", None, None
    state.cancel_requested = False
    holding.stand_alone(state)
    state.message = event.reason or "retried"
    step.note("Retried", actor=event.actor, reason=event.reason)


def _configure(step: Step, configuration: Mapping[str, Mapping[str, Any]]) -> None:
    stages = step.state.stages
    for name in configuration:
        if name not in stages:
            raise Refused(f"configuration: there is no stage {name!r}; there is {', '.join(stages)}")
        inner = step.plan.stages[name].workflow
        if inner is not None:
            raise Refused(f"configuration: stage {name!r} is the workflow {inner!r}, which has none")
    for name, changes in configuration.items():
        # Null takes an earlier change back: a misspelled key that the action refuses would stay for ever.
        changed = {**stages[name].configuration, **changes}
        stages[name].configuration = {key: value for key, value in changed.items() if value is not None}


def _renew(stage: StageState, *, keep: bool) -> None:
    """Let a stage run again; of a `forEach` that failed, those jobs that are not done."""
    stage.phase, stage.error, stage.job = Phase.WAITING, None, {}
    if not keep:
        stage.runs = []
    for run in stage.runs:
        if run.phase is not Phase.COMPLETED:
            run.phase, run.tries, run.error = Phase.WAITING, 0, None
