"""The law of workflows, each rule by itself: who starts when, with which variables. Beside: ends, lists, locks."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic_core import to_json

from jef_daemon.lifecycle import Status
from jef_daemon.workflow import events, law
from jef_daemon.workflow.definition import Definition
from jef_daemon.workflow.plan import plan
from jef_daemon.workflow.state import Bounds, decode, encode, key_of, parsed
from tests.support.courses import Course

C, F, X, T = Status.COMPLETED, Status.FAILED, Status.CANCELLED, Status.TIMED_OUT


def test_a_workflow_begins_with_what_its_request_brings() -> None:
    """And with what its definition says beside; without what that requires it does not begin."""
    stages = [{"name": "a", "action": "a"}]
    spelled = {"name": "w", "variables": {"x": 0, "y": 0}, "required": ["asset", "source"], "stages": stages}
    ready = plan(Definition.model_validate(spelled))
    with pytest.raises(events.Refused, match="variables: asset, source required by the workflow 'w'"):
        law.check(ready, {"asset": None}, Bounds())
    with pytest.raises(
        events.Refused, match="variables: the workflow's variables would have 45 bytes; 44 are"
    ):
        law.check(ready, {"asset": 1, "source": "0123456789"}, Bounds(variables_bytes=44))
    law.check(ready, {"asset": 1, "source": "0123456789"}, Bounds(variables_bytes=45))
    state = law.new(ready, "w", {"asset": 1, "source": 2, "x": 3}, 5, 7.0)
    assert state.context == {"x": 3, "y": 0, "asset": 1, "source": 2}
    said = {"x": "request", "y": "definition", "asset": "request", "source": "request"}
    assert (state.origins, state.priority, state.created_at) == (said, 5, 7.0)


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
    assert events.Noted("Skipped", "b", reason="job.k > 1 is false") in course.effects


def test_goto_goes_past_what_lies_between() -> None:
    course = Course(
        {"name": "a", "onFailure": "goto d"}, {"name": "b"}, {"name": "c"}, {"name": "d"}, {"name": "e"}
    )
    course.end("a:1", F)
    assert course.asked() == ["a:1", "d:1"]
    assert events.Noted("Skipped", "b", reason="a failed: goto d") in course.effects
    course.end("d:1")
    course.end("e:1")
    skipped = {"b": "SKIPPED", "c": "SKIPPED"}
    assert course.phases() == {"a": "FAILED", **skipped, "d": "COMPLETED", "e": "COMPLETED"}
    assert course.state.status is C


def test_without_a_failure_the_target_of_a_goto_comes_in_its_turn() -> None:
    course = Course({"name": "a", "onFailure": "goto c"}, {"name": "b"}, {"name": "c"})
    course.end("a:1")
    assert course.asked() == ["a:1", "b:1"]


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
    assert "notBefore" not in course.request("a:1")
    assert course.request("a:2")["notBefore"] == "1970-01-01T00:02:10.000Z"
    assert course.state.stages["a"].runs[0].finished_at is None
    course.end("a:2", F)
    assert course.state.status is F


def test_whoever_retries_has_all_attempts_again() -> None:
    """The first of them at once."""
    course = Course({"name": "a", "retry": {"attempts": 2, "delay": 30}})
    course.end("a:1", F)
    course.end("a:2", F)
    course.do(events.RetryAsked())
    course.do(events.Begun())
    course.end("a:3", F)
    assert course.asked() == ["a:1", "a:2", "a:3", "a:4"]
    assert "notBefore" not in course.request("a:3")
    assert "notBefore" in course.request("a:4")
    course.end("a:4", F)
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
    assert course.state.message == "a failed: b"
    course.end("b:1")
    assert course.asked() == ["a:1", "b:1", "z:1"]
    assert course.phases()["c"] == "NOT_RUN"


def test_a_cancel_stops_what_runs_and_cleans_up() -> None:
    course = Course({"name": "a"}, {"name": "b"}, {"name": "z", "always": True})
    [cancel] = [e for e in course.do(events.CancelAsked(reason="why")) if isinstance(e, events.CancelJob)]
    assert (cancel.execution_id, cancel.force, cancel.reason) == ("w:a:1", False, "why")
    assert course.state.message == "cancelling: a"
    course.end("a:1", X)
    assert course.asked() == ["a:1", "z:1"]
    course.end("z:1")
    assert (course.state.status, course.state.message) == (X, "why")


def test_what_is_done_stays_done_in_a_workflow_that_is_cancelled() -> None:
    """Whoever cleans up finds it."""
    cleaning = {"name": "z", "always": True, "configuration": {"r": "{{ stages.a.result }}"}}
    course = Course({"name": "a", "forEach": [1, 2, 3], "limit": 1}, cleaning)
    course.end("a.0:1", result="done")
    course.do(events.CancelAsked())
    course.end("a.1:1", X)
    assert course.request("z:1")["configuration"] == {"r": ["done", None, None]}


def test_variables_have_a_limit_and_an_error_that_says_so() -> None:
    most = Course({"name": "a"}, bounds=Bounds(variables_bytes=110))
    most.end("a:1", workflow_variables={"big": "x" * 100})
    assert most.state.status is C
    course = Course({"name": "a", "retry": {"attempts": 2}}, bounds=Bounds(variables_bytes=50))
    course.end("a:1", workflow_variables={"big": "x" * 100})
    assert course.state.status is F, "another job would answer the same"
    assert course.state.error == {
        "type": "VariablesTooLong",
        "message": "the workflow's variables would have 110 bytes; 50 are allowed",
    }


def test_what_nests_too_deep_is_no_request_and_no_variable() -> None:
    """Nobody could read it again; so nothing is asked for, and nothing kept."""
    value: Any = 1
    for _ in range(98):
        value = [value]
    deep = {"name": "b", "configuration": {"x": ["{{ job.x }}"]}}
    fits, beyond = Course({"name": "a"}, deep), Course({"name": "a"}, deep)
    fits.end("a:1", job_variables={"x": value}, workflow_variables={"x": [value]})
    assert fits.request("b:1")["configuration"] == {"x": [value]}
    beyond.end("a:1", job_variables={"x": [value]})
    said = "stage b: ExpressionError: the configuration would nest deeper than 100 levels"
    assert beyond.state.message == said
    course = Course({"name": "a"})
    course.end("a:1", workflow_variables={"x": [[value]]})
    assert course.state.message == "stage a: VariablesTooLong: they nest deeper than 100 levels"
    for _ in range(95):
        value = [value]
    course = Course({"name": "a"}, {"name": "b"})
    course.end("a:1", job_variables={"x": value})
    assert decode(encode(course.state)) == course.state
    assert course.state.message == "stage a: VariablesTooLong: they nest deeper than 100 levels"


def test_an_item_that_nobody_could_read_again_is_none() -> None:
    """It is kept with the workflow: one number in it that no reader takes, and all of it is lost."""
    course = Course({"name": "a"}, {"name": "b", "forEach": "[job.x * job.x]"})
    course.end("a:1", job_variables={"x": 10**4000})
    assert course.state.message.endswith("a number is too large: it has more than 4300 digits")
    assert decode(encode(course.state)) == course.state


def test_an_expression_without_a_value_fails_its_stage() -> None:
    course = Course({"name": "a"}, {"name": "b", "configuration": {"x": "{{ job.size }}"}})
    course.end("a:1")
    assert course.state.message == "stage b: ExpressionError: job.size: there is no 'size'; there is: nothing"


def test_keys_are_fit_for_execution_ids_and_tell_workflows_apart() -> None:
    ids = ["w-9", "w:9", "w 9", "x" * 64, "x" * 65, "ä", "w-9:inner:1"]
    keys = [key_of(each) for each in ids]
    assert len(set(keys)) == len(ids)
    assert all(len(key) <= 64 and ":" not in key for key in keys)
    assert key_of("x" * 64) == "x" * 64
    assert parsed("w-9:each.12:3") == ("w-9", "each", 12, 3)
    others = ("624", "a:b", "a:b:c", "a:b.x:1", ":b:1", "a::1", "a:b:\N{ARABIC-INDIC DIGIT ONE}")
    assert [parsed(each) for each in (*others, "a:b.\N{ARABIC-INDIC DIGIT ONE}:1")] == [None] * 8


def test_what_an_earlier_version_kept_and_this_one_does_not_know_is_left_out() -> None:
    state = Course({"name": "a"}).state
    kept = {**json.loads(encode(state)), "began": True}
    assert decode(json.dumps(kept)) == state


# --- expressions and requests -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ({"forEach": "workflow.n"}, "forEach: workflow.n is no list"),
        ({"forEach": "workflow.long"}, "forEach: the list has 1001 items; 1000 are allowed"),
        ({"when": "workflow.n"}, "when: workflow.n is neither true nor false"),
        ({"when": "workflow.n.m"}, "workflow.n.m: a number has no 'm'"),
        (
            {"locks": [{"resource": "{{ workflow.name }}"}]},
            "locks: a resource's name has 1 to 255 characters, not 256",
        ),
        (
            {"locks": [{"resource": "{{ workflow.none }}"}]},
            "locks: a resource's name has 1 to 255 characters, not 0",
        ),
    ],
)
def test_an_expression_of_the_wrong_kind_fails_its_stage(stage: dict[str, Any], said: str) -> None:
    """And the history tells it, as no job will."""
    variables = {"n": 1, "long": list(range(1001)), "name": "x" * 256, "none": ""}
    course = Course({"name": "a", **stage}, variables=variables)
    assert course.state.error == {"type": "ExpressionError", "message": said}
    noted = [effect for effect in course.effects if isinstance(effect, events.Noted)]
    assert [(each.event, each.stage, each.reason) for each in noted] == [
        *(("Begun", "", ""), ("Failed", "a", said), ("Failed", "", f"stage a: ExpressionError: {said}"))
    ]
    assert course.asked() == []


def test_a_second_job_without_a_delay_starts_when_it_can() -> None:
    course = Course({"name": "a", "retry": {"attempts": 2}})
    course.end("a:1", F)
    assert "notBefore" not in course.request("a:2")


def test_a_stage_has_the_workflows_priority_unless_it_says_another() -> None:
    """Its jobs, and the workflow that it is."""
    inner = {"workflow": "other", "needs": []}
    course = Course(
        *({"name": "a"}, {"name": "b", "needs": [], "priority": 0}),
        *({"name": "c", **inner}, {"name": "d", "priority": 0, **inner}),
        begins=False,
    )
    course.state.priority = 7
    course.do(events.Begun())
    assert [course.request(name)["priority"] for name in ("a:1", "b:1")] == [7, 0]
    children = [effect.priority for effect in course.effects if isinstance(effect, events.StartChild)]
    assert children == [7, 0]


def test_expressions_see_stages_that_have_ended_and_no_others() -> None:
    course = Course(
        {"name": "a"},
        {"name": "b", "needs": []},
        {"name": "c", "needs": "a", "configuration": {"x": "{{ stages }}"}},
    )
    course.end("a:1", result="done", job_variables={"k": 1})
    seen = course.request("c:1")["configuration"]["x"]
    assert seen == {"a": {"status": "COMPLETED", "error": None, "result": "done", "variables": {"k": 1}}}


def test_a_request_says_all_that_a_job_is_to_know() -> None:
    stage = {
        "name": "a",
        "configuration": {"of": "{{ workflowId }}", "more": 1},
        "locks": [{"resource": "r", "mode": "SHARED"}],
        "timeouts": {"queue": 1, "update": 2},
        "priority": 3,
    }
    assert Course(stage, variables={"v": 1}).request("a:1") == {
        "executionId": "w:a:1",
        "workflowId": "w",
        "stage": "a",
        "configuration": {"of": "w", "more": 1},
        "jobContextVariables": {},
        "workflowContextVariables": {"v": 1},
        "locks": [{"resource": "r", "mode": "SHARED"}],
        "priority": 3,
        "timeouts": {"queue": 1, "lock": None, "update": 2, "execution": None},
    }


def test_a_request_has_a_limit_and_an_error_that_says_so() -> None:
    stage = {"name": "a", "configuration": {"x": "y" * 300}}
    most = len(to_json(Course(stage).request("a:1")))
    assert Course(stage, bounds=Bounds(request_bytes=most)).asked() == ["a:1"]
    course = Course(stage, bounds=Bounds(request_bytes=300))
    assert "bytes; 300 are allowed" in course.state.message
    assert course.asked() == []


def test_a_workflow_that_gives_in_waits_for_its_jobs_and_lets_what_cleans_up_go_on() -> None:
    course = Course({"name": "a"}, {"name": "b", "needs": []}, {"name": "z", "always": True})
    given_in = events.Broken(reason="a fault", of=events.Ended(stage="a", index=None, attempt=1, status=T))
    effects = course.do(given_in)
    assert [each.execution_id for each in effects if isinstance(each, events.CancelJob)] == ["w:a:1", "w:b:1"]
    assert course.state.message == "the coordinator cannot go on: a, b", "a is TIMED_OUT: that is no end"
    course.end("a:1", X)
    course.end("b:1", C)
    assert course.asked()[-1] == "z:1"
    assert not [each for each in course.do(given_in) if isinstance(each, events.CancelJob)]
    course.end("z:1")
    assert (course.state.status, course.state.message) == (F, "CoordinatorFault: a fault")
    assert course.phases() == {"a": "CANCELLED", "b": "COMPLETED", "z": "COMPLETED"}
    with pytest.raises(events.Refused):
        course.do(given_in)
