"""The law's part for the end of a stage's job: applied, failed, tried again, TIMED_OUT, cancelled. Pure."""

from __future__ import annotations

from typing import Any

from pydantic_core import to_json

from jef_daemon.lifecycle import Status
from jef_daemon.messages import MOST_NESTED, is_nested_deeper
from jef_daemon.workflow.events import Ended, Refused
from jef_daemon.workflow.state import TOO_DEEP, Phase, Run
from jef_daemon.workflow.step import Step


def end(step: Step, event: Ended) -> None:
    """Take the end of a job."""
    stage = step.state.stages.get(event.stage)
    index = event.index or 0
    if stage is None or index >= len(stage.runs):
        raise Refused("no such stage")
    run = stage.runs[index]
    is_current = run.phase is Phase.RUNNING and run.attempt == event.attempt
    if not is_current or (event.index is not None) != stage.is_list:
        raise Refused("not a job that it waits for")
    if event.sequence is not None and event.sequence <= run.sequence:
        raise Refused("seen before")
    run.sequence = run.sequence if event.sequence is None else event.sequence
    name = event.stage if event.index is None else f"{event.stage}.{event.index}"
    if event.status is Status.TIMED_OUT:
        return _time_out(step, event.stage, run, event.index, name)
    run.timed_out, run.finished_at = False, step.now
    if event.status is Status.COMPLETED:
        _complete(step, event, run, name)
    elif event.status is Status.CANCELLED:
        _stop(step, event, run, name)
    else:
        _fail(step, event.stage, run, dict(event.error or {"type": "Failed", "message": ""}), name)
    return None


def _complete(step: Step, event: Ended, run: Run, name: str) -> None:
    context = {**step.state.context, **event.workflow_variables}
    said = step.bounds.objection(to_json(context)) if event.workflow_variables else ""
    if not said and event.job_variables and is_nested_deeper(to_json(event.job_variables), MOST_NESTED):
        said = TOO_DEEP  # a daemon of an earlier version, or a stranger, told them
    if said:
        _fail(step, event.stage, run, {"type": "VariablesTooLong", "message": said}, name, is_final=True)
        return
    step.state.context = context
    step.state.origins |= dict.fromkeys(event.workflow_variables, event.stage)
    run.phase, run.result = Phase.COMPLETED, event.result
    run.variables = dict(event.job_variables)
    step.note("Completed", name, event.actor, event.result)


def _stop(step: Step, event: Ended, run: Run, name: str) -> None:
    if run.then == "retry" and step.goes_on(event.stage):
        step.note("Retried", name, reason="its job was TIMED_OUT and is cancelled")
        run.phase = Phase.WAITING
    elif run.then in {"fail", "retry"}:
        _fail(
            step,
            event.stage,
            run,
            {"type": "TimedOut", "message": "its job was TIMED_OUT"},
            name,
            is_final=True,
        )
    elif run.then == "cancel":
        run.phase = Phase.CANCELLED
        step.note("Cancelled", name, event.actor, event.reason)
    else:
        error = {"type": "Cancelled", "message": event.reason or "its job was cancelled"}
        _fail(step, event.stage, run, error, name, is_final=True)


def _fail(
    step: Step, stage: str, run: Run, error: dict[str, Any], name: str, *, is_final: bool = False
) -> None:
    run.error = {key: error[key] for key in ("type", "message")}
    retry = step.plan.stages[stage].retry
    said = f"{error['type']}: {error['message']}".removesuffix(": ")
    if run.then == "cancel":
        run.phase = Phase.CANCELLED
    elif not is_final and run.tries < retry.attempts and step.goes_on(stage):
        run.phase = Phase.WAITING
    else:
        run.phase = Phase.FAILED
    word = {Phase.WAITING: "Retried", Phase.CANCELLED: "Cancelled"}.get(run.phase, "Failed")
    step.note(word, name, "executor", said)


def _time_out(step: Step, stage: str, run: Run, index: int | None, name: str) -> None:
    run.timed_out = True
    spec = step.plan.stages[stage]
    step.note("TimedOut", name, "watcher", f"onTimeout: {spec.on_timeout}")
    if spec.on_timeout == "wait" or run.then:
        return
    may_retry = spec.on_timeout == "retry" and run.tries < spec.retry.attempts
    step.ask_to_stop(
        stage, index or 0, run, "retry" if may_retry else "fail", "no update came in time", force=True
    )
