"""The law's part for the start of a stage's job: what its expressions see, its request, or another workflow. Pure."""

from __future__ import annotations

from typing import Any

from pydantic_core import to_json

from jef_daemon.messages import MOST_NESTED, is_nested_deeper, timestamp
from jef_daemon.workflow.definition import Stage
from jef_daemon.workflow.events import StartChild, StartJob
from jef_daemon.workflow.expressions import ExpressionError, render
from jef_daemon.workflow.holding import Conflict, as_asked, resource_name, told
from jef_daemon.workflow.state import OPEN, Phase, Run, StageState, execution_id
from jef_daemon.workflow.step import Step


def start(step: Step, spec: Stage, stage: StageState, index: int, run: Run) -> None:
    """Ask for a job of a stage; without a value for one of its expressions it has failed."""
    name, is_list = spec.name, stage.is_list
    seen = names(step, name) | {"item": run.item, "index": index}  # only those of a list may name them
    attempt = run.attempt + 1
    identity = execution_id(step.state.key, name, index if is_list else None, attempt)
    try:
        asked = _job(step, identity, spec, run, seen) if spec.action else _child(step, identity, spec, seen)
    except (ExpressionError, Conflict) as error:
        kind = "ExpressionError" if isinstance(error, ExpressionError) else "LockConflict"
        run.phase, run.error = Phase.FAILED, {"type": kind, "message": str(error)}
        return
    run.phase, run.attempt, run.tries = Phase.RUNNING, attempt, run.tries + 1
    run.sequence, run.error, run.then = -1, None, ""
    run.started_at, run.finished_at = step.now, None
    stage.last_attempt = max(stage.last_attempt, attempt)
    step.effects.append(asked)
    step.note("Started", f"{name}.{index}" if is_list else name, reason=identity)


def _job(step: Step, identity: str, spec: Stage, run: Run, names: dict[str, Any]) -> StartJob:
    changed = step.state.stages[spec.name].configuration
    request: dict[str, Any] = {
        "executionId": identity,
        "workflowId": step.state.workflow_id,
        "stage": spec.name,
        "configuration": {**render(spec.configuration, names), **changed},
        "jobContextVariables": names["job"],
        "workflowContextVariables": step.state.context,
        "locks": [
            {"resource": as_asked(step.state, name, mode), "mode": mode}
            for name, mode in (
                (resource_name(render(lock.resource, names)), lock.mode) for lock in spec.locks
            )
        ],
        "priority": step.state.priority if spec.priority is None else spec.priority,
        "timeouts": step.plan.timeouts[spec.name],
    }
    if held := told(step.state):
        request["workflowLocks"] = held
    if run.tries and spec.retry.delay:
        request["notBefore"] = timestamp(step.now + spec.retry.delay)
    body = to_json(request)
    if len(body) > step.bounds.request_bytes:
        said = f"the request would have {len(body)} bytes; {step.bounds.request_bytes} are allowed"
        raise ExpressionError(said)
    if is_nested_deeper(body, MOST_NESTED + 1):
        raise ExpressionError(f"the configuration would nest deeper than {MOST_NESTED} levels")
    return StartJob(str(spec.action), body)


def _child(step: Step, identity: str, spec: Stage, names: dict[str, Any]) -> StartChild:
    variables = render(spec.variables, names)
    priority = step.state.priority if spec.priority is None else spec.priority
    around = tuple(held for held in (*step.state.locks, *step.state.around) if held.token is not None)
    return StartChild(identity, str(spec.workflow), variables, priority, around)


def names(step: Step, name: str) -> dict[str, Any]:
    """What a stage's expressions see."""
    ended: dict[str, Any] = {}
    if name in step.plan.looking_back:
        ended = {each: _told(stage) for each, stage in step.state.stages.items() if stage.phase not in OPEN}
    return {
        "workflow": step.state.context,
        "workflowId": step.state.workflow_id,
        "job": passed_on(step, name),
        "stages": ended,
        "outcome": step.outcome.value,  # only those of an `always` stage may name it
    }


def passed_on(step: Step, name: str) -> dict[str, Any]:
    """The job variables of the stages before; of several, the later in `needs` win."""
    found: dict[str, Any] = {}
    for need in step.plan.needs[name]:
        found |= step.state.stages[need].job
    return found


def _told(stage: StageState) -> dict[str, Any]:
    """What expressions see of a stage that has ended: of a `forEach` lists, in the order of its items."""
    told: dict[str, Any] = {"status": stage.phase.value, "error": stage.error}
    if stage.is_list:
        done = [run if run.phase is Phase.COMPLETED else None for run in stage.runs]
        return told | {
            "result": [run and run.result for run in done],
            "variables": [run and run.variables for run in done],
        }
    run = stage.runs[0] if stage.runs else Run()
    return told | {"result": run.result, "variables": run.variables}
