"""The law of workflows, each rule by itself: a job for each item of a list, their common end, what a retry leaves."""

from __future__ import annotations

import pytest

from jef_daemon.lifecycle import Status
from jef_daemon.workflow import events
from jef_daemon.workflow.state import Phase
from tests.support.courses import Course

C, F, X = Status.COMPLETED, Status.FAILED, Status.CANCELLED


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
    assert course.noted() == ["Begun", "Started a.0", "Started a.1"]
    course.end("a.1:1", result="second", job_variables={"n": 1})
    assert course.asked() == ["a.0:1", "a.1:1", "a.2:1"]
    assert course.request("a.2:1")["configuration"] == {"i": "2z"}
    course.end("a.2:1", result="third", job_variables={"n": 2})
    course.end("a.0:1", result="first", job_variables={"n": 0})
    assert course.request("b:1")["configuration"] == {"r": ["first", "second", "third"], "v": 2}
    assert course.request("b:1")["jobContextVariables"] == {"n": 2}
    assert course.noted()[3:5] == ["Completed a.1", "Started a.2"]


@pytest.mark.parametrize(
    ("rule", "then"),
    [("continue", ["a.0:1", "a.1:1", "a.2:1"]), ("fail", ["a.0:1"]), ("goto b", ["a.0:1", "b:1"])],
)
def test_a_failure_in_a_list_ends_it_unless_it_may_go_on(rule: str, then: list[str]) -> None:
    course = Course({"name": "a", "forEach": [1, 2, 3], "limit": 1, "onFailure": rule}, {"name": "b"})
    course.end("a.0:1", F)
    if rule == "continue":
        course.end("a.1:1")
    assert course.asked() == then
    phases = [run.phase.value for run in course.state.stages["a"].runs]
    assert phases == (
        ["FAILED", "COMPLETED", "RUNNING"] if rule == "continue" else ["FAILED", "NOT_RUN", "NOT_RUN"]
    )


@pytest.mark.parametrize(("rule", "then"), [("fail", ["a.0:1"]), ("continue", ["a.0:1", "a.2:1"])])
def test_an_item_without_a_value_ends_its_list_as_any_failure_does(rule: str, then: list[str]) -> None:
    items = [{"k": 1}, {}, {"k": 3}]
    stage = {"name": "a", "forEach": items, "configuration": {"x": "{{ item.k }}"}, "onFailure": rule}
    course = Course(stage)
    assert course.asked() == then
    phases = [run.phase.value for run in course.state.stages["a"].runs]
    assert phases == ["RUNNING", "FAILED", "RUNNING" if rule == "continue" else "NOT_RUN"]


def test_a_list_may_be_as_long_as_is_allowed() -> None:
    course = Course({"name": "a", "forEach": "workflow.long"}, variables={"long": list(range(1000))})
    assert len(course.asked()) == 1000


def test_a_job_that_is_tried_again_counts_as_one_that_runs() -> None:
    """Its failure before that ends no list."""
    course = Course({"name": "a", "forEach": [1, 2], "limit": 1, "retry": {"attempts": 2}})
    course.end("a.0:1", F)
    assert course.asked() == ["a.0:1", "a.0:2"]
    course.end("a.0:2")
    assert course.asked() == ["a.0:1", "a.0:2", "a.1:1"]


def test_a_retry_looks_at_the_list_as_it_is_by_then() -> None:
    """For what is to be done; what is done keeps the item that it was done for."""
    stage = {"name": "a", "forEach": "workflow.l", "configuration": {"i": "{{ item }}"}}
    course = Course(stage, variables={"l": [1, 2]})
    course.end("a.0:1", workflow_variables={"l": [3, 4]})
    course.end("a.1:1", F)
    course.do(events.RetryAsked())
    course.do(events.Begun())
    assert course.request("a.1:2")["configuration"] == {"i": 4}
    assert [run.item for run in course.state.stages["a"].runs] == [1, 4]


def test_a_retry_of_a_list_of_another_length_begins_it_anew() -> None:
    """Above all the attempts that there were: no job has the id of another. What was done before is not passed on."""
    course = Course(
        {"name": "a", "forEach": "workflow.l"},
        {"name": "b", "configuration": {"e": "{{ stages.a.error }}"}},
        variables={"l": [1, 2]},
    )
    course.end("a.0:1", job_variables={"k": 1}, workflow_variables={"l": [3]})
    course.end("a.1:1", F)
    course.do(events.RetryAsked())
    course.do(events.Begun())
    assert course.asked()[2:] == ["a.0:2"]
    assert course.state.finished_at is None
    course.end("a.0:2", job_variables={"m": 1})
    assert course.request("b:1")["jobContextVariables"] == {"m": 1}
    assert course.request("b:1")["configuration"] == {"e": None}


def test_a_list_that_may_fail_and_of_which_one_failed_has_failed_and_passes() -> None:
    """With the error of the first in its order, whichever failed first."""
    course = Course({"name": "a", "forEach": [1, 2, 3], "onFailure": "continue"}, {"name": "b"})
    course.end("a.2:1", F, error={"type": "E", "message": "third"})
    course.end("a.1:1", F, error={"type": "E", "message": "second"})
    course.end("a.0:1")
    assert course.phases() == {"a": "FAILED", "b": "RUNNING"}
    assert course.state.stages["a"].error == {"type": "E", "message": "second"}


# --- a list that is cut short ----------------------------------------------------------------------------


def test_what_waits_to_be_tried_again_has_failed_with_its_list() -> None:
    """It has run, and it says why it failed: no person is to take it for one that never began."""
    course = Course({"name": "a", "forEach": [1, 2], "retry": {"attempts": 2}})
    course.end("a.0:1", F)
    course.end("a.0:2", F)
    course.end("a.1:1", F, error={"type": "E", "message": "m"})
    assert course.asked() == ["a.0:1", "a.1:1", "a.0:2"]
    runs = course.state.stages["a"].runs
    assert [run.phase for run in runs] == [Phase.FAILED, Phase.FAILED]
    assert runs[1].error == {"type": "E", "message": "m"}


def test_a_list_that_may_fail_is_cancelled_where_a_cancel_cuts_it_short() -> None:
    """It has not passed: the workflow is no COMPLETED one."""
    course = Course({"name": "a", "forEach": [1, 2], "limit": 1, "onFailure": "continue"})
    course.end("a.0:1", F)
    course.do(events.CancelAsked(reason="why"))
    course.end("a.1:1", X)
    assert (course.phases(), course.state.status, course.state.message) == ({"a": "CANCELLED"}, X, "why")


def test_a_list_that_may_fail_and_was_cut_short_goes_on_after_a_retry() -> None:
    """With what failed of it too; what comes behind it waits for all."""
    parts = {"name": "a", "forEach": [1, 2, 3], "limit": 2, "onFailure": "continue"}
    course = Course(parts, {"name": "b", "needs": []}, {"name": "c", "needs": "a"})
    course.end("b:1", F)
    course.end("a.0:1", F)
    course.end("a.1:1")
    assert course.phases() == {"a": "NOT_RUN", "b": "FAILED", "c": "NOT_RUN"}
    course.do(events.RetryAsked())
    course.do(events.Begun())
    assert course.asked()[3:] == ["a.0:2", "a.2:1", "b:2"]
    for name in ("a.0:2", "a.2:1", "b:2"):
        course.end(name)
    assert course.phases() == {"a": "COMPLETED", "b": "COMPLETED", "c": "RUNNING"}


def test_what_failed_before_a_retry_and_waits_again_has_not_failed_since() -> None:
    parts = {"name": "a", "forEach": [1, 2, 3], "limit": 1, "onFailure": "continue"}
    course = Course(parts, {"name": "b", "needs": []})
    course.end("a.0:1", F)
    course.end("b:1", F)
    course.end("a.1:1", F)
    course.do(events.RetryAsked())
    course.do(events.Begun())
    course.do(events.CancelAsked())
    course.end("a.0:2", X)
    runs = course.state.stages["a"].runs
    assert [run.phase for run in runs] == [Phase.CANCELLED, Phase.NOT_RUN, Phase.NOT_RUN]


def test_a_cancel_by_force_begins_nothing_though_what_it_stops_is_done_first() -> None:
    """The rest of a list that cleans up would run on, and nobody would have asked it to stop."""
    cleaning = {"name": "z", "always": True, "forEach": [1, 2, 3], "limit": 1}
    course = Course({"name": "a", "when": False}, cleaning)
    course.end("z.0:1")
    course.do(events.CancelAsked(force=True))
    course.end("z.1:1")
    assert course.asked() == ["z.0:1", "z.1:1"]
    runs = course.state.stages["z"].runs
    assert [run.phase for run in runs] == [Phase.COMPLETED, Phase.COMPLETED, Phase.NOT_RUN]
    assert (course.phases()["z"], course.state.status) == ("NOT_RUN", X)
