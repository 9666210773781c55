"""Locks that a workflow holds across its stages: the law's part, each rule by itself."""

from __future__ import annotations

from typing import Any

import pytest

from jef_daemon.lifecycle import Status
from jef_daemon.lock.state import Mode
from jef_daemon.workflow import events
from jef_daemon.workflow.state import Holding, Phase, key_of_owner, lock_owner, within
from tests.support.courses import Course

C, F, X = Status.COMPLETED, Status.FAILED, Status.CANCELLED
STAGES: tuple[dict[str, Any], ...] = ({"name": "a"}, {"name": "b"}, {"name": "z", "always": True})
ASSET: dict[str, Any] = {
    "variables": {"asset": 42},
    "locks": [{"resource": "asset/{{ workflow.asset }}"}],
}
GRANTED = events.LocksGranted(tokens={"asset/42": 33})
GONE = "asset/42: released by force by ops: stuck"


def of(kind: type[events.Effect], effects: list[events.Effect]) -> list[Any]:
    return [effect for effect in effects if isinstance(effect, kind)]


def notes(course: Course) -> list[tuple[str, str, str]]:
    return [(each.event, each.actor, each.reason) for each in of(events.Noted, course.effects)]


def stage_locks(course: Course, job: str) -> list[tuple[str, str]]:
    return [(lock["resource"], str(lock["mode"])) for lock in course.request(job)["locks"]]


def test_nothing_begins_before_all_is_granted() -> None:
    course = Course(*STAGES, **ASSET)
    [asked] = of(events.AskLocks, course.effects)
    assert asked.locks == (("asset/42", Mode.EXCLUSIVE),)
    assert (course.state.status.value, course.asked()) == ("WAITING_FOR_LOCK", [])
    course.do(GRANTED)
    assert (course.state.status.value, course.asked()) == ("RUNNING", ["a:1"])
    assert [held.token for held in course.state.locks] == [33]
    told = "asset/42 EXCLUSIVE"
    assert notes(course) == [
        *(("LocksAsked", "coordinator", told), ("LocksGranted", "locks", f"{told}, number 33")),
        *(("Begun", "coordinator", ""), ("Started", "coordinator", "w:a:1")),
    ]


def test_it_says_what_it_asks_for_and_when_it_began() -> None:
    course = Course(*STAGES, **ASSET)
    assert (course.state.message, course.state.started_at) == ("asks for asset/42 EXCLUSIVE", None)
    course.now = 150
    course.do(GRANTED)
    assert course.state.started_at == 150
    course.end("a:1", F)
    course.end("z:1")
    course.now = 200
    for event in (events.RetryAsked(), events.Begun(), GRANTED):
        course.do(event)
    assert course.state.started_at == 150, "it began once"


def test_they_are_released_behind_the_last_stage() -> None:
    course = Course(*STAGES, **ASSET)
    course.do(GRANTED)
    for job in ("a:1", "b:1"):
        assert not of(events.ReleaseLocks, course.end(job))
    assert course.end("z:1")[-1] == events.ReleaseLocks()
    assert (course.state.status, course.state.locks[0].token) == (C, None)
    with pytest.raises(events.Refused):
        course.do(events.LocksLost(reason=GONE))


def test_they_are_released_after_a_failure_and_its_cleaning_up() -> None:
    course = Course(*STAGES, **ASSET)
    course.do(GRANTED)
    assert not of(events.ReleaseLocks, course.end("a:1", F))
    assert of(events.ReleaseLocks, course.end("z:1"))
    assert course.state.status is F


def test_a_cancel_while_it_waits_takes_it_out_of_the_queue() -> None:
    course = Course(*STAGES, **ASSET)
    assert of(events.ReleaseLocks, course.do(events.CancelAsked(reason="why")))
    assert (course.state.status, course.asked()) == (X, [])
    assert set(course.phases().values()) == {"NOT_RUN"}
    with pytest.raises(events.Refused):
        course.do(GRANTED)


def test_a_cancel_while_it_runs_releases_behind_the_cleaning_up() -> None:
    course = Course(*STAGES, **ASSET)
    course.do(GRANTED)
    course.do(events.CancelAsked())
    assert not of(events.ReleaseLocks, course.end("a:1", X))
    assert of(events.ReleaseLocks, course.end("z:1"))
    assert course.state.status is X


def test_whom_it_waits_for_is_told() -> None:
    course = Course(*STAGES, **ASSET)
    place = {"resource": "asset/42", "mode": "EXCLUSIVE", "position": 2, "holders": ["624", "625"]}
    course.do(events.LocksAwaited(place=place))
    assert course.state.waiting_for == place
    assert course.state.message == "waits for asset/42, held by 624, 625, number 2 in the queue"
    course.do(events.LocksAwaited(place={**place, "holders": []}))
    assert "kept for an earlier one that waits" in course.state.message
    course.do(GRANTED)
    assert course.state.message == "a"
    assert not course.state.waiting_for
    with pytest.raises(events.Refused):
        course.do(events.LocksAwaited(place=place))


def test_a_lost_lock_stops_what_runs_and_fails_the_workflow() -> None:
    """A retry asks for the same again, and goes on with what was stopped."""
    course = Course({"name": "a"}, {"name": "b", "needs": []}, STAGES[2], **ASSET)
    course.do(GRANTED)
    lost = course.do(events.LocksLost(reason=GONE))
    stopped = [(cancel.execution_id, cancel.reason, cancel.force) for cancel in of(events.CancelJob, lost)]
    assert stopped == [(name, f"a lock is lost: {GONE}", False) for name in ("w:a:1", "w:b:1")]
    assert course.state.message == "its locks are lost: a, b"
    course.end("a:1", X)
    course.end("b:1")  # it was done first
    assert course.asked() == ["a:1", "b:1", "z:1"]
    course.end("z:1")
    assert (course.state.status, course.state.message) == (F, f"LockLost: {GONE}")
    assert (course.state.failed, course.state.error) == ("", {"type": "LockLost", "message": GONE})
    assert course.phases() == {"a": "CANCELLED", "b": "COMPLETED", "z": "COMPLETED"}
    course.state.context["asset"] = 43
    course.do(events.RetryAsked())
    [asked] = of(events.AskLocks, course.do(events.Begun()))
    assert asked.locks == (("asset/42", Mode.EXCLUSIVE),)
    course.do(events.LocksGranted(tokens={"asset/42": 34}))
    assert course.asked()[3:] == ["a:2"]
    assert [held["fencingToken"] for held in course.request("a:2")["workflowLocks"]] == [34]
    assert "workflowLocks" not in course.request("z:1"), "it had lost it"
    course.end("a:2")
    course.end("z:2")
    assert course.state.status is C


def test_a_lock_that_is_lost_after_a_failure_changes_nothing_of_why() -> None:
    course = Course({"name": "a"}, {"name": "b", "needs": []}, STAGES[2], **ASSET)
    course.do(GRANTED)
    course.end("a:1", F)
    course.do(events.LocksLost(reason=GONE))
    course.end("b:1", X)
    course.end("z:1")
    assert (course.state.status, course.state.message) == (F, "stage a: Failed")
    assert course.phases()["b"] == "CANCELLED"


def test_a_lock_that_is_lost_while_it_cleans_up_lets_that_go_on() -> None:
    course = Course(*STAGES, **ASSET)
    course.do(GRANTED)
    course.end("a:1")
    course.end("b:1")
    assert not of(events.CancelJob, course.do(events.LocksLost(reason=GONE)))
    course.end("z:1")
    assert (course.state.status, course.state.error) == (F, {"type": "LockLost", "message": GONE})


def test_where_a_loss_is_only_told_it_goes_on() -> None:
    """Without what it lost: who names it now asks for it as anybody does."""
    course = Course({"name": "a"}, {"name": "b", "locks": [{"resource": "asset/42"}]}, **ASSET)
    course.do(GRANTED)
    effects = course.do(events.LocksLost(reason=GONE, is_failure=False))
    told = f"{GONE}; it goes on: locks.on_lost is tell"
    assert effects == [events.Noted("LocksLost", actor="locks", reason=told)]
    course.end("a:1")
    assert stage_locks(course, "b:1") == [("asset/42", "EXCLUSIVE")]
    course.end("b:1")
    assert course.state.status is C


def test_what_can_never_be_granted_fails_it() -> None:
    course = Course(*STAGES, **ASSET)
    assert of(events.ReleaseLocks, course.do(events.LocksRefused(reason="a name of 300 characters")))
    assert (course.state.status, course.state.message) == (F, "LockRefused: a name of 300 characters")
    assert notes(course)[1] == ("LockRefused", "locks", "a name of 300 characters")
    assert set(course.phases().values()) == {"NOT_RUN"}
    running = Course(*STAGES, **ASSET)
    running.do(GRANTED)
    with pytest.raises(events.Refused):
        running.do(events.LocksRefused(reason="late"))


def test_it_waits_so_long_and_no_longer() -> None:
    course = Course(*STAGES, **ASSET, lockTimeout=60)
    assert course.state.due_at == 160
    course.now = 159
    with pytest.raises(events.Refused, match="wait on"):
        course.do(events.LocksTimedOut())
    course.now = 160
    assert of(events.ReleaseLocks, course.do(events.LocksTimedOut()))
    assert course.state.message == "LockTimeout: waited for its locks longer than 60 s"
    assert course.state.due_at is None
    granted = Course(*STAGES, **ASSET, lockTimeout=60)
    granted.do(GRANTED)
    assert granted.state.due_at is None
    with pytest.raises(events.Refused):
        granted.do(events.LocksTimedOut())


def test_a_resource_that_is_named_twice_is_wanted_in_the_stronger_mode() -> None:
    names = [("r", "SHARED"), ("r", "EXCLUSIVE"), ("s", "SHARED"), ("r", "SHARED")]
    course = Course(*STAGES, locks=[{"resource": name, "mode": mode} for name, mode in names])
    [asked] = of(events.AskLocks, course.effects)
    assert asked.locks == (("r", Mode.EXCLUSIVE), ("s", Mode.SHARED))


@pytest.mark.parametrize(
    ("resource", "name"),
    [
        ("job/{{ workflowId }}", "job/w"),
        ("{{ workflow.asset }}", "42"),
        ("{{ workflow.long }}", "x" * 255),
    ],
)
def test_a_name_is_made_of_what_is_known_before_it_begins(resource: str, name: str) -> None:
    """As long as a name may be; a number is written out."""
    known = {"asset": 42, "long": "x" * 255}
    course = Course(*STAGES, variables=known, locks=[{"resource": resource}])
    [asked] = of(events.AskLocks, course.effects)
    assert asked.locks == ((name, Mode.EXCLUSIVE),)


def test_an_expression_without_a_value_fails_it_before_it_begins() -> None:
    course = Course(*STAGES, variables={"asset": {}}, locks=[{"resource": "{{ workflow.asset.id }}"}])
    assert course.state.status is F
    assert course.state.message == ("ExpressionError: workflow.asset.id: there is no 'id'; there is: nothing")


# --- within ----------------------------------------------------------------------------------------------


def test_a_stage_does_not_wait_for_its_own_workflow() -> None:
    """It asks for a name within the workflow, which keeps it from its like; what the workflow has not, as ever."""
    names = [("asset/42", "EXCLUSIVE"), ("other", "SHARED")]
    locks = [{"resource": name, "mode": mode} for name, mode in names]
    course = Course({"name": "a", "locks": locks}, **ASSET)
    course.do(GRANTED)
    assert stage_locks(course, "a:1") == [("workflow/w/asset/42", "EXCLUSIVE"), ("other", "SHARED")]


def test_a_stage_that_wants_more_than_its_workflow_has_fails_and_says_so() -> None:
    locks = [{"resource": "asset/{{ workflow.asset }}", "mode": "SHARED"}]
    stage = {"name": "a", "locks": [{"resource": "asset/42", "mode": "EXCLUSIVE"}]}
    course = Course(stage, variables={"asset": 42}, locks=locks)
    course.do(GRANTED)
    assert course.asked() == []
    said = (
        "asset/42 is wanted EXCLUSIVE, and w or a workflow around it holds it SHARED: "
        "let that hold it EXCLUSIVE"
    )
    assert course.state.message == f"stage a: LockConflict: {said}"
    assert notes(course)[3] == ("Failed", "coordinator", said)


def test_a_workflow_within_knows_what_is_held_around_it() -> None:
    course = Course({"name": "inner", "workflow": "other"}, **ASSET)
    course.do(GRANTED)
    [child] = of(events.StartChild, course.effects)
    assert child.around == (Holding("asset/42", Mode.EXCLUSIVE, "asset/42", "workflow/w/asset/42", 33),)
    stage = {"name": "a", "locks": [{"resource": "asset/42"}]}
    inner = Course(stage, around=child.around)
    assert stage_locks(inner, "a:1") == [("workflow/w/asset/42", "EXCLUSIVE")]
    told = {"resource": "asset/42", "mode": "EXCLUSIVE", "fencingToken": 33}
    assert inner.request("a:1")["workflowLocks"] == [told]


def test_a_workflow_within_is_not_told_of_locks_that_are_lost() -> None:
    """Nobody keeps others out for it any more: what it names, it asks for as anybody does."""
    course = Course({"name": "a"}, {"name": "inner", "workflow": "other"}, **ASSET)
    course.do(GRANTED)
    course.do(events.LocksLost(reason=GONE, is_failure=False))
    course.end("a:1")
    [child] = of(events.StartChild, course.effects)
    assert child.around == ()


def test_a_workflow_within_that_runs_hears_that_what_it_relies_on_is_lost() -> None:
    """It goes on as the one around it does: what it names from now on, it asks for as anybody does."""
    course = Course({"name": "inner", "workflow": "other", "forEach": [1, 2]}, **ASSET)
    course.do(GRANTED)
    around = of(events.StartChild, course.effects)[0].around
    course.end("inner.0:1")
    [told] = of(events.TellLost, course.do(events.LocksLost(reason=GONE, is_failure=False)))
    why = f"{GONE}; it goes on: locks.on_lost is tell"
    assert told == events.TellLost("w:inner.1:1", frozenset({"workflow/w/asset/42"}), why)
    others = Holding("b", Mode.SHARED, "b", "workflow/w/b", 7)
    stage = {"name": "b", "locks": [{"resource": "asset/42"}, {"resource": "b", "mode": "SHARED"}]}
    inner = Course({"name": "a"}, stage, {"name": "c", "workflow": "d"}, around=(*around, others), **ASSET)
    inner.do(events.LocksGranted(tokens={"workflow/w/asset/42": 1}))
    lost = events.LocksLostAround(names=told.names, reason=told.reason)
    assert inner.do(lost) == [events.Noted("LocksLost", "", "locks", f"asset/42, held around it: {why}")]
    inner.end("a:1")
    assert stage_locks(inner, "b:1") == [("asset/42", "EXCLUSIVE"), ("workflow/w/b", "SHARED")]
    assert inner.request("b:1")["workflowLocks"] == [{"resource": "b", "mode": "SHARED", "fencingToken": 7}]
    with pytest.raises(events.Refused):
        inner.do(lost)
    inner.end("b:1")
    [innermost] = of(events.StartChild, inner.effects)
    assert innermost.around == (others,)


def test_what_was_asked_for_within_a_lost_lock_is_lost_to_those_within_it() -> None:
    around = (Holding("asset/42", Mode.EXCLUSIVE, "asset/42", "workflow/outer/asset/42", 33),)
    inner = Course({"name": "a", "workflow": "other"}, around=around, **ASSET)
    inner.do(events.LocksGranted(tokens={"workflow/outer/asset/42": 1}))
    effects = inner.do(events.LocksLostAround(names=frozenset({"workflow/outer/asset/42"}), reason=GONE))
    [told] = of(events.TellLost, effects)
    assert told.names == {"workflow/outer/asset/42", "workflow/w/asset/42"}
    inner.end("a:1")
    with pytest.raises(events.Refused):
        inner.do(events.LocksLostAround(names=told.names, reason=GONE))


def test_a_workflow_within_that_waits_asks_anew_for_what_is_lost_around_it() -> None:
    """Granted within what is lost, it would hold nothing that keeps others out."""
    around = (Holding("asset/42", Mode.EXCLUSIVE, "asset/42", "workflow/outer/asset/42", 33),)
    inner = Course({"name": "a", "locks": [{"resource": "asset/42"}]}, around=around, **ASSET)
    place = {"resource": "workflow/outer/asset/42", "mode": "EXCLUSIVE", "position": 1, "holders": ["x"]}
    inner.do(events.LocksAwaited(place=place))
    lost = events.LocksLostAround(names=frozenset({"workflow/outer/asset/42"}), reason=GONE)
    [asked] = of(events.AskLocks, inner.do(lost))
    assert asked.locks == (("asset/42", Mode.EXCLUSIVE),)
    assert (inner.state.waiting_for, inner.state.message) == (None, "asks for asset/42 EXCLUSIVE")
    inner.do(events.LocksGranted(tokens={"asset/42": 34}))
    assert stage_locks(inner, "a:1") == [("workflow/w/asset/42", "EXCLUSIVE")]
    told = {"resource": "asset/42", "mode": "EXCLUSIVE", "fencingToken": 34}
    assert inner.request("a:1")["workflowLocks"] == [told]


def test_workflows_within_hear_of_a_loss_before_they_are_cancelled_for_it() -> None:
    """What cleans up in them begins with the cancel."""
    course = Course(*({"name": name, "workflow": name, "needs": []} for name in ("i", "j")), **ASSET)
    course.do(GRANTED)
    lost = course.do(events.LocksLost(reason=GONE))
    told = [events.TellLost(f"w:{name}:1", frozenset({"workflow/w/asset/42"}), GONE) for name in ("i", "j")]
    assert of(events.TellLost, lost) == told
    assert [type(each) for each in lost if not isinstance(each, events.Noted)] == [
        *(events.TellLost, events.TellLost),
        *(events.CancelJob, events.CancelJob),
    ]


def test_workflows_within_one_that_gives_in_rely_on_nothing_around_them() -> None:
    """It gives its locks back while they are being stopped."""
    outer = Holding("b", Mode.SHARED, "b", "workflow/outer/b", 7)
    course = Course({"name": "i", "workflow": "other"}, around=(outer,), **ASSET)
    course.do(GRANTED)
    effects = course.do(events.Broken(reason="a fault", of=events.Begun(), at_once=True))
    [told] = of(events.TellLost, effects)
    assert told.names == {"workflow/w/asset/42", "workflow/outer/b"}
    kinds = [type(each) for each in effects if not isinstance(each, events.Noted)]
    assert kinds == [events.TellLost, events.CancelJob, events.ReleaseLocks]


def test_a_workflow_within_that_is_retried_stands_alone() -> None:
    """The one around it went on without it, and may have given its locks back by now."""
    around = (Holding("asset/42", Mode.EXCLUSIVE, "asset/42", "workflow/outer/asset/42", 33),)
    inner = Course({"name": "a", "locks": [{"resource": "b"}]}, around=around, **ASSET)
    inner.do(events.LocksGranted(tokens={"workflow/outer/asset/42": 1}))
    inner.end("a:1", F)
    inner.do(events.RetryAsked())
    [asked] = of(events.AskLocks, inner.do(events.Begun()))
    assert asked.locks == (("asset/42", Mode.EXCLUSIVE),)
    inner.do(events.LocksGranted(tokens={"asset/42": 34}))
    told = {"resource": "asset/42", "mode": "EXCLUSIVE", "fencingToken": 34}
    assert inner.request("a:2")["workflowLocks"] == [told]


def test_a_workflow_within_that_holds_the_same_asks_within_and_its_stages_within_it() -> None:
    around = (Holding("asset/42", Mode.EXCLUSIVE, "asset/42", "workflow/outer/asset/42", 33),)
    stage = {"name": "a", "locks": [{"resource": "asset/42"}]}
    inner = Course(stage, around=around, **ASSET)
    [asked] = of(events.AskLocks, inner.effects)
    assert asked.locks == (("workflow/outer/asset/42", Mode.EXCLUSIVE),)
    inner.do(events.LocksGranted(tokens={"workflow/outer/asset/42": 1}))
    assert stage_locks(inner, "a:1") == [("workflow/w/asset/42", "EXCLUSIVE")]
    told = {"resource": "asset/42", "mode": "EXCLUSIVE", "fencingToken": 33}
    assert inner.request("a:1")["workflowLocks"] == [told], (
        "the number that rises with every grant of the asset"
    )
    shared = tuple(Holding("asset/42", Mode.SHARED, each.name, each.within, 33) for each in around)
    assert Course(stage, around=shared, **ASSET).state.error == {
        "type": "LockConflict",
        "message": "asset/42 is wanted EXCLUSIVE, and w or a workflow around it holds it SHARED: "
        "let that hold it EXCLUSIVE",
    }


def test_names_are_short_enough_and_lead_back() -> None:
    for name in ("w-9", "w 9", "w-9:inner:1", "x" * 255, "ä" * 250):
        owner = lock_owner(name)
        assert len(owner) <= 255
        course = Course({"name": "a"})
        course.state.workflow_id = name
        assert key_of_owner(owner) is not None
        assert len(within(owner, "r" * 255)) <= 255
    assert lock_owner("x" * 246) == "workflow/" + "x" * 246
    assert within("workflow/w", "r" * 244) == "workflow/w/" + "r" * 244
    assert key_of_owner("w-9:a:1") is None
    assert key_of_owner("workflow/w-9") == "w-9"
    assert len({within("workflow/w", "r" * 254 + end) for end in "ab"}) == 2


def test_a_stopped_stage_is_cancelled_in_a_workflow_that_failed() -> None:
    course = Course({"name": "a", "forEach": [1, 2, 3], "limit": 1}, **ASSET)
    course.do(GRANTED)
    course.do(events.LocksLost(reason=GONE))
    course.end("a.0:1", X)
    assert [run.phase for run in course.state.stages["a"].runs] == [
        *(Phase.CANCELLED, Phase.NOT_RUN, Phase.NOT_RUN)
    ]
    assert course.state.status is F
