"""The law of workflows, each rule by itself: how jobs, stages and workflows end, what is refused, what is noted."""

from __future__ import annotations

import pytest

from jef_daemon.lifecycle import Status
from jef_daemon.workflow import events
from tests.support.courses import Course

C, F, X, T = Status.COMPLETED, Status.FAILED, Status.CANCELLED, Status.TIMED_OUT


# --- what is refused -------------------------------------------------------------------------------------


def test_what_does_not_concern_it_is_refused_and_says_why() -> None:
    course = Course({"name": "a", "forEach": [1]}, {"name": "b"})
    refused: list[tuple[events.Event, str]] = [
        (events.Begun(), "it is RUNNING"),
        (events.RetryAsked(), "it is RUNNING: only a FAILED one is retried"),
        (ending("c"), "no such stage"),
        (ending("a", index=1), "no such stage"),
        (ending("a", index=None), "not a job that it waits for"),
        (ending("a", index=0, attempt=2), "not a job that it waits for"),
        (ending("b"), "no such stage"),
    ]
    for event, why in refused:
        with pytest.raises(events.Refused, match=why):
            course.do(event)
    course.do(events.CancelAsked())
    with pytest.raises(events.Refused, match="it is being cancelled already; force does not wait"):
        course.do(events.CancelAsked())
    course.do(events.CancelAsked(force=True))
    course.end("a.0:1", X)
    with pytest.raises(events.Refused, match="it is CANCELLED already"):
        course.do(events.CancelAsked(force=True))
    with pytest.raises(events.Refused, match="it is CANCELLED: only"):
        course.do(events.RetryAsked())


def ending(stage: str, index: int | None = None, attempt: int = 1) -> events.Ended:
    return events.Ended(stage=stage, index=index, attempt=attempt, status=C)


def test_a_retry_of_a_stage_that_there_is_not_is_refused() -> None:
    course = Course({"name": "a"}, {"name": "b"})
    course.end("a:1", F)
    with pytest.raises(events.Refused, match="there is no stage 'x'; there is a, b"):
        course.do(events.RetryAsked(configuration={"b": {}, "x": {}}))


def test_a_configuration_for_a_stage_that_has_none_is_refused() -> None:
    """Another workflow has variables, by its definition: what a person gave would be lost without a word."""
    course = Course({"name": "a", "workflow": "other"})
    course.end("a:1", F)
    with pytest.raises(events.Refused, match="stage 'a' is the workflow 'other', which has none"):
        course.do(events.RetryAsked(configuration={"a": {"x": 1}}))


def test_what_a_retry_changed_is_taken_back_by_null() -> None:
    """A misspelled key that the action refuses would else fail every further one."""
    course = Course({"name": "a", "configuration": {"crf": 20, "preset": "slow"}})
    course.end("a:1", F)
    for changes in ({"crf": 30, "pressett": "fast"}, {"pressett": None, "preset": "fast"}, {"crf": None}):
        course.do(events.RetryAsked(configuration={"a": changes}))
        course.do(events.Begun())
        course.end(f"a:{course.state.stages['a'].last_attempt}", F)
    assert [course.request(f"a:{attempt}")["configuration"] for attempt in (2, 3, 4)] == [
        {"crf": 30, "preset": "slow", "pressett": "fast"},
        {"crf": 30, "preset": "fast"},
        {"crf": 20, "preset": "fast"},
    ]


@pytest.mark.parametrize(
    ("ends", "outcome"), [(C, "COMPLETED"), (F, "FAILED"), (X, "FAILED"), (None, "CANCELLED")]
)
def test_what_cleans_up_knows_what_the_workflow_comes_to(ends: Status | None, outcome: str) -> None:
    """So it may keep for a retry what is done."""
    told = {"name": "z", "always": True, "configuration": {"outcome": "{{ outcome }}"}}
    kept = {"name": "y", "always": True, "when": "outcome != 'FAILED'"}
    course = Course({"name": "a"}, {"name": "b"}, told, kept)
    if ends is None:
        course.do(events.CancelAsked(actor="ann"))
    course.end("a:1", ends or X)
    if ends is C:
        course.end("b:1")
    assert course.request("z:1")["configuration"] == {"outcome": outcome}
    course.end("z:1")
    assert course.phases()["y"] == ("SKIPPED" if outcome == "FAILED" else "RUNNING")


def test_what_cleans_up_is_told_what_then_is_the_end() -> None:
    """Of a list a job had failed before the rest was stopped: the stage has FAILED, and so has the workflow."""
    told = {"name": "z", "always": True, "configuration": {"outcome": "{{ outcome }}"}}
    course = Course({"name": "a", "forEach": [1, 2]}, told)
    course.end("a.0:1", F)
    course.do(events.CancelAsked(actor="ann"))
    course.end("a.1:1", X)
    assert course.request("z:1")["configuration"] == {"outcome": "FAILED"}
    course.end("z:1")
    assert course.state.status is F


def test_a_job_ends_once() -> None:
    """Also where whoever tells it counts nothing."""
    course = Course({"name": "a"}, {"name": "b"})
    course.end("a:1")
    with pytest.raises(events.Refused, match="not a job that it waits for"):
        course.end("a:1", F)


def test_a_timed_out_job_is_tried_again_once_it_is_stopped() -> None:
    """The history tells why; what it had told before is no news of the next."""
    course = Course({"name": "a", "onTimeout": "retry", "retry": {"attempts": 2}})
    course.end("a:1", T, sequence=9)
    with pytest.raises(events.Refused):
        course.end("a:1", T, sequence=9)
    course.end("a:1", X, sequence=10)
    course.end("a:2", C, sequence=1)
    assert course.noted() == [
        *("Begun", "Started a", "TimedOut a", "Retried a", "Started a", "Completed a", "Completed")
    ]
    assert events.Noted("Retried", "a", reason="its job was TIMED_OUT and is cancelled") in course.effects


def cancels(effects: list[events.Effect]) -> list[str]:
    return [effect.execution_id for effect in effects if isinstance(effect, events.CancelJob)]


def test_a_timed_out_job_is_stopped_once_and_tried_as_often_as_it_may() -> None:
    course = Course({"name": "a", "onTimeout": "retry", "retry": {"attempts": 2}})
    assert cancels(course.end("a:1", T, sequence=1)) == ["w:a:1"]
    assert cancels(course.end("a:1", T, sequence=2)) == []
    course.end("a:1", X, sequence=3)
    assert cancels(course.end("a:2", T, sequence=1)) == ["w:a:2"]
    course.end("a:2", X, sequence=2)
    assert course.asked() == ["a:1", "a:2"]
    assert course.state.message == "stage a: TimedOut: its job was TIMED_OUT"


def test_a_timed_out_job_that_fails_before_it_is_stopped_is_tried_again() -> None:
    """The next is another job: silent in its turn, it is stopped as the first was to be."""
    course = Course({"name": "a", "onTimeout": "retry", "retry": {"attempts": 3}})
    course.end("a:1", T)
    course.end("a:1", F, sequence=1)
    assert course.asked() == ["a:1", "a:2"]
    assert course.state.message == "a"
    assert cancels(course.end("a:2", T)) == ["w:a:2"]


def test_of_a_list_the_job_that_timed_out_is_stopped() -> None:
    course = Course({"name": "a", "onTimeout": "fail", "forEach": [1, 2, 3]})
    assert cancels(course.end("a.1:1", T)) == ["w:a.1:1"]
    assert cancels(course.end("a.0:1", T)) == ["w:a.0:1"]


def test_a_job_that_somebody_cancelled_has_failed_without_another() -> None:
    """Nobody asked the workflow; who did it did not want it tried again."""
    course = Course({"name": "a", "retry": {"attempts": 3}}, {"name": "b"})
    course.end("a:1", X, reason="wrong file")
    assert course.asked() == ["a:1"]
    assert course.state.error == {"type": "Cancelled", "message": "wrong file"}
    unsaid = Course({"name": "a"})
    unsaid.end("a:1", X)
    assert unsaid.state.error == {"type": "Cancelled", "message": "its job was cancelled"}


def test_a_job_that_fails_in_a_workflow_that_has_failed_has_no_other() -> None:
    """But what cleans up is tried as often as it may be."""
    twice = {"retry": {"attempts": 2}}
    course = Course(
        {"name": "a", **twice}, {"name": "b", "needs": []}, {"name": "z", "always": True, **twice}
    )
    course.end("b:1", F)
    course.end("a:1", F)
    course.end("z:1", F)
    assert course.asked() == ["a:1", "b:1", "z:1", "z:2"]
    assert [each for each in course.noted() if each.endswith(" a")] == ["Started a", "Failed a"]


def test_of_an_error_its_kind_and_words_are_kept() -> None:
    course = Course({"name": "a"})
    course.end("a:1", F, error={"type": "E", "message": "m", "traceback": "x" * 1000})
    assert course.state.error == {"type": "E", "message": "m"}
    unsaid = Course({"name": "a"})
    unsaid.end("a:1", F)
    assert unsaid.state.message == "stage a: Failed"


def test_a_timed_out_job_is_not_tried_again_in_a_workflow_that_has_failed() -> None:
    course = Course({"name": "a", "onTimeout": "retry", "retry": {"attempts": 2}}, {"name": "b", "needs": []})
    course.end("a:1", T)
    course.end("b:1", F)
    course.end("a:1", X)
    assert course.asked() == ["a:1", "b:1"]
    assert (course.state.status, course.phases()["a"]) == (F, "FAILED")
    assert course.state.stages["a"].error == {"type": "TimedOut", "message": "its job was TIMED_OUT"}


@pytest.mark.parametrize("sequence", [3, 2])
def test_a_notification_that_was_heard_is_not_heard_again(sequence: int) -> None:
    course = Course({"name": "a"})
    course.end("a:1", T, sequence=3)
    with pytest.raises(events.Refused, match="seen before"):
        course.end("a:1", C, sequence=sequence)
    course.end("a:1", C, sequence=4)
    assert course.state.status is C


# --- how it ends -----------------------------------------------------------------------------------------


def test_all_that_happens_is_noted_once() -> None:
    """In order, with who and why; the progress beside it."""
    course = Course(
        *({"name": "a"}, {"name": "b", "when": False}, {"name": "c", "retry": {"attempts": 2}}),
        {"name": "d", "onFailure": "goto f"},
        *({"name": "e"}, {"name": "f"}),
    )
    progress = [course.state.progress]
    for job, status in (("a:1", C), ("c:1", F), ("c:2", C), ("d:1", F), ("f:1", C)):
        course.now += 1
        course.end(job, status, error={"type": "E", "message": "m"})
        progress.append(course.state.progress)
    assert progress == [0, 33, 33, 50, 83, 100]
    assert course.noted() == [
        *("Begun", "Started a", "Completed a", "Skipped b", "Started c", "Retried c", "Started c"),
        *("Completed c", "Started d", "Failed d", "Skipped e", "Started f", "Completed f", "Completed"),
    ]
    assert (course.state.started_at, course.state.finished_at) == (100, 105)
    run = course.state.stages["c"].runs[0]
    assert (run.started_at, run.finished_at) == (102, 103)


def test_a_workflow_that_failed_has_come_as_far_as_it_had() -> None:
    """What never began is no progress; the cleaning up is."""
    course = Course({"name": "a"}, {"name": "b"}, {"name": "c"}, {"name": "z", "always": True})
    course.end("a:1", F)
    assert course.state.progress == 25
    course.end("z:1")
    assert (course.state.status, course.state.progress) == (F, 50)


def test_a_message_names_what_runs_and_what_is_silent_ten_of_each_at_most() -> None:
    """Of a list one silent job is enough."""
    names = [f"s{number}" for number in range(11)]
    course = Course(*({"name": name, "needs": [], "forEach": [1, 2]} for name in names))
    told = ", ".join(f"{name} (0 of 2)" for name in names[:10])
    assert course.state.message == told
    for name in names:
        course.end(f"{name}.0:1", T)
    assert course.state.message == f"{told}; timed out: {', '.join(names[:10])}"
    course.end("s0.1:1")
    assert course.state.message.startswith("s0 (1 of 2), s1 (0 of 2), ")


def test_the_history_says_who_and_why() -> None:
    course = Course({"name": "a"}, {"name": "b"})
    course.end("a:1", T)
    course.end("a:1", F, actor="executor", error={"type": "E", "message": "m"})
    course.do(events.RetryAsked(actor="operator:ann", reason="mended"))
    assert course.state.message == "mended"
    course.do(events.Begun())
    course.end("a:2", C, actor="enterprise", result="fine")
    course.do(events.CancelAsked(actor="operator:ben"))
    course.end("b:1", X, actor="executor", reason="stopped")
    noted = [effect for effect in course.effects if isinstance(effect, events.Noted)]
    assert [(each.event, each.stage, each.actor, each.reason) for each in noted] == [
        ("Begun", "", "coordinator", ""),
        ("Started", "a", "coordinator", "w:a:1"),
        ("TimedOut", "a", "watcher", "onTimeout: wait"),
        ("Failed", "a", "executor", "E: m"),
        ("Failed", "", "coordinator", "stage a: E: m"),
        ("Retried", "", "operator:ann", "mended"),
        ("Begun", "", "coordinator", ""),
        ("Started", "a", "coordinator", "w:a:2"),
        ("Completed", "a", "enterprise", "fine"),
        ("Started", "b", "coordinator", "w:b:1"),
        ("CancelRequested", "", "operator:ben", ""),
        ("Cancelled", "b", "executor", "stopped"),
        ("Cancelled", "", "coordinator", "cancelled by operator:ben"),
    ]
    silent = Course({"name": "a"})
    silent.end("a:1", F)
    silent.do(events.RetryAsked())
    assert silent.state.message == "retried"


def test_a_completion_of_all_wins_over_a_cancel() -> None:
    course = Course({"name": "a"})
    course.do(events.CancelAsked())
    course.end("a:1", C)
    assert (course.state.status, course.state.message) == (C, "")
    assert not [effect for effect in course.effects if isinstance(effect, events.ReleaseLocks)]


def test_a_failure_from_before_a_cancel_stays_one_and_is_retried() -> None:
    """The cancel came when only the cleaning up was left to do; the retry is not cancelled with it."""
    course = Course({"name": "a"}, {"name": "z", "always": True})
    course.end("a:1", F)
    course.do(events.CancelAsked())
    course.end("z:1")
    assert course.state.status is F
    course.do(events.RetryAsked())
    course.do(events.Begun())
    assert course.asked() == ["a:1", "z:1", "a:2"]


def test_a_cancel_by_force_leaves_out_the_cleaning_up() -> None:
    """What of it runs is stopped, and the rest of its list does not begin."""
    cleaning = {"name": "z", "always": True, "forEach": [1, 2], "limit": 1}
    course = Course({"name": "a"}, cleaning)
    forced = course.do(events.CancelAsked(force=True))
    assert [(e.execution_id, e.force) for e in forced if isinstance(e, events.CancelJob)] == [("w:a:1", True)]
    course.end("a:1", X)
    assert (course.phases(), course.state.status) == ({"a": "CANCELLED", "z": "NOT_RUN"}, X)
    late = Course({"name": "a"}, cleaning)
    late.end("a:1")
    forced = late.do(events.CancelAsked(force=True))
    assert [e.execution_id for e in forced if isinstance(e, events.CancelJob)] == ["w:z.0:1"]
    late.end("z.0:1", X)
    assert late.asked() == ["a:1", "z.0:1"]
    assert late.state.status is X


@pytest.mark.parametrize("status", [X, F])
def test_a_job_that_is_being_cancelled_is_cancelled_however_it_ends(status: Status) -> None:
    """No failure of the workflow's, and no other job, though it might have had one."""
    course = Course({"name": "a", "retry": {"attempts": 2}})
    course.do(events.CancelAsked(reason="why"))
    course.end("a:1", status, error={"type": "E", "message": "m"})
    assert (course.phases(), course.asked()) == ({"a": "CANCELLED"}, ["a:1"])
    assert course.noted()[2:] == ["CancelRequested", "Cancelled a", "Cancelled"]
    assert (course.state.status, course.state.message) == (X, "why")


def test_what_a_cancel_comes_before_is_not_looked_at() -> None:
    """Its condition, or an empty list: it is NOT_RUN, neither SKIPPED nor COMPLETED."""
    course = Course({"name": "a"}, {"name": "b", "when": False}, {"name": "c", "needs": "a", "forEach": []})
    course.do(events.CancelAsked())
    course.end("a:1", C)
    assert course.phases() == {"a": "COMPLETED", "b": "NOT_RUN", "c": "NOT_RUN"}


def test_what_a_failure_comes_before_is_not_looked_at() -> None:
    """Though its own turn has come in the same moment."""
    beside = {"name": "c", "needs": "a", "when": False}
    course = Course({"name": "a"}, {"name": "b", "when": "job.none == 1"}, beside)
    course.end("a:1")
    assert course.phases() == {"a": "COMPLETED", "b": "FAILED", "c": "NOT_RUN"}


def test_stages_may_stand_in_any_order() -> None:
    """What needs one that stands behind it goes on at once, also when that one is skipped."""
    course = Course({"name": "b", "needs": "a"}, {"name": "a", "needs": [], "when": False})
    assert course.asked() == ["b:1"]
    course = Course({"name": "b", "needs": "a"}, {"name": "a", "needs": []})
    course.end("a:1")
    assert course.asked() == ["a:1", "b:1"]


def test_what_is_done_is_not_asked_again_whether_it_may_run() -> None:
    """A retry leaves it, though by now its condition would be false."""
    course = Course({"name": "a", "when": "workflow.x == 0"}, {"name": "b"}, variables={"x": 0})
    course.end("a:1", workflow_variables={"x": 1})
    course.end("b:1", F)
    course.do(events.RetryAsked())
    course.do(events.Begun())
    assert course.phases() == {"a": "COMPLETED", "b": "RUNNING"}


def test_a_failure_that_passed_is_not_run_again_by_a_retry() -> None:
    course = Course({"name": "a", "onFailure": "continue"}, {"name": "b"})
    course.end("a:1", F)
    course.end("b:1", F)
    course.do(events.RetryAsked())
    course.do(events.Begun())
    assert course.asked() == ["a:1", "b:1", "b:2"]


def test_a_goto_goes_past_what_lies_between_also_after_a_retry() -> None:
    """Though the workflow had failed meanwhile, and nothing would have begun there anyhow."""
    course = Course(
        {"name": "a", "onFailure": "goto c"}, {"name": "b"}, {"name": "c"}, {"name": "x", "needs": []}
    )
    course.end("x:1", F)
    course.end("a:1", F)
    assert course.phases() == {"a": "FAILED", "b": "SKIPPED", "c": "NOT_RUN", "x": "FAILED"}
    course.do(events.RetryAsked())
    course.do(events.Begun())
    assert course.asked()[2:] == ["c:1", "x:2"]


def test_what_two_gotos_go_past_is_skipped_once() -> None:
    to = {"needs": [], "onFailure": "goto d"}
    course = Course(
        {"name": "a", **to}, {"name": "b", **to}, {"name": "c", "needs": ["a", "b"]}, {"name": "d"}
    )
    course.end("a:1", F)
    course.end("b:1", F)
    assert course.noted()[3:] == ["Failed a", "Skipped c", "Started d", "Failed b"]


def test_of_two_failures_the_first_is_the_workflows() -> None:
    course = Course({"name": "a"}, {"name": "b", "needs": []})
    course.end("b:1", F, error={"type": "E", "message": "first"})
    course.end("a:1", F, error={"type": "E", "message": "second"})
    assert course.state.message == "stage b: E: first"
