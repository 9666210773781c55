"""The law of workflows: random graphs and outcomes against a naive interpreter; and each rule by itself."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jef_daemon.lifecycle import FINAL, Status
from jef_daemon.workflow import events, law
from jef_daemon.workflow.definition import Definition
from jef_daemon.workflow.plan import Plan, plan
from jef_daemon.workflow.state import Bounds, Phase, State, decode, encode, key_of, parsed

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
    return Definition.model_validate({"name": "w", "variables": {"x": 0}, "stages": stages})


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
        self.apply(events.Begun())

    # --- what is done to it ------------------------------------------------------------------------------

    def apply(self, event: events.Event) -> None:
        state = decode(encode(self.state))
        assert state == self.state
        effects = law.advance(self.plan, state, event, 1.0)
        self.state = state
        for effect in effects:
            if isinstance(effect, events.StartJob):
                self.asked(effect.request)
            elif isinstance(effect, events.CancelJob):
                assert self.jobs[effect.execution_id] == "open"
                self.asked_to_stop.add(effect.execution_id)
            elif isinstance(effect, events.Noted) and "goto" in effect.reason:
                self.went_past.add(effect.stage)

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

    @precondition(lambda self: self.state.status is Status.RUNNING)
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
        self.apply(events.Begun())

    @precondition(lambda self: not self.open_jobs())
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
        assert is_over == (self.state.status in FINAL)
        assert bool(self.open_jobs()) == (self.state.status not in FINAL), "neither forgotten nor early"

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
            assert self.state.status is (F if failed else C)

    @invariant()
    def always_is_always(self) -> None:
        if self.state.status in FINAL and not self.forced:
            ran = {name.split(":")[1] for name in self.jobs}
            assert {stage.name for stage in self.plan.last} <= ran

    @invariant()
    def the_context_is_what_the_interpreter_has(self) -> None:
        assert self.state.context == self.context
        running = {name for name, _ in law.running(self.state, self.plan)}
        assert running == set(self.open_jobs())

    def teardown(self) -> None:
        """Whatever happened: once every job ends, the workflow does."""
        if not hasattr(self, "plan"):
            return
        for _ in range(500):
            if not self.open_jobs():
                break
            self.end(self.open_jobs()[0], C, 1)
        assert self.state.status in FINAL


TestWorkflows = Workflows.TestCase


# --- rule by rule ----------------------------------------------------------------------------------------


class Course:
    """One workflow, driven by hand."""

    def __init__(self, *stages: dict[str, Any], bounds: Bounds = law.DEFAULTS, **more: Any) -> None:
        spelled = [{"action": "a"} | stage if "workflow" not in stage else stage for stage in stages]
        self.plan = plan(Definition.model_validate({"name": "w", "stages": spelled, **more}))
        self.state = law.new(self.plan, "w", {}, 0, 0.0)
        self.bounds = bounds
        self.effects: list[events.Effect] = []
        self.do(events.Begun())

    def do(self, event: events.Event) -> list[events.Effect]:
        self.state = decode(encode(self.state))
        new = law.advance(self.plan, self.state, event, 100.0, self.bounds)
        self.effects += new
        return new

    def end(self, name: str, status: Status = C, **more: Any) -> list[events.Effect]:
        found = parsed(f"w:{name}")
        assert found is not None
        _, stage, index, attempt = found
        return self.do(events.Ended(stage=stage, index=index, attempt=attempt, status=status, **more))

    def asked(self) -> list[str]:
        """Jobs that were asked for, in order."""
        jobs = [
            effect.request["executionId"] for effect in self.effects if isinstance(effect, events.StartJob)
        ]
        return [job.removeprefix("w:") for job in jobs]

    def request(self, name: str) -> dict[str, Any]:
        """The request for a job."""
        jobs = [effect.request for effect in self.effects if isinstance(effect, events.StartJob)]
        return next(job for job in jobs if job["executionId"] == f"w:{name}")

    def phases(self) -> dict[str, str]:
        return {name: stage.phase.value for name, stage in self.state.stages.items()}


def test_a_join_waits_for_all_and_later_needs_win() -> None:
    fork = {"name": "a"}, {"name": "b", "needs": []}, {"name": "c", "needs": ["b", "a"]}
    course = Course(*fork)
    assert course.asked() == ["a:1", "b:1"]
    course.end("a:1", job_variables={"k": "a", "only": 1})
    assert course.asked() == ["a:1", "b:1"]
    course.end("b:1", job_variables={"k": "b"})
    assert course.request("c:1")["jobContextVariables"] == {"k": "a", "only": 1}


def test_job_variables_reach_the_next_stage_and_no_further() -> None:
    course = Course({"name": "a"}, {"name": "b"}, {"name": "c"})
    course.end("a:1", job_variables={"k": 1}, workflow_variables={"v": 1})
    course.end("b:1")
    assert course.request("b:1")["jobContextVariables"] == {"k": 1}
    assert course.request("c:1")["jobContextVariables"] == {}
    assert course.request("c:1")["workflowContextVariables"] == {"v": 1}
    assert course.state.origins == {"v": "a"}


def test_only_a_completed_response_applies_variables() -> None:
    course = Course({"name": "a", "onFailure": "continue"}, {"name": "b"})
    course.end("a:1", F, job_variables={"k": 1}, workflow_variables={"v": 1})
    assert course.request("b:1")["jobContextVariables"] == {}
    assert course.state.context == {}


def test_a_skipped_stage_passes_on_what_it_was_given() -> None:
    course = Course({"name": "a"}, {"name": "b", "when": "job.k > 1"}, {"name": "c"})
    course.end("a:1", job_variables={"k": 1})
    assert course.asked() == ["a:1", "c:1"]
    assert course.request("c:1")["jobContextVariables"] == {"k": 1}
    assert course.phases()["b"] == "SKIPPED"


def test_goto_goes_past_what_lies_between() -> None:
    course = Course(
        {"name": "a", "onFailure": "goto d"}, {"name": "b"}, {"name": "c"}, {"name": "d"}, {"name": "e"}
    )
    course.end("a:1", F)
    assert course.asked() == ["a:1", "d:1"]
    course.end("d:1")
    course.end("e:1")
    skipped = {"b": "SKIPPED", "c": "SKIPPED"}
    assert course.phases() == {"a": "FAILED", **skipped, "d": "COMPLETED", "e": "COMPLETED"}
    assert course.state.status is C


def test_without_a_failure_the_target_of_a_goto_comes_in_its_turn() -> None:
    course = Course({"name": "a", "onFailure": "goto c"}, {"name": "b"}, {"name": "c"})
    course.end("a:1")
    assert course.asked() == ["a:1", "b:1"]


def test_a_list_is_filled_up_to_its_limit_and_collected_in_its_order() -> None:
    course = Course(
        {
            "name": "a",
            "forEach": ["x", "y", "z"],
            "limit": 2,
            "configuration": {"i": "{{ index }}{{ item }}"},
        },
        {"name": "b", "configuration": {"r": "{{ stages.a.result }}", "v": "{{ stages.a.variables[2].n }}"}},
    )
    assert course.asked() == ["a.0:1", "a.1:1"]
    course.end("a.1:1", result="second", job_variables={"n": 1})
    assert course.asked() == ["a.0:1", "a.1:1", "a.2:1"]
    assert course.request("a.2:1")["configuration"] == {"i": "2z"}
    course.end("a.2:1", result="third", job_variables={"n": 2})
    course.end("a.0:1", result="first", job_variables={"n": 0})
    assert course.request("b:1")["configuration"] == {"r": ["first", "second", "third"], "v": 2}
    assert course.request("b:1")["jobContextVariables"] == {"n": 2}


def test_a_retry_by_a_person_leaves_what_is_done() -> None:
    """Of a list too; attempts count on, and always stages run again."""
    course = Course({"name": "a", "forEach": [1, 2]}, {"name": "b"}, {"name": "z", "always": True})
    course.end("a.0:1", result="kept")
    course.end("a.1:1", F, error={"type": "E", "message": "m"})
    assert course.phases() == {"a": "FAILED", "b": "NOT_RUN", "z": "RUNNING"}
    course.end("z:1")
    assert (course.state.status, course.state.message) == (F, "stage a: E: m")
    course.do(events.RetryAsked(configuration={"a": {"more": 1}}))
    course.do(events.Begun())
    assert course.asked()[3:] == ["a.1:2"]
    assert course.request("a.1:2")["configuration"] == {"more": 1}
    for name in ("a.1:2", "b:1", "z:2"):
        course.end(name)
    assert course.state.status is C


def test_a_stage_is_tried_again_after_its_delay() -> None:
    course = Course({"name": "a", "retry": {"attempts": 2, "delay": 30}})
    course.end("a:1", F)
    assert course.request("a:2")["notBefore"] == "1970-01-01T00:02:10.000Z"
    course.end("a:2", F)
    assert course.state.status is F


def test_timed_out_fails_nothing_by_itself() -> None:
    course = Course({"name": "a"}, {"name": "b"})
    assert [type(effect) for effect in course.end("a:1", T, sequence=4)] == [events.Noted]
    assert course.state.message == "a; timed out: a"
    course.end("a:1", C, sequence=5)
    assert course.asked() == ["a:1", "b:1"]


@pytest.mark.parametrize(("rule", "then"), [("retry", ["a:1", "a:2"]), ("fail", ["a:1"])])
def test_a_timed_out_job_is_cancelled_before_anything_follows(rule: str, then: list[str]) -> None:
    course = Course({"name": "a", "onTimeout": rule, "retry": {"attempts": 2}})
    [cancel] = [effect for effect in course.end("a:1", T) if isinstance(effect, events.CancelJob)]
    assert (cancel.execution_id, cancel.force) == ("w:a:1", True)
    assert course.asked() == ["a:1"]
    course.end("a:1", X)
    assert course.asked() == then
    assert course.state.status is (Status.RUNNING if rule == "retry" else F)


def test_a_completion_that_was_first_wins_over_the_cancel_of_a_timed_out_job() -> None:
    course = Course({"name": "a", "onTimeout": "fail"}, {"name": "b"})
    course.end("a:1", T)
    course.end("a:1", C)
    assert course.asked() == ["a:1", "b:1"]


def test_what_runs_beside_a_failure_comes_to_its_end() -> None:
    course = Course({"name": "a"}, {"name": "b", "needs": []}, {"name": "c"}, {"name": "z", "always": True})
    course.end("a:1", F)
    assert course.asked() == ["a:1", "b:1"]
    course.end("b:1")
    assert course.asked() == ["a:1", "b:1", "z:1"]
    assert course.phases()["c"] == "NOT_RUN"


def test_a_cancel_stops_what_runs_and_cleans_up() -> None:
    course = Course({"name": "a"}, {"name": "b"}, {"name": "z", "always": True})
    [cancel] = [e for e in course.do(events.CancelAsked(reason="why")) if isinstance(e, events.CancelJob)]
    assert (cancel.execution_id, cancel.force) == ("w:a:1", False)
    course.end("a:1", X)
    assert course.asked() == ["a:1", "z:1"]
    course.end("z:1")
    assert (course.state.status, course.state.message) == (X, "why")


def test_variables_have_a_limit_and_an_error_that_says_so() -> None:
    course = Course({"name": "a"}, bounds=Bounds(variables_bytes=50))
    course.end("a:1", workflow_variables={"big": "x" * 100})
    assert course.state.status is F
    assert course.state.error == {
        "type": "VariablesTooLong",
        "message": "the workflow's variables would have 110 bytes; 50 are allowed",
    }


def test_an_expression_without_a_value_fails_its_stage() -> None:
    course = Course({"name": "a"}, {"name": "b", "configuration": {"x": "{{ job.size }}"}})
    course.end("a:1")
    assert course.state.message == "stage b: ExpressionError: job.size: there is no 'size'; there is: nothing"


def test_keys_are_fit_for_execution_ids_and_tell_workflows_apart() -> None:
    ids = ["w-9", "w:9", "w 9", "x" * 64, "x" * 65, "ä", "w-9:inner:1"]
    keys = [key_of(each) for each in ids]
    assert len(set(keys)) == len(ids)
    assert all(len(key) <= 64 and ":" not in key for key in keys)
    assert parsed("w-9:each.12:3") == ("w-9", "each", 12, 3)
    assert [parsed(each) for each in ("624", "a:b", "a:b:c", "a:b.x:1", ":b:1")] == [None] * 5
