"""The law of the life cycle, held against a copy of its document's table that was written by hand."""

from __future__ import annotations

import copy
import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from jef_daemon import events, lifecycle
from jef_daemon.errors import TransitionRefused
from jef_daemon.events import Event
from jef_daemon.lifecycle import Execution, Place, Status, accept, apply

NOW = 1_000.0

EVENTS: dict[str, Event] = {
    "accepted": events.Accepted(),
    "lock taken": events.LockAwaited(waiting_for={"resource": "asset/42", "mode": "SHARED"}),
    "started": events.Started(),
    "launched": events.Launched(external_id="x-2"),
    "progress": events.Progressed(progress=40, message="pass 1"),
    "completed": events.Completed(result="done"),
    "failed": events.Failed(error_type="E", error_message="m"),
    "cancel": events.CancelRequested(reason="a person"),
    "stopped": events.Stopped(),
    "silent": events.FellSilent(),
    "grace ended": events.GraceEnded(),
    "resumed": events.Resumed(),
    "retried": events.Retried(token="new"),
    "interrupted": events.Interrupted(token="new"),
}
"""One of each, so that a new event must be given its rows here."""

PLACES: dict[str, tuple[Status, bool]] = {
    "QUEUED": (Status.QUEUED, False),
    "WAITING_FOR_LOCK": (Status.WAITING_FOR_LOCK, False),
    "RUNNING": (Status.RUNNING, False),
    "COMPLETED": (Status.COMPLETED, False),
    "FAILED": (Status.FAILED, False),
    "CANCELLED": (Status.CANCELLED, True),
    "TIMED_OUT (open)": (Status.TIMED_OUT, False),
    "TIMED_OUT (closed)": (Status.TIMED_OUT, True),
}
"""Where an execution can stand: its status, and whether its attempt is fenced."""

LAW = """
QUEUED             lock taken  -> WAITING_FOR_LOCK
QUEUED             started     -> RUNNING
QUEUED             cancel      -> CANCELLED
WAITING_FOR_LOCK   lock taken  -> WAITING_FOR_LOCK
WAITING_FOR_LOCK   started     -> RUNNING
WAITING_FOR_LOCK   cancel      -> CANCELLED
RUNNING            launched    -> RUNNING
RUNNING            progress    -> RUNNING
RUNNING            completed   -> COMPLETED
RUNNING            failed      -> FAILED
RUNNING            stopped     -> CANCELLED
RUNNING            cancel      -> RUNNING
RUNNING            silent      -> TIMED_OUT (open)
RUNNING            interrupted -> QUEUED
TIMED_OUT (open)   launched    -> RUNNING
TIMED_OUT (open)   progress    -> RUNNING
TIMED_OUT (open)   resumed     -> RUNNING
TIMED_OUT (open)   completed   -> COMPLETED
TIMED_OUT (open)   failed      -> FAILED
TIMED_OUT (open)   stopped     -> CANCELLED
TIMED_OUT (open)   grace ended -> TIMED_OUT (closed)
TIMED_OUT (open)   retried     -> QUEUED
TIMED_OUT (open)   cancel      -> CANCELLED
TIMED_OUT (closed) retried     -> QUEUED
TIMED_OUT (closed) cancel      -> CANCELLED
FAILED             retried     -> QUEUED
FAILED             cancel      -> CANCELLED
"""
"""The document's table, one pair a line. (A waiter's place in the queue may be told again.)"""


def law() -> dict[tuple[str, str], str]:
    rows = {}
    for line in LAW.strip().splitlines():
        left, _, goes_to = line.partition(" -> ")
        place = next(place for place in sorted(PLACES, key=len, reverse=True) if left.startswith(place))
        rows[place, left.removeprefix(place).strip()] = goes_to
    return rows


PAIRS = [(place, event) for place in PLACES for event in EVENTS]
LEGAL = sorted(law())
ILLEGAL = sorted(set(PAIRS) - set(LEGAL))


def standing(place: str, **fields: object) -> Execution:
    """An execution that stands there, with a past."""
    status, fenced = PLACES[place]
    execution = Execution("624", "copy", status=status, fenced=fenced, token="old", sequence=7, attempt=2)
    return dataclasses.replace(execution, **fields)  # type: ignore[arg-type]


def executions() -> st.SearchStrategy[Execution]:
    instants = st.none() | st.floats(0, 1e9)
    return st.builds(
        standing,
        st.sampled_from(sorted(PLACES)),
        sequence=st.integers(0, 10**9),
        attempt=st.integers(1, 10**6),
        progress=st.integers(0, 100),
        message=st.text(max_size=5),
        cancel_requested=st.booleans(),
        update_timeout_s=st.none() | st.floats(1, 1e6),
        update_deadline=instants,
        started_at=instants,
        finished_at=instants,
        external_id=st.none() | st.just("x-1"),
    )


def test_the_tests_know_every_event_and_every_place() -> None:
    """A new one needs its rows above."""
    kinds = {kind for kind in vars(lifecycle).values() if isinstance(kind, type) and issubclass(kind, Event)}
    assert {type(event) for event in EVENTS.values()} == kinds - {Event}
    assert {*PLACES, "(none)"} == {place.value for place in Place}
    assert len(LEGAL) == len(LAW.strip().splitlines())


@pytest.mark.parametrize(("place", "event"), LEGAL)
def test_what_the_law_allows(place: str, event: str) -> None:
    """It goes where the document says, and is told unless nothing changed for a reader."""
    before = standing(place)
    move = apply(before, EVENTS[event], NOW)
    assert (move.before, move.execution.place) == (place, law()[place, event])
    assert (move.event, move.at, move.execution.updated_at) == (EVENTS[event], NOW, NOW)
    assert move.execution.sequence == 7 + (event != "grace ended")
    assert lifecycle.is_told(EVENTS[event]) is (event != "grace ended")


@pytest.mark.parametrize(("place", "event"), ILLEGAL)
def test_all_else_is_refused_and_changes_nothing(place: str, event: str) -> None:
    """The refusal says who, where and what."""
    before = standing(place)
    kept = copy.deepcopy(before)
    with pytest.raises(TransitionRefused) as caught:
        apply(before, EVENTS[event], NOW)
    assert before == kept
    assert (caught.value.execution_id, caught.value.place) == ("624", place)
    assert caught.value.event == type(EVENTS[event]).__name__


@pytest.mark.parametrize("place", ["COMPLETED", "CANCELLED"])
def test_two_are_final(place: str) -> None:
    """Nothing whatever moves them."""
    assert [pair for pair in LEGAL if pair[0] == place] == []
    assert PLACES[place][0] in lifecycle.SETTLED


@given(executions(), st.sampled_from(sorted(EVENTS)), st.floats(0, 1e10))
def test_it_is_a_function_of_its_arguments(before: Execution, event: str, now: float) -> None:
    """Whatever an execution carries: same place, same answer; the given one stays; numbers only rise."""
    kept = copy.deepcopy(before)
    try:
        after = apply(before, EVENTS[event], now).execution
    except TransitionRefused:
        assert (before.place.value, event) in ILLEGAL
    else:
        assert after.place == law()[before.place.value, event]
        assert after.sequence >= before.sequence
        assert after.attempt - before.attempt == (event in {"retried", "interrupted"})
        assert 0 <= after.progress <= 100
        assert (after.execution_id, after.action) == (before.execution_id, before.action)
    assert before == kept


@pytest.mark.parametrize(("place", "event"), LEGAL)
@pytest.mark.parametrize("silence", [None, 5.0])
def test_only_who_runs_has_an_update_deadline(place: str, event: str, silence: float | None) -> None:
    """Waiting never counts against the executor: a deadline is a running attempt's alone."""
    before = standing(place, update_timeout_s=silence, update_deadline=1.0 if place == "RUNNING" else None)
    after = apply(before, EVENTS[event], NOW).execution
    if after.status is not Status.RUNNING:
        assert after.update_deadline is None
    elif event != "cancel":
        assert after.update_deadline == (None if silence is None else NOW + silence)


@pytest.mark.parametrize("outside", [True, False])
@pytest.mark.parametrize(("place", "event"), LEGAL)
def test_each_place_has_its_clock(place: str, event: str, outside: bool) -> None:
    """The wait for a slot, the limit of work outside, the grace of a time-out; nothing else runs out."""
    limits = {"queue_timeout_s": 10.0, "execution_timeout_s": 20.0, "timeout_grace_s": 30.0}
    before = standing(place, outside=outside, started_at=NOW - 1, due_at=NOW + 99, **limits)
    after = apply(before, EVENTS[event], NOW).execution
    match after.place:
        case lifecycle.Place.QUEUED:
            expected: float | None = NOW + 10
        case lifecycle.Place.TIMED_OUT_OPEN:
            expected = NOW + 30
        case lifecycle.Place.RUNNING if event in {"launched", "resumed"} or place == "TIMED_OUT (open)":
            expected = NOW + 19 if after.outside else None
        case lifecycle.Place.RUNNING if event == "started":
            expected = None
        case lifecycle.Place.RUNNING | lifecycle.Place.WAITING_FOR_LOCK:
            expected = before.due_at
        case _:
            expected = None
    assert after.due_at == expected


@pytest.mark.parametrize(
    ("wants_locks", "not_before", "expected"), [(False, 5, 15), (False, -5, 10), (True, 5, 25)]
)
def test_a_wait_begins_when_its_time_has_come(wants_locks: bool, not_before: float, expected: float) -> None:
    """For a slot, or first for locks."""
    waits = Execution(
        "624",
        "copy",
        wants_locks=wants_locks,
        not_before=NOW + not_before,
        queue_timeout_s=10,
        lock_timeout_s=20,
    )
    assert accept(waits, NOW).execution.due_at == NOW + expected
    assert accept(Execution("624", "copy"), NOW).execution.due_at is None


def test_a_cancel_request_does_not_move_the_deadline() -> None:
    """Updates move it, and nothing else."""
    running = standing("RUNNING", update_timeout_s=5.0, update_deadline=1.0)
    after = apply(running, EVENTS["cancel"], NOW).execution
    assert (after.update_deadline, after.cancel_requested, after.message) == (1.0, True, running.message)


def test_a_new_one_is_queued() -> None:
    """Its first notification is number 1 of attempt 1."""
    move = accept(Execution("624", "copy"), NOW)
    assert (move.before, move.execution.status) == (Place.NEW, Status.QUEUED)
    assert (move.execution.sequence, move.execution.attempt, move.execution.queued_at) == (1, 1, NOW)


@pytest.mark.parametrize("place", sorted(PLACES))
def test_what_comes_late_is_told_as_late(place: str) -> None:
    """Only what an update after TIMED_OUT caused; nobody's command is late."""
    late = {
        event for where, event in LEGAL if where == place and apply(standing(place), EVENTS[event], NOW).late
    }
    expected = (
        {"launched", "progress", "completed", "failed", "stopped"} if place == "TIMED_OUT (open)" else set()
    )
    assert late == expected


@pytest.mark.parametrize(
    ("place", "event"), [pair for pair in LEGAL if pair[1] in {"retried", "interrupted"}]
)
def test_a_new_attempt_begins_afresh(place: str, event: str) -> None:
    """New token, nothing left of the old attempt."""
    old = standing(place, progress=80, external_id="x", cancel_requested=True, started_at=1.0)
    new = apply(old, EVENTS[event], NOW).execution
    assert (new.attempt, new.token, new.fenced, new.cancel_requested) == (3, "new", False, False)
    assert (new.progress, new.external_id, new.started_at, new.finished_at) == (0, None, None, None)


@pytest.mark.parametrize(("place", "event"), [pair for pair in LEGAL if law()[pair] == "CANCELLED"])
def test_a_cancelled_attempt_is_fenced(place: str, event: str) -> None:
    """Its token is worth nothing any more."""
    cancelled = apply(standing(place), EVENTS[event], NOW).execution
    assert (cancelled.fenced, cancelled.finished_at) == (True, NOW)


def test_none_keeps_what_was_told_before() -> None:
    """A sign of life without progress is no progress of 0."""
    before = standing("RUNNING", progress=40, message="pass 1", external_id="x")
    after = apply(before, events.Progressed(), NOW).execution
    assert (after.progress, after.message, after.external_id) == (40, "pass 1", "x")


class Lives(RuleBasedStateMachine):
    """Any sequence of events: the numbers only rise, a final status stays."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.told: list[tuple[int, Status]] = []
        self.attempts = [1]
        self.execution = accept(Execution("624", "copy", update_timeout_s=10.0), 0.0).execution

    @rule(event=st.sampled_from(sorted(EVENTS)))
    def happens(self, event: str) -> None:
        self.now += 1
        settled = self.execution.status in {Status.COMPLETED, Status.CANCELLED}
        try:
            move = apply(self.execution, EVENTS[event], self.now)
        except TransitionRefused:
            return
        assert not settled
        self.execution = move.execution
        self.attempts.append(self.execution.attempt)
        if lifecycle.is_told(move.event):
            self.told.append((self.execution.sequence, self.execution.status))

    @invariant()
    def numbers_rise(self) -> None:
        sequences = [sequence for sequence, _ in self.told]
        assert sequences == sorted(set(sequences))
        assert self.attempts == sorted(self.attempts)

    @invariant()
    def finished_have_an_end(self) -> None:
        final = {Status.COMPLETED, Status.FAILED, Status.CANCELLED, Status.TIMED_OUT}
        assert (self.execution.finished_at is not None) is (self.execution.status in final)


TestLives = Lives.TestCase
