"""The law of workflows: a state and an event → what changes, and what is to be sent. Pure: no I/O, no clock.

Everything that moves a workflow is here. `advance` changes the state that it is given (the caller has just read it,
and writes it back in the same transaction as what the effects say) and refuses what does not concern it.

A stage starts when its needs have passed: COMPLETED, SKIPPED, or FAILED with an `onFailure` that goes on. A failure
that is the workflow's lets what runs come to its end and starts nothing more but the `always` stages; so a retry finds
all that was done. Variables follow the seed: a COMPLETED response's job variables are passed to the next stage, its
workflow variables override the context.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic_core import to_json

from jef_daemon.lifecycle import FINAL, Status
from jef_daemon.messages import timestamp
from jef_daemon.workflow.definition import MOST_ITEMS, Stage
from jef_daemon.workflow.expressions import Expression, ExpressionError, render
from jef_daemon.workflow.plan import Plan
from jef_daemon.workflow.state import OPEN, Bounds, Phase, Run, StageState, State, execution_id, key_of

# --- events ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happens to a workflow."""

    actor: str = "coordinator"
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Begun(Event):
    """It may run: fewer of its name run than may."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended(Event):
    """A stage's job, or the workflow that a stage is, has come to an end (or is TIMED_OUT)."""

    actor: str = "executor"
    stage: str
    index: int | None
    attempt: int
    status: Status
    sequence: int | None = None
    """Of the notification; None: it has none."""
    result: str = ""
    job_variables: Mapping[str, Any] = field(default_factory=dict)
    workflow_variables: Mapping[str, Any] = field(default_factory=dict)
    error: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CancelAsked(Event):
    """Somebody wants it stopped."""

    actor: str = "operator"
    force: bool = False
    """Also the `always` stages, and jobs that do not answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryAsked(Event):
    """Somebody wants it to go on from the stage that failed."""

    actor: str = "operator"
    configuration: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """By stage: values that take the place of those in its configuration."""


# --- effects ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StartJob:
    """A request is to be published."""

    action: str
    request: dict[str, Any]
    """As on the wire."""


@dataclass(frozen=True, slots=True)
class StartChild:
    """Another workflow is to be started."""

    execution_id: str
    """Its id, and what the stage knows it by."""
    workflow: str
    variables: dict[str, Any]
    priority: int


@dataclass(frozen=True, slots=True)
class CancelJob:
    """A stage's job is to be cancelled."""

    execution_id: str
    reason: str
    force: bool
    is_child: bool
    """Whether it is a workflow."""


@dataclass(frozen=True, slots=True)
class Noted:
    """A line of the history."""

    event: str
    stage: str = ""
    actor: str = "coordinator"
    reason: str = ""


Effect = StartJob | StartChild | CancelJob | Noted


DEFAULTS = Bounds()


class Refused(Exception):
    """An event that does not concern the workflow as it is; nothing is changed."""


# --- what there is to call -------------------------------------------------------------------------------


def new(plan: Plan, workflow_id: str, variables: Mapping[str, Any], priority: int, now: float) -> State:
    """A workflow that has not begun.

    Raises:
        Refused: a required variable is missing.
    """
    missing = [name for name in plan.definition.required if variables.get(name) is None]
    if missing:
        raise Refused(f"variables: {', '.join(missing)} required by the workflow {plan.definition.name!r}")
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
    step = _Step(plan, state, now, bounds)
    if isinstance(event, Ended):
        step.end(event)
    elif isinstance(event, Begun):
        step.begin()
    elif isinstance(event, CancelAsked):
        step.cancel(event)
    elif isinstance(event, RetryAsked):
        step.retry(event)
    step.settle()
    return step.effects


def has_passed(stage: Stage, state: StageState) -> bool:
    """Whether what needs it may go on."""
    if state.phase is Phase.FAILED:
        return stage.on_failure != "fail"
    return state.phase in {Phase.COMPLETED, Phase.SKIPPED}


# --- one step --------------------------------------------------------------------------------------------


class _Step:
    """One event and all that follows from it at once."""

    def __init__(self, plan: Plan, state: State, now: float, bounds: Bounds) -> None:
        self.plan = plan
        self.state = state
        self.now = now
        self.bounds = bounds
        self.effects: list[Effect] = []

    # --- events ------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Let stages start."""
        if self.state.status is not Status.QUEUED:
            raise Refused(f"it is {self.state.status}")
        self.state.status, self.state.began = Status.RUNNING, True
        self.state.started_at = self.state.started_at or self.now
        self.note("Begun")

    def end(self, event: Ended) -> None:
        """Take the end of a job."""
        stage = self.state.stages.get(event.stage)
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
            return self._time_out(event.stage, run, event.index, name)
        run.timed_out, run.finished_at = False, self.now
        if event.status is Status.COMPLETED:
            self._complete(event, run, name)
        elif event.status is Status.CANCELLED:
            self._stop(event, run, name)
        else:
            self._fail(event.stage, run, dict(event.error or {"type": "Failed", "message": ""}), name)
        return None

    def cancel(self, event: CancelAsked) -> None:
        """Stop what runs, start nothing more but the `always` stages."""
        state = self.state
        if state.status in FINAL:
            raise Refused(f"it is {state.status} already")
        if state.cancel_requested and not event.force:
            raise Refused("it is being cancelled already; force does not wait")
        self.note("CancelRequested", actor=event.actor, reason=event.reason)
        state.cancel_requested, state.cancelled_by = True, event.reason or f"cancelled by {event.actor}"
        for name, stage in self.plan.stages.items():
            if stage.always and not event.force:
                continue
            for index, run in enumerate(state.stages[name].runs):
                if run.phase is Phase.RUNNING:
                    self._ask_to_stop(name, index, run, "cancel", state.cancelled_by, force=event.force)
            if stage.always:
                self._give_up(name)

    def retry(self, event: RetryAsked) -> None:
        """Go on from the stages that failed, with the variables as they are."""
        state = self.state
        if state.status is not Status.FAILED:
            raise Refused(f"it is {state.status}: only a FAILED one is retried")
        unknown = [name for name in event.configuration if name not in state.stages]
        if unknown:
            raise Refused(
                f"configuration: there is no stage {unknown[0]!r}; there is {', '.join(state.stages)}"
            )
        for name, changes in event.configuration.items():
            state.stages[name].configuration |= changes
        for name, stage in state.stages.items():
            spec = self.plan.stages[name]
            is_failed = stage.phase is Phase.FAILED and spec.on_failure == "fail"
            if spec.always or is_failed or stage.phase is Phase.NOT_RUN:
                self._renew(stage, keep=not spec.always)
        state.status, state.failed, state.error, state.finished_at = Status.QUEUED, "", None, None
        state.cancel_requested = False
        state.message = event.reason or "retried"
        self.note("Retried", actor=event.actor, reason=event.reason)

    # --- the end of a job --------------------------------------------------------------------------------

    def _complete(self, event: Ended, run: Run, name: str) -> None:
        context = {**self.state.context, **event.workflow_variables}
        size = len(to_json(context))
        if size > self.bounds.variables_bytes:
            said = (
                f"the workflow's variables would have {size} bytes; {self.bounds.variables_bytes} are allowed"
            )
            self._fail(event.stage, run, {"type": "VariablesTooLong", "message": said}, name, is_final=True)
            return
        self.state.context = context
        self.state.origins |= dict.fromkeys(event.workflow_variables, event.stage)
        run.phase, run.result, run.error, run.then = Phase.COMPLETED, event.result, None, ""
        run.variables = dict(event.job_variables)
        self.note("Completed", name, event.actor, event.result)

    def _stop(self, event: Ended, run: Run, name: str) -> None:
        then, run.then = run.then, ""
        if then == "retry" and self._goes_on(event.stage):
            self.note("Retried", name, reason="its job was TIMED_OUT and is cancelled")
            run.phase = Phase.WAITING
        elif then in {"fail", "retry"}:
            self._fail(
                event.stage,
                run,
                {"type": "TimedOut", "message": "its job was TIMED_OUT"},
                name,
                is_final=True,
            )
        elif then == "cancel":
            run.phase = Phase.CANCELLED
            self.note("Cancelled", name, event.actor, event.reason)
        else:
            error = {"type": "Cancelled", "message": event.reason or "its job was cancelled"}
            self._fail(event.stage, run, error, name, is_final=True)

    def _fail(
        self, stage: str, run: Run, error: dict[str, Any], name: str, *, is_final: bool = False
    ) -> None:
        run.error = {key: error[key] for key in ("type", "message") if key in error}
        run.result, run.variables = "", {}
        then, run.then = run.then, ""
        retry = self.plan.stages[stage].retry
        said = f"{error.get('type', 'Failed')}: {error.get('message', '')}".removesuffix(": ")
        if then == "cancel":
            run.phase = Phase.CANCELLED
        elif not is_final and run.tries < retry.attempts and self._goes_on(stage):
            run.phase = Phase.WAITING
        else:
            run.phase = Phase.FAILED
        word = {Phase.WAITING: "Retried", Phase.CANCELLED: "Cancelled"}.get(run.phase, "Failed")
        self.note(word, name, "executor", said)

    def _time_out(self, stage: str, run: Run, index: int | None, name: str) -> None:
        run.timed_out = True
        spec = self.plan.stages[stage]
        self.note("TimedOut", name, "watcher", f"onTimeout: {spec.on_timeout}")
        if spec.on_timeout == "wait" or run.then:
            return
        may_retry = spec.on_timeout == "retry" and run.tries < spec.retry.attempts
        self._ask_to_stop(
            stage, index or 0, run, "retry" if may_retry else "fail", "no update came in time", force=True
        )

    @property
    def _is_ending(self) -> bool:
        return bool(self.state.failed) or self.state.cancel_requested

    def _goes_on(self, stage: str) -> bool:
        """Whether a stage may have further jobs; those that clean up may, whatever became of the others."""
        return self.plan.stages[stage].always or not self._is_ending

    def _ask_to_stop(self, stage: str, index: int, run: Run, then: str, reason: str, *, force: bool) -> None:
        run.then = then
        spec = self.plan.stages[stage]
        is_list = self.state.stages[stage].is_list
        name = execution_id(self.state.key, stage, index if is_list else None, run.attempt)
        self.effects.append(CancelJob(name, reason, force, spec.workflow is not None))

    # --- what follows ------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Start and end whatever may start and end now."""
        if self.state.status is not Status.RUNNING:
            if self.state.cancel_requested and self.state.status not in FINAL:
                self._give_up(*self.plan.stages)
                self._finish()
            return
        while self._move():
            pass
        self._tell()

    def _move(self) -> bool:
        """One round over all stages; whether anything has changed."""
        changed = False
        ordinary = [stage.name for stage in self.plan.ordinary]
        for name in ordinary:
            changed |= self._move_stage(name, may_start=self._is_needed(name))
        if self._is_ending:
            changed |= self._give_up(*ordinary)
        if all(self.state.stages[name].phase not in OPEN for name in ordinary):
            for stage in self.plan.last:
                changed |= self._move_stage(stage.name, may_start=True)
                if self.state.stages[stage.name].phase in OPEN:
                    return changed
            self._finish()
            return False
        return changed

    def _is_needed(self, name: str) -> bool:
        if self._is_ending:
            return False
        return all(
            has_passed(self.plan.stages[need], self.state.stages[need]) for need in self.plan.needs[name]
        )

    def _move_stage(self, name: str, *, may_start: bool) -> bool:
        stage, spec = self.state.stages[name], self.plan.stages[name]
        if stage.phase is Phase.WAITING and may_start:
            self._open(name, stage, spec)
            return True
        if stage.phase is not Phase.RUNNING:
            return False
        self._fill(name, stage, spec)
        if any(run.phase in OPEN for run in stage.runs):
            return False
        self._close(name, stage, spec)
        return True

    def _open(self, name: str, stage: StageState, spec: Stage) -> None:
        """A stage's turn has come."""
        stage.error, stage.job = None, {}
        try:
            if not _is_true(self.plan.conditions[name], self._names(name)):
                stage.phase = Phase.SKIPPED
                stage.job = self._passed_on(name)
                self.note("Skipped", name, reason=f"{spec.when} is false")
                return
            items = self._items(name, spec)
        except ExpressionError as error:
            stage.error = {"type": "ExpressionError", "message": str(error)}
            self._end_stage(name, stage, spec, Phase.FAILED)
            return
        if len(stage.runs) != len(items):
            stage.runs = [Run(attempt=stage.last_attempt) for _ in items]
        for run, item in zip(stage.runs, items, strict=True):
            run.item = item if run.phase is Phase.WAITING else run.item
        stage.phase = Phase.RUNNING

    def _items(self, name: str, spec: Stage) -> list[Any]:
        if spec.for_each is None:
            return [None]
        found = self.plan.lists[name]
        items = found.value(self._names(name)) if isinstance(found, Expression) else found
        if not isinstance(items, list):
            raise ExpressionError(f"forEach: {spec.for_each} is no list")
        if len(items) > MOST_ITEMS:
            raise ExpressionError(f"forEach: the list has {len(items)} items; {MOST_ITEMS} are allowed")
        return items

    def _fill(self, name: str, stage: StageState, spec: Stage) -> None:
        """Start jobs of a stage, as many as its limit lets run."""
        phases = {run.phase for run in stage.runs}
        stops = not self._goes_on(name) or Phase.CANCELLED in phases
        stops |= spec.on_failure != "continue" and Phase.FAILED in phases
        running = sum(run.phase is Phase.RUNNING for run in stage.runs)
        for index, run in enumerate(stage.runs):
            if run.phase is not Phase.WAITING:
                continue
            if stops:
                run.phase = Phase.NOT_RUN if run.error is None else Phase.FAILED
            elif spec.limit is None or running < spec.limit:
                self._start(name, stage, spec, index, run)
                running += not run.error

    def _close(self, name: str, stage: StageState, spec: Stage) -> None:
        """All jobs of a stage have ended."""
        phases = {run.phase for run in stage.runs}
        for run in stage.runs:  # in the order of the list, whichever ended first
            stage.job |= run.variables
        if Phase.FAILED in phases:
            stage.error = next(run.error for run in stage.runs if run.phase is Phase.FAILED)
            self._end_stage(name, stage, spec, Phase.FAILED)
        elif phases & {Phase.CANCELLED, Phase.NOT_RUN}:
            word = Phase.CANCELLED if Phase.CANCELLED in phases else Phase.NOT_RUN
            self._end_stage(name, stage, spec, word)
        else:
            self._end_stage(name, stage, spec, Phase.COMPLETED)

    def _end_stage(self, name: str, stage: StageState, spec: Stage, phase: Phase) -> None:
        stage.phase = phase
        if phase is not Phase.FAILED:
            return
        if stage.error and stage.error["type"] == "ExpressionError":
            self.note("Failed", name, reason=stage.error["message"])
        if spec.on_failure == "fail":
            if not self.state.failed:
                self.state.failed, self.state.error = name, stage.error
        elif spec.goto:
            between = self.plan.after[name] - self.plan.after[spec.goto] - {spec.goto}
            for other in self.plan.stages:
                if other in between and self.state.stages[other].phase is Phase.WAITING:
                    self.state.stages[other].phase = Phase.SKIPPED
                    self.note("Skipped", other, reason=f"{name} failed: goto {spec.goto}")

    def _give_up(self, *names: str) -> bool:
        """Stages that will not begin."""
        found = [name for name in names if self.state.stages[name].phase is Phase.WAITING]
        for name in found:
            self.state.stages[name].phase = Phase.NOT_RUN
        return bool(found)

    def _renew(self, stage: StageState, *, keep: bool) -> None:
        """Let a stage run again; of a `forEach` that failed, those jobs that are not done."""
        stage.phase, stage.error, stage.job = Phase.WAITING, None, {}
        if not keep:
            stage.runs = []
        for run in stage.runs:
            if run.phase is not Phase.COMPLETED:
                run.phase, run.tries, run.error, run.then = Phase.WAITING, 0, None, ""

    # --- starting ----------------------------------------------------------------------------------------

    def _start(self, name: str, stage: StageState, spec: Stage, index: int, run: Run) -> None:
        is_list = stage.is_list
        names = self._names(name) | ({"item": run.item, "index": index} if is_list else {})
        attempt = run.attempt + 1
        identity = execution_id(self.state.key, name, index if is_list else None, attempt)
        try:
            effect = (
                self._job(identity, name, spec, run, names)
                if spec.action
                else self._child(identity, spec, names)
            )
        except ExpressionError as error:
            run.phase, run.error = Phase.FAILED, {"type": "ExpressionError", "message": str(error)}
            return
        run.phase, run.attempt, run.tries = Phase.RUNNING, attempt, run.tries + 1
        run.sequence, run.timed_out, run.error = -1, False, None
        run.started_at, run.finished_at = self.now, None
        stage.last_attempt = max(stage.last_attempt, attempt)
        self.effects.append(effect)
        self.note("Started", f"{name}.{index}" if is_list else name, reason=identity)

    def _job(self, identity: str, name: str, spec: Stage, run: Run, names: dict[str, Any]) -> StartJob:
        changed = self.state.stages[name].configuration
        request: dict[str, Any] = {
            "executionId": identity,
            "workflowId": self.state.workflow_id,
            "stage": name,
            "configuration": {**render(spec.configuration, names), **changed},
            "jobContextVariables": names["job"],
            "workflowContextVariables": self.state.context,
            "locks": [
                {"resource": _lock_name(render(lock.resource, names)), "mode": lock.mode}
                for lock in spec.locks
            ],
            "priority": self.state.priority if spec.priority is None else spec.priority,
            "timeouts": spec.timeouts.model_dump(by_alias=True),
        }
        if run.tries and spec.retry.delay:
            request["notBefore"] = timestamp(self.now + spec.retry.delay)
        size = len(to_json(request))
        if size > self.bounds.request_bytes:
            raise ExpressionError(
                f"the request would have {size} bytes; {self.bounds.request_bytes} are allowed"
            )
        return StartJob(str(spec.action), request)

    def _child(self, identity: str, spec: Stage, names: dict[str, Any]) -> StartChild:
        variables = render(spec.variables, names)
        priority = self.state.priority if spec.priority is None else spec.priority
        return StartChild(identity, str(spec.workflow), variables, priority)

    def _names(self, name: str) -> dict[str, Any]:
        """What a stage's expressions see."""
        ended = {other: _told(stage) for other, stage in self.state.stages.items() if stage.phase not in OPEN}
        return {
            "workflow": self.state.context,
            "workflowId": self.state.workflow_id,
            "job": self._passed_on(name),
            "stages": ended,
        }

    def _passed_on(self, name: str) -> dict[str, Any]:
        """The job variables of the stages before; of several, the later in `needs` win."""
        found: dict[str, Any] = {}
        for need in self.plan.needs[name]:
            found |= self.state.stages[need].job
        return found

    # --- the workflow ------------------------------------------------------------------------------------

    def _finish(self) -> None:
        state = self.state
        state.finished_at = self.now
        phases = {stage.phase for stage in state.stages.values()}
        if state.cancel_requested and phases & {Phase.CANCELLED, Phase.NOT_RUN}:
            state.status, state.message = Status.CANCELLED, state.cancelled_by
        elif state.failed:
            error = state.error or {}
            said = f"{error.get('type', 'Failed')}: {error.get('message', '')}".removesuffix(": ")
            state.status, state.message = Status.FAILED, f"stage {state.failed}: {said}"
        else:
            state.status, state.message = Status.COMPLETED, ""
        self._count()
        self.note(state.status.value.capitalize(), reason=state.message)

    def _tell(self) -> None:
        state = self.state
        if state.status is not Status.RUNNING:
            return
        self._count()
        running = [name for name, stage in state.stages.items() if stage.phase is Phase.RUNNING]
        silent = [name for name in running if any(run.timed_out for run in state.stages[name].runs)]
        state.message = ", ".join(running[:10]) + (f"; timed out: {', '.join(silent[:10])}" if silent else "")
        if self._is_ending:
            state.message = (
                f"{'cancelling' if state.cancel_requested else f'{state.failed} failed'}: {state.message}"
            )

    def _count(self) -> None:
        stages = self.state.stages.values()
        done = sum(stage.phase not in OPEN for stage in stages)
        self.state.progress = 100 if self.state.status is Status.COMPLETED else 100 * done // len(stages)

    def note(self, event: str, stage: str = "", actor: str = "coordinator", reason: str = "") -> None:
        """Add a line to the history."""
        self.effects.append(Noted(event, stage, actor, reason))


def _is_true(condition: Expression | bool, names: Mapping[str, Any]) -> bool:
    found = condition.value(names) if isinstance(condition, Expression) else condition
    if not isinstance(found, bool):
        raise ExpressionError(
            f"when: {condition.source if isinstance(condition, Expression) else condition} is "
            "neither true nor false"
        )
    return found


def _lock_name(found: Any) -> str:
    name = found if isinstance(found, str) else to_json(found).decode()
    if not 1 <= len(name) <= 255:
        raise ExpressionError(f"locks: a resource's name has 1 to 255 characters, not {len(name)}")
    return name


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


def running(state: State, plan: Plan) -> Iterable[tuple[str, bool]]:
    """Execution ids that a workflow waits for, and whether each is a workflow."""
    for name, stage in state.stages.items():
        spec = plan.stages[name]
        for index, run in enumerate(stage.runs):
            if run.phase is Phase.RUNNING:
                which = index if stage.is_list else None
                yield execution_id(state.key, name, which, run.attempt), spec.workflow is not None
