"""The law of workflows: random graphs and outcomes against a naive interpreter. `test_workflow_rules` has each rule."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jef_daemon.lifecycle import FINAL, Status
from jef_daemon.lock.state import Mode
from jef_daemon.workflow import events, law
from jef_daemon.workflow.definition import Definition
from jef_daemon.workflow.plan import Plan, plan
from jef_daemon.workflow.state import Phase, State, decode, encode, parsed

C, F, X, T = Status.COMPLETED, Status.FAILED, Status.CANCELLED, Status.TIMED_OUT
OVER = {"COMPLETED", "FAILED", "SKIPPED", "CANCELLED", "NOT_RUN"}

# --- random ----------------------------------------------------------------------------------------------


@st.composite
def definitions(draw: st.DrawFn) -> Definition:
    """A graph without circles: each stage needs some of those before it."""
    count = draw(st.integers(1, 6))
    stages: list[dict[str, Any]] = []
    needed_by: dict[str, set[str]] = {}
    for number in range(count):
        before = [stage["name"] for stage in stages]
        stage: dict[str, Any] = {"name": f"s{number}", "action": "a"}
        if draw(st.booleans()):
            stage["needs"] = (
                draw(st.lists(st.sampled_from(before), unique=True, max_size=3)) if before else []
            )
        needs = stage.get("needs", before[-1:])
        needed_by[stage["name"]] = set(needs).union(*(needed_by[need] for need in needs))
        if draw(st.integers(0, 2)) == 0:
            stage["forEach"] = [f"i{item}" for item in range(draw(st.integers(0, 3)))]
            stage["limit"] = draw(st.integers(1, 3))
        if draw(st.integers(0, 3)) == 0:
            stage["when"] = "workflow.x < 3"
        stage["retry"] = {"attempts": draw(st.integers(1, 3))}
        stage["onFailure"] = draw(st.sampled_from(["fail", "continue"]))
        kinds = ["wait", "fail", *(["retry"] if stage["retry"]["attempts"] > 1 else [])]
        stage["onTimeout"] = draw(st.sampled_from(kinds))
        stages.append(stage)
    for stage in stages:
        behind = [other for other, needs in needed_by.items() if stage["name"] in needs]
        if behind and draw(st.integers(0, 4)) == 0:
            stage["onFailure"] = f"goto {draw(st.sampled_from(behind))}"
    last = range(draw(st.integers(0, 2)))
    stages += [{"name": f"z{number}", "action": "a", "always": True} for number in last]
    locks = {"locks": [{"resource": "r"}]} if draw(st.booleans()) else {}
    return Definition.model_validate({"name": "w", "variables": {"x": 0}, "stages": stages, **locks})


class Workflows(RuleBasedStateMachine):
    """One workflow, its jobs ended in any order and any way, everything told twice, cancelled, retried.

    Beside it goes an interpreter that knows only what it saw: which jobs were asked for and how each ended.
    """

    @initialize(definition=definitions())
    def start(self, definition: Definition) -> None:
        self.plan: Plan = plan(definition)
        self.state: State = law.new(self.plan, "w", {}, 0, 0.0)
        self.jobs: dict[str, str] = {}
        """Every job that was asked for: `open`, or how it ended."""
        self.asked_to_stop: set[str] = set()
        self.told: list[events.Ended] = []
        self.sequence = 0
        self.context: dict[str, Any] = {"x": 0}
        self.passed: dict[str, dict[int, dict[str, Any]]] = {}
        """What each stage passes on, by item."""
        self.cancelled = self.forced = False
        self.retries = 0
        self.went_past: set[str] = set()
        """Stages that a goto skipped: they were never asked whether they would run, and were given nothing."""
        self.locks = "free"
        """`asked`, `held`, `lost` or `free`."""
        self.ran = self.lost = self.refused = False
        self.begin()

    def begin(self) -> None:
        self.lost = self.refused = False
        self.apply(events.Begun())
        self.ran |= not self.plan.definition.locks
        assert (self.state.status is Status.WAITING_FOR_LOCK) == bool(self.plan.definition.locks)

    # --- what is done to it ------------------------------------------------------------------------------

    def apply(self, event: events.Event) -> None:
        state = decode(encode(self.state))
        assert state == self.state
        effects = law.advance(self.plan, state, event, 1.0)
        self.state = state
        for effect in effects:
            if isinstance(effect, events.StartJob):
                self.asked(json.loads(effect.body))
            elif isinstance(effect, events.CancelJob):
                assert self.jobs[effect.execution_id] == "open"
                self.asked_to_stop.add(effect.execution_id)
            elif isinstance(effect, events.AskLocks):
                assert effect.locks == (("r", Mode.EXCLUSIVE),)
                self.locks = "asked"
            elif isinstance(effect, events.ReleaseLocks):
                assert not self.open_jobs(), "nothing runs on without them"
                self.locks = "free"
            elif isinstance(effect, events.Noted) and "goto" in effect.reason:
                self.went_past.add(effect.stage)

    @precondition(lambda self: self.locks == "asked")
    @rule()
    def its_locks_are_granted(self) -> None:
        self.locks, self.ran = "held", True
        self.apply(events.LocksGranted(tokens={"r": 7}))

    @precondition(lambda self: self.locks == "asked")
    @rule(rarely=st.integers(0, 3))
    def its_locks_are_refused(self, rarely: int) -> None:
        if not rarely:
            self.refused = True
            self.apply(events.LocksRefused(reason="no"))

    @precondition(lambda self: self.locks == "held")
    @rule(rarely=st.integers(0, 3))
    def a_lock_is_lost(self, rarely: int) -> None:
        if rarely:
            return
        self.locks, self.lost = "lost", True
        ordinary = {
            job for job in self.open_jobs() if not self.plan.stages[job.split(":")[1].split(".")[0]].always
        }
        self.apply(events.LocksLost(reason="gone"))
        assert ordinary <= self.asked_to_stop

    @precondition(lambda self: self.open_jobs())
    @rule(which=st.integers(0, 9), outcome=st.sampled_from([C, C, C, F, F, X, T, T]), value=st.integers(1, 5))
    def end_a_job(self, which: int, outcome: Status, value: int) -> None:
        self.end(self.open_jobs()[which % len(self.open_jobs())], outcome, value)
        if which > 5:
            self.repeat(self.told[-1])

    @precondition(lambda self: self.asked_to_stop & set(self.open_jobs()))
    @rule(data=st.data())
    def a_cancelled_job_stops(self, data: st.DataObject) -> None:
        self.end(data.draw(st.sampled_from(sorted(self.asked_to_stop & set(self.open_jobs())))), X, 0)

    @precondition(lambda self: self.told)
    @rule(data=st.data())
    def something_is_told_again(self, data: st.DataObject) -> None:
        self.repeat(data.draw(st.sampled_from(self.told)))

    def repeat(self, event: events.Ended) -> None:
        before = copy.deepcopy(self.state)
        with pytest.raises(events.Refused):
            law.advance(self.plan, self.state, event, 2.0)
        assert self.state == before

    @precondition(lambda self: self.state.status in {Status.RUNNING, Status.WAITING_FOR_LOCK})
    @rule(force=st.booleans(), rarely=st.integers(0, 4))
    def cancel(self, force: bool, rarely: int) -> None:
        if rarely or (self.cancelled and not force):
            return
        self.cancelled, self.forced = True, self.forced or force
        self.apply(events.CancelAsked(force=force))

    @precondition(lambda self: self.state.status is F and self.retries < 3)
    @rule()
    def retry(self) -> None:
        self.retries += 1
        self.cancelled = self.forced = False
        self.apply(events.RetryAsked())
        assert self.state.status is Status.QUEUED
        self.begin()

    @precondition(lambda self: not self.open_jobs() and self.locks != "asked")
    @rule()
    def look(self) -> None:
        """Whatever it has come to."""

    # --- what the interpreter sees -----------------------------------------------------------------------

    def end(self, name: str, outcome: Status, value: int) -> None:
        found = parsed(name)
        assert found is not None
        _, stage, index, attempt = found
        self.sequence += 1
        variables: Any = (
            {"job_variables": {stage: value}, "workflow_variables": {"x": value}} if outcome is C else {}
        )
        event = events.Ended(
            stage=stage, index=index, attempt=attempt, status=outcome, sequence=self.sequence, **variables
        )
        if outcome is not T:
            self.jobs[name] = outcome.value
        if outcome is C:
            self.context = {**self.context, "x": value}
            self.passed.setdefault(stage, {})[index or 0] = {stage: value}
        self.told.append(event)
        self.apply(event)

    def asked(self, request: dict[str, Any]) -> None:
        name, stage = request["executionId"], request["stage"]
        assert name not in self.jobs, "a job is asked for once"
        _, _, index, _ = parsed(name) or ("", "", None, 0)
        done = (index or 0) in self.passed.get(stage, {})
        assert not done or self.plan.stages[stage].always, "what is done is not done again"
        self.jobs[name] = "open"
        assert request["workflowContextVariables"] == self.context
        assert request["jobContextVariables"] == self.expected(stage)
        for need in self.plan.needs[stage]:
            state = self.state.stages[need]
            assert state.phase in {Phase.COMPLETED, Phase.SKIPPED} or (
                state.phase is Phase.FAILED and self.plan.stages[need].on_failure != "fail"
            ), "no stage before its needs"
        if self.plan.stages[stage].always:
            ordinary = [each.name for each in self.plan.ordinary]
            assert not [job for job in self.open_jobs() if job.split(":")[1].split(".")[0] in ordinary]
        else:
            assert not self.cancelled
            assert not self.state.failed
            assert self.locks == ("held" if self.plan.definition.locks else "free")

    def expected(self, stage: str) -> dict[str, Any]:
        """What the stages before pass on: a skipped one, what it was given; a failed one, what of it was done."""
        found: dict[str, Any] = {}
        for need in self.plan.needs[stage]:
            is_skipped = self.state.stages[need].phase is Phase.SKIPPED
            if is_skipped and need not in self.went_past:
                found |= self.expected(need)
            elif not is_skipped:
                for _, passed in sorted(self.passed.get(need, {}).items()):
                    found |= passed
        return found

    def open_jobs(self) -> list[str]:
        return sorted(name for name, how in self.jobs.items() if how == "open")

    # --- what is always so -------------------------------------------------------------------------------

    @invariant()
    def it_ends_when_and_only_when_its_stages_have(self) -> None:
        is_over = all(stage.phase.value in OVER for stage in self.state.stages.values())
        # Whoever retries what failed for a lost lock alone asks for the locks once more, and ends when it has them.
        is_retried = self.state.status is Status.WAITING_FOR_LOCK
        assert is_over == (self.state.status in FINAL) or (is_over and is_retried)
        assert bool(self.open_jobs()) == (self.state.status is Status.RUNNING), "neither forgotten nor early"
        assert (self.locks == "asked") == (self.state.status is Status.WAITING_FOR_LOCK)
        assert self.locks == "free" or self.state.status not in FINAL

    @invariant()
    def its_status_is_what_its_stages_make_it(self) -> None:
        if self.state.status not in FINAL:
            return
        phases = {stage.phase for stage in self.state.stages.values()}
        failed = [
            name
            for name, stage in self.state.stages.items()
            if stage.phase is Phase.FAILED and self.plan.stages[name].on_failure == "fail"
        ]
        if self.cancelled and phases & {Phase.CANCELLED, Phase.NOT_RUN}:
            assert self.state.status is X
        else:
            assert self.state.status is (F if failed or self.lost or self.refused else C)

    @invariant()
    def whoever_goes_on_has_left_nothing_out(self) -> None:
        """Of no list a job: but where a goto goes past the rest of its own."""
        if self.state.status is C or (self.state.status is Status.RUNNING and not self.is_ending()):
            for name, stage in self.state.stages.items():
                phases = {run.phase for run in stage.runs}
                left_out = phases & {Phase.CANCELLED, Phase.NOT_RUN}
                assert stage.phase.value not in OVER or not left_out or self.plan.stages[name].goto

    def is_ending(self) -> bool:
        return self.cancelled or self.lost or self.state.error is not None

    @invariant()
    def always_is_always(self) -> None:
        if self.state.status in FINAL and self.ran and not self.forced:
            ran = {name.split(":")[1] for name in self.jobs}
            assert {stage.name for stage in self.plan.last} <= ran

    @invariant()
    def the_context_is_what_the_interpreter_has(self) -> None:
        assert self.state.context == self.context
        assert sorted(law.running(self.state)) == self.open_jobs()

    def teardown(self) -> None:
        """Whatever happened: once every job ends, the workflow does."""
        if not hasattr(self, "plan"):
            return
        if self.locks == "asked":
            self.its_locks_are_granted()
        for _ in range(500):
            if not self.open_jobs():
                break
            self.end(self.open_jobs()[0], C, 1)
        assert self.state.status in FINAL


TestWorkflows = Workflows.TestCase
