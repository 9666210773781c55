"""Commands, updates, retries, calls and checkpoints, on a real ledger with a clock that moves when told."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from jef_daemon.errors import NotFound
from jef_daemon.events import (
    Completed,
    Failed,
    FellSilent,
    GraceEnded,
    Interrupted,
    Launched,
    Resumed,
    Stopped,
)
from jef_daemon.ledger import Policy, Reader
from jef_daemon.ledger.refusals import MOST
from jef_daemon.lifecycle import Status
from jef_daemon.messages import Control, Update
from jef_daemon.names import Names
from jef_daemon.ports import NOTHING_TO_POLL, Accepted, Capacity, Command, Delivery, Outgoing, Reported
from jef_daemon.retry import RetryPolicy
from jef_daemon.updates import Updates
from tests.support.clock import ManualClock
from tests.support.ledgers import LOCK, Life

CANCEL = b'{"command": "cancel", "executionId": "1"}'
BROKE = Failed(error_type="RuntimeError", error_message="on purpose")


@pytest.fixture
async def life(tmp_path: Path) -> AsyncIterator[Life]:
    one = Life(f"sqlite:///{tmp_path / 'ledger.db'}", ManualClock())
    await one.open()
    yield one
    await one.close()


# --- every status, every command -------------------------------------------------------------------------


async def _waiting(life: Life) -> None:
    await life.arrive("1", locks=(LOCK,))
    await life.wait_for_lock("1")


async def _granted(life: Life) -> None:
    await _waiting(life)
    await life.grant("1")


async def _cancelling(life: Life) -> None:
    await life.run("1")
    await life.command("cancel", "1", reason="first")


async def _silent(life: Life) -> None:
    await life.run("1", "f", Launched())
    await life.fall_silent("1")


async def _closed(life: Life) -> None:
    await life.run("1", "f", Launched())
    await life.fall_silent("1", close=True)


async def _failed_after_a_cancel(life: Life) -> None:
    await _cancelling(life)
    await life.apply("1", BROKE)


async def _silent_after_a_cancel(life: Life, *, close: bool = False) -> None:
    await life.run("1", "f", Launched())
    await life.command("cancel", "1", reason="first")
    await life.fall_silent("1", close=close)


async def _cancelled(life: Life) -> None:
    await life.arrive("1")
    await life.command("cancel", "1")


PLACES: dict[str, Callable[[Life], Awaitable[Any]]] = {
    "QUEUED": lambda life: life.arrive("1"),
    "WAITING_FOR_LOCK": _waiting,
    "granted": _granted,
    "not cancellable yet": lambda life: life.arrive("1", "fixed"),
    "RUNNING": lambda life: life.run("1"),
    "not cancellable": lambda life: life.run("1", "fixed"),
    "being cancelled": _cancelling,
    "outside": lambda life: life.run("1", "f", Launched()),
    "COMPLETED": lambda life: life.run("1", "a", Completed()),
    "FAILED": lambda life: life.run("1", "a", BROKE),
    "CANCELLED": _cancelled,
    "TIMED_OUT (open)": _silent,
    "TIMED_OUT (closed)": _closed,
    "failed after a cancel": _failed_after_a_cancel,
    "silent after a cancel": _silent_after_a_cancel,
    "closed after a cancel": lambda life: _silent_after_a_cancel(life, close=True),
}
COMMANDS = ("cancel", "force", "retry", "resume")
ANSWERS = """
QUEUED                 CANCELLED  CANCELLED  -          -
WAITING_FOR_LOCK       CANCELLED  CANCELLED  -          -
granted                CANCELLED  CANCELLED  -          -
not cancellable yet    CANCELLED  CANCELLED  -          -
RUNNING                RUNNING    CANCELLED  -          -
not cancellable        -          CANCELLED  -          -
being cancelled        RUNNING    CANCELLED  -          -
outside                RUNNING    CANCELLED  -          -
COMPLETED              -          -          -          -
FAILED                 CANCELLED  CANCELLED  QUEUED     -
CANCELLED              -          -          -          -
TIMED_OUT (open)       CANCELLED  CANCELLED  QUEUED     TIMED_OUT
TIMED_OUT (closed)     CANCELLED  CANCELLED  QUEUED     -
failed after a cancel  CANCELLED  CANCELLED  QUEUED     -
silent after a cancel  CANCELLED  CANCELLED  QUEUED     TIMED_OUT
closed after a cancel  CANCELLED  CANCELLED  QUEUED     -
"""
"""What each command comes to in each place: the status that is answered and kept; -: refused."""
PAIRS = [
    (row[:23].strip(), command, word)
    for row in ANSWERS.strip().splitlines()
    for command, word in zip(COMMANDS, row[23:].split(), strict=True)
]


def test_the_table_knows_every_place() -> None:
    """None is forgotten."""
    assert {place for place, _, _ in PAIRS} == set(PLACES)


@pytest.mark.parametrize(("place", "command", "word"), PAIRS)
async def test_every_command_in_every_status(life: Life, place: str, command: str, word: str) -> None:
    """What it answers is what is kept; what is refused changes nothing and tells nobody."""
    await PLACES[place](life)
    before, told = life.find("1"), len(await life.told())
    force = command == "force"
    answer, _ = await life.command("cancel" if force else command, "1", force=force, reason="because")
    after = life.find("1")
    assert answer["status"] == after.status
    if word == "-":
        assert (answer["accepted"], after) == (False, before)
        assert answer["reason"]
        assert len(await life.told()) == told
    else:
        assert (answer["accepted"], answer["status"]) == (True, word)
        assert (await life.told())[-1]["status"] == (before.status if command == "resume" else word)
        assert not [event for event in life.events("1") if "refused" in event]


@pytest.mark.parametrize("command", COMMANDS)
async def test_a_command_for_the_unknown(life: Life, command: str) -> None:
    """A cancel waits for it; others have nothing to do."""
    force = command == "force"
    answer, found = await life.command("cancel" if force else command, "nobody", force=force)
    assert answer["accepted"] is (command in {"cancel", "force"})
    assert answer["status"] is None
    assert found.unknown == ({"nobody"} if answer["accepted"] else set())


@pytest.mark.parametrize("place", ["WAITING_FOR_LOCK", "granted"])
async def test_a_cancelled_wait_leaves_the_queue(life: Life, place: str) -> None:
    """The lock service hears of it in the same transaction, and a grant that comes too late starts nothing."""
    await PLACES[place](life)
    await life.command("cancel", "1")
    assert await life.locks_asked("1") == ["acquire", "release"]
    await life.grant("1")
    assert await life.claim() == []
    assert [told["status"] for told in await life.told("1")][-1] == "CANCELLED"
    assert "released" in life.rows("job_locks")[0]


@pytest.mark.parametrize(
    ("place", "stops", "calls"), [("RUNNING", 1, 0), ("outside", 1, 1), ("QUEUED", 0, 0)]
)
async def test_what_follows_from_a_cancel(life: Life, place: str, stops: int, calls: int) -> None:
    """Whoever runs it is stopped, whoever runs it outside is called, who has not begun leaves the queue."""
    await PLACES[place](life)
    _, found = await life.command("cancel", "1", reason="wrong file")
    assert [(stop.actor, stop.reason) for stop in found.stops] == [("operator:ann", "wrong file")] * stops
    assert [call.name for call in await life.ledger.due_calls(9)] == ["cancel"] * calls
    assert (found.left, found.calls) == (["a"] if place == "QUEUED" else [], bool(calls))


@pytest.mark.parametrize("waits", [{"locks": (LOCK,)}, {"not_before": 2e9}])
async def test_who_waits_for_a_lock_or_a_time_was_in_no_backlog(life: Life, waits: dict[str, Any]) -> None:
    """It leaves none: another's place in it would be given away."""
    await life.arrive("1", **waits)
    _, found = await life.command("cancel", "1")
    assert (found.left, life.status("1")) == ([], "CANCELLED")


async def test_who_cancelled_and_why_is_told_and_kept(life: Life) -> None:
    """With the request and, where it ends at once, with the end."""
    await life.arrive("q")
    await life.run("r", "f", Launched())
    for name in ("q", "r"):
        await life.command("cancel", name, reason="wrong file")
        last = (await life.told(name))[-1]
        assert (last["by"], last["reason"]) == ("operator:ann", "wrong file")
        assert life.events(name)[-1] == "CancelRequested by operator:ann"
    assert last["cancelRequested"] is True


@pytest.mark.parametrize("reason", ["because", ""])
@pytest.mark.parametrize(
    ("command", "place", "event", "otherwise"),
    [
        ("cancel", "QUEUED", "CancelRequested", "cancelled"),
        ("retry", "FAILED", "Retried", "retried"),
        ("resume", "TIMED_OUT (open)", "ResumeAsked", "asked to resume"),
    ],
)
async def test_every_command_is_in_the_history_with_who_and_why(
    life: Life, command: str, place: str, event: str, otherwise: str, reason: str
) -> None:
    await PLACES[place](life)
    await life.command(command, "1", reason=reason)
    last = life.history("1")[-1]
    assert (last.event, last.actor, last.reason) == (event, "operator:ann", reason or otherwise)


async def test_force_fences_the_attempt(life: Life) -> None:
    """What its executor says afterwards changes nothing."""
    await life.run("1", "f", Launched())
    token = life.token("1")
    await life.command("cancel", "1", force=True)
    answer = await life.update("1", "COMPLETED", token, jobContextVariables={"x": 1})
    assert answer["accepted"] is False
    [late] = await life.apply("1", Completed())
    assert late.transition is None
    assert [told["status"] for told in await life.told("1")].count("CANCELLED") == 1
    assert life.status("1") == "CANCELLED"


async def test_a_completion_that_was_persisted_first_wins(life: Life) -> None:
    """And one that was persisted after the request, but before anything stopped it, as well."""
    await life.run("1", "a", Completed(result="done"))
    assert (await life.command("cancel", "1"))[0]["accepted"] is False
    await life.run("2")
    await life.command("cancel", "2")
    await life.apply("2", Completed(result="done"))
    assert (await life.told("2"))[-1]["status"] == "COMPLETED"


@pytest.mark.parametrize("again", [True, False])
async def test_an_interruption_of_what_was_to_be_cancelled_cancels_it(life: Life, again: bool) -> None:
    """Whether the daemon died or was drained: it neither failed nor runs again."""
    for name in ("died", "drained", "told"):
        await life.run(name)
        await life.command("cancel", name, reason="no")
    broken = Failed(actor="daemon", error_type="Interrupted", error_message="drained")
    await life.apply("drained", Interrupted(token="n", reason="drained") if again else broken)
    await life.reopen()
    await life.ledger.interrupt(lambda action: again, "it died")
    assert {life.status(name) for name in ("died", "drained", "told")} == {"CANCELLED"}
    assert await life.claim() == []


async def test_each_command_is_answered_to_whoever_gave_it(life: Life) -> None:
    """In order; also to who did not come by a queue, as the HTTP port."""
    await life.arrive("1")
    controls = [Control.model_validate_json(CANCEL), Control.model_validate_json(CANCEL)]
    found = await life.ledger.commanding([Command(controls[0]), Command(controls[1], reply_to="asker")])
    assert [answer["accepted"] for answer in found.answers] == [True, False]
    assert await life.answers() == [
        {"accepted": False, "status": "CANCELLED", "reason": "it is CANCELLED already"}
    ]


async def test_a_claim_and_a_cancel_in_one_transaction(life: Life) -> None:
    """It starts, and is to be stopped: the stop names the attempt that runs."""
    await life.arrive("1")
    commanding = life.ledger.commanding([Command(Control.model_validate_json(CANCEL))])
    claiming = life.ledger.claiming(Capacity(1, {"a": 1}))
    found = await commanding
    [claimed] = await claiming
    assert [(stop.execution.execution_id, stop.execution.attempt) for stop in found.stops] == [("1", 1)]
    assert claimed.execution.attempt == 1


async def test_only_what_ran_here_is_interrupted(life: Life) -> None:
    """In the daemon's name; what waits, is silent, has ended or goes on elsewhere stays what it is."""
    await life.run("done", "a", Completed())
    await life.run("failed", "a", BROKE)
    await life.run("outside", "f", Launched())
    await life.run("silent")
    await life.fall_silent("silent")
    await life.run("ran", "plain")
    await life.arrive("waits")
    names = ("done", "failed", "outside", "silent", "waits")
    before = [life.find(name) for name in names]
    await life.reopen()
    assert await life.ledger.interrupt(lambda action: False, "it died") == 1
    assert [life.find(name) for name in names] == before
    last = life.history("ran")[-1]
    assert (last.event, last.actor, last.status) == ("Failed", "daemon", "FAILED")
    assert (await life.told("ran"))[-1]["error"] == {"type": "Interrupted", "message": "it died"}
    assert not [name for name in names for event in life.events(name) if "refused" in event]


async def test_what_has_not_begun_is_handed_back_by_its_rank(life: Life) -> None:
    """Those that are urgent first, then as they came; what runs, or has ended, is nobody else's."""
    await life.run("runs")
    await life.run("done", "a", Completed())
    for name, priority in (("1", 0), ("2", 5), ("3", 0), ("4", 9)):
        await life.arrive(name, priority=priority)
    assert await life.ledger.hand_back() == 4
    back = [json.loads(each.body)["executionId"] for each in await life.outbox() if each.exchange == "t.jobs"]
    assert back == ["4", "2", "1", "3"]
    assert [life.find(name).handed_back for name in ("runs", "done")] == [False, False]


# --- cancels that come before -----------------------------------------------------------------------------


async def test_a_remembered_cancel_meets_its_execution_once(life: Life) -> None:
    """Also after a restart; and is used up then."""
    await life.command("cancel", "1", reason="too late")
    await life.reopen()
    assert await life.arrive("1") is Accepted.CANCELLED
    last = (await life.told("1"))[-1]
    assert (last["status"], last["message"]) == ("CANCELLED", "too late")
    assert life.events("1")[-1] == "CancelRequested by operator:ann"
    assert life.rows("tombstones") == []
    assert await life.claim() == []


async def test_a_remembered_cancel_of_a_workflow_meets_all_that_come(life: Life) -> None:
    """It is not used up by the first, and others run."""
    await life.command("cancel", workflow_id="w")
    await life.reopen()
    words = [await life.arrive(name, workflow_id=of) for name, of in [("1", "w"), ("2", "w"), ("3", "v")]]
    assert words == [Accepted.CANCELLED, Accepted.CANCELLED, Accepted.NEW]


async def test_remembered_cancels_are_told_apart(life: Life) -> None:
    """A job and a workflow may have the same name: what is used up, or remembered anew, is that of the one."""
    for names in ({"execution_id": "x"}, {"workflow_id": "x"}, {"execution_id": "y"}, {"execution_id": "x"}):
        await life.command("cancel", **names)
    assert sorted(row[:2] for row in life.rows("tombstones")) == [
        *(("execution", "x"), ("execution", "y"), ("workflow", "x"))
    ]
    assert await life.arrive("x") is Accepted.CANCELLED
    assert sorted(row[:2] for row in life.rows("tombstones")) == [("execution", "y"), ("workflow", "x")]
    assert await life.arrive("1", workflow_id="y") is Accepted.NEW


async def test_a_remembered_cancel_is_forgotten_in_time(life: Life) -> None:
    """After 24 h by default; the next one clears it away."""
    await life.command("cancel", "1")
    await life.command("cancel", workflow_id="w")
    life.clock.time += 86_401
    assert await life.arrive("1", workflow_id="w") is Accepted.NEW
    await life.command("cancel", "2")
    assert [row[1] for row in life.rows("tombstones")] == ["2"]


@pytest.mark.parametrize("delay_s", [0.0, 50.0])
async def test_what_was_handed_back_waits_anew_when_it_comes_again(life: Life, delay_s: float) -> None:
    """As at any daemon that takes it: its time in the queue is not what it waited here before."""
    await life.arrive("1", queue_timeout_s=10.0)
    await life.ledger.hand_back()
    life.clock.time += 100
    not_before = life.clock.time + delay_s if delay_s else None
    again: dict[str, Any] = {"sequence": 9, "queue_timeout_s": 10.0, "not_before": not_before}
    assert await life.arrive("1", **again) is Accepted.TAKEN_AGAIN
    assert life.find("1").due_at == life.clock.time + delay_s + 10


async def test_a_cancel_of_what_was_handed_back_meets_it_when_it_comes_again(life: Life) -> None:
    """Whoever has it now may be away: remembered, here too."""
    await life.arrive("1")
    assert await life.ledger.hand_back() == 1
    answer, found = await life.command("cancel", "1")
    assert (answer["accepted"], answer["status"], found.unknown) == (True, None, {"1"})
    assert await life.arrive("1", sequence=1) is Accepted.CANCELLED
    assert await life.claim() == []
    assert life.status("1") == "CANCELLED"
    assert life.rows("tombstones") == []


async def test_what_comes_again_has_the_attempt_it_had_elsewhere(life: Life) -> None:
    """Another daemon may have tried it meanwhile."""
    await life.arrive("1")
    await life.ledger.hand_back()
    assert await life.arrive("1", attempt=3, sequence=9) is Accepted.TAKEN_AGAIN
    [claimed] = await life.claim()
    assert (claimed.execution.attempt, claimed.execution.sequence) == (3, 10)


async def test_what_comes_again_begins_as_with_any_other_daemon(life: Life) -> None:
    """Its retry's delay was not handed on, so it counts as backlog for who took it in, and for who starts it."""
    broke = Failed(error_type="RuntimeError", error_message="on purpose")
    await life.run("1", "again", broke, queue_timeout_s=60.0)
    await life.ledger.hand_back()
    life.clock.time += 5
    assert await life.arrive("1", "again", attempt=2, sequence=9) is Accepted.TAKEN_AGAIN
    assert await life.ledger.queued() == {"again": 1}
    consequences = await life.ledger.run_out(life.clock.time + 59, 10)
    assert consequences.left == []
    [claimed] = await life.claim()
    assert claimed.execution.is_backlog


# --- workflows --------------------------------------------------------------------------------------------


async def test_a_workflow_of_many_pages(life: Life) -> None:
    """All are met, once each, and all are counted; also when a page is full of those that refuse."""
    await life.arrive_all([f"fixed-{number}" for number in range(501)], "fixed", workflow_id="w")
    await life.claim()
    await life.arrive_all([str(number) for number in range(600)], workflow_id="w")
    await life.arrive("other", workflow_id="v")
    answer, found = await life.command("cancel", workflow_id="w")
    assert answer["reason"].startswith("600 cancelled")
    assert "cannot be cancelled" in answer["reason"]
    assert len(await life.answers()) == 1
    assert len(found.left) == 600
    reader = Reader(life.url)
    assert reader.count() == {"CANCELLED": 600, "RUNNING": 501, "QUEUED": 1}
    reader.close()


async def test_a_cancel_of_a_workflow_meets_what_fell_silent_after_another(life: Life) -> None:
    """What is being cancelled is asked no second time, unless it is forced; what nobody stopped ends."""
    for name in ("silent", "runs"):
        await life.run(name, "f", Launched(), workflow_id="w")
        await life.command("cancel", name)
    await life.fall_silent("silent")
    answer, found = await life.command("cancel", workflow_id="w")
    assert answer["reason"].startswith("1 cancelled")
    assert [stop.execution.execution_id for stop in found.stops] == ["silent"]
    assert (life.status("silent"), life.status("runs")) == ("CANCELLED", "RUNNING")
    await life.command("cancel", workflow_id="w", force=True)
    assert life.status("runs") == "CANCELLED"


async def test_resume_of_a_workflow_ends(life: Life) -> None:
    """Those that are asked to resume stay TIMED_OUT for the moment: they are not found again and again."""
    await life.arrive_all([str(number) for number in range(501)], "f", workflow_id="w")
    running = [claimed.execution.execution_id for claimed in await life.claim()]
    await asyncio.gather(*(life.apply(name, Launched(), FellSilent()) for name in running))
    answer, _ = await life.command("resume", workflow_id="w")
    assert answer == {"accepted": True, "status": None, "reason": "501 of them"}


async def test_the_job_of_a_stage_is_left_to_its_coordinator(life: Life) -> None:
    """Who hears a cancel or a retry of its workflow too, and knows what it means; resumed is what is silent here."""
    await life.run("1", "f", Launched(), FellSilent(), workflow_id="w", stage="a")
    await life.command("cancel", workflow_id="w")
    assert (await life.command("retry", workflow_id="w"))[0]["accepted"] is False
    assert life.status("1") == "TIMED_OUT (open)"
    assert await life.arrive("2", workflow_id="w", stage="b") is Accepted.NEW
    answer, found = await life.command("resume", workflow_id="w")
    assert (answer["reason"], found.calls) == ("1 of them", True)


async def test_retry_of_a_workflow(life: Life) -> None:
    """Those that failed or timed out; the others stay as they are."""
    await life.run("failed", "a", workflow_id="w")
    await life.command("cancel", "failed")  # what was wanted then does not count now
    await life.apply("failed", BROKE)
    await life.run("silent", "f", Launched(), FellSilent(), workflow_id="w")
    await life.run("done", "a", Completed(), workflow_id="w")
    answer, found = await life.command("retry", workflow_id="w")
    assert answer["reason"] == "2 of them"
    assert sorted(found.queued) == ["a", "f"]
    assert life.status("done") == "COMPLETED"
    assert (await life.command("retry", workflow_id="nobody's"))[0]["accepted"] is False


# --- retry ------------------------------------------------------------------------------------------------


async def test_a_failure_is_retried_as_often_and_as_late_as_the_policy_says(life: Life) -> None:
    """Each failure is told; a new token; not before its time, also after a restart; then FAILED."""
    await life.run("1", "again", BROKE, reply_to="waiter")
    first = life.find("1")
    assert (first.status, first.attempt, first.not_before) == (Status.QUEUED, 2, life.clock.time + 10)
    assert first.token not in {"", "token-1"}
    assert await life.claim() == []
    await life.reopen()
    life.clock.time += 10
    assert len(await life.claim()) == 1
    await life.apply("1", BROKE)
    assert life.find("1").not_before == life.clock.time + 20
    life.clock.time += 20
    await life.claim()
    await life.apply("1", BROKE)
    assert life.status("1") == "FAILED"
    told = [(one["status"], one["attempt"]) for one in await life.told("1")]
    assert told == [(status, attempt) for attempt in (1, 2, 3) for status in ("QUEUED", "RUNNING", "FAILED")]


async def test_only_the_last_failure_ends_the_job(life: Life) -> None:
    """Whoever waits for the end hears it once, and a duplicate is told nothing else."""
    await life.run("1", "again", BROKE, reply_to="waiter")
    assert await life.answers("waiter") == []
    assert life.rows("outcomes") == []
    for _ in range(2):
        life.clock.time += 20
        await life.claim()
        await life.apply("1", BROKE)
    [end] = await life.answers("waiter")
    assert (end["status"], end["attempt"]) == ("FAILED", 3)
    assert len(life.rows("outcomes")) == 1


@pytest.mark.parametrize(
    ("failure", "fields"),
    [
        (Failed(error_type="Hopeless", error_message=""), {}),
        (Failed(error_type="ConfigurationRefused", error_message=""), {}),
        (Failed(error_type="Interrupted", error_message=""), {}),
        (BROKE, {"max_attempts": 1}),
    ],
)
async def test_what_is_not_retried(life: Life, failure: Failed, fields: dict[str, Any]) -> None:
    """Errors that the policy names, ours that would come again, and what the request has narrowed."""
    await life.run("1", "again", failure, **fields)
    assert life.status("1") == "FAILED"


async def test_nothing_is_retried_after_a_cancel_request(life: Life) -> None:
    """Neither a failure of ours nor one that is reported."""
    await life.run("1", "again")
    await life.command("cancel", "1")
    await life.apply("1", BROKE)
    assert life.status("1") == "FAILED"
    await life.run("2", "again", Launched())
    await life.command("cancel", "2")
    await life.update("2", "FAILED", error={"type": "X"})
    assert life.status("2") == "FAILED"


async def test_a_time_out_is_retried_when_its_grace_is_over(life: Life) -> None:
    """Where the policy wants it; not as long as a late update may come."""
    await life.run("1", "again", Launched())
    await life.fall_silent("1")
    assert life.status("1") == "TIMED_OUT (open)"
    await life.apply("1", GraceEnded())
    assert (life.status("1"), life.find("1").attempt) == ("QUEUED", 2)
    await life.run("2", "f", Launched())
    await life.fall_silent("2", close=True)
    assert life.status("2") == "TIMED_OUT (closed)"


async def test_a_retry_by_command_goes_beyond_the_policy(life: Life) -> None:
    """At once, with a new token; its failure is final again."""
    await life.run("1", "a", BROKE)
    _, found = await life.command("retry", "1")
    assert found.queued == ["a"]
    [claimed] = await life.claim()
    assert (claimed.execution.attempt, claimed.execution.token != "token-1") == (2, True)
    await life.apply("1", BROKE)
    assert life.status("1") == "FAILED"


async def test_a_retry_takes_locks_anew(life: Life) -> None:
    """Released with the failure, asked for with the new attempt, when its time has come."""
    await life.arrive("1", "again", locks=(LOCK,))
    await life.grant("1")
    await life.claim()
    await life.apply("1", BROKE)
    assert await life.locks_asked("1") == ["acquire", "release"]
    life.clock.time += 10
    await life.ledger.go_on_locking(0)
    assert await life.locks_asked("1") == ["acquire", "release", "acquire"]
    await life.grant("1")
    assert [claimed.execution.attempt for claimed in await life.claim()] == [2]


async def test_a_late_update_meets_a_retry_or_a_time_out_never_both(life: Life) -> None:
    """Persisted first, it completes the job, and there is nothing to retry; else its token is worth nothing."""
    for name in ("early", "late"):
        await life.run(name, "f", Launched())
        await life.fall_silent(name)
    token = life.token("late")
    answer = await life.update("early", "COMPLETED", result="done")
    assert answer["accepted"] is True
    assert (await life.told("early"))[-1]["late"] is True
    assert (await life.command("retry", "early"))[0]["accepted"] is False
    assert (await life.command("retry", "late"))[0]["accepted"] is True
    assert (await life.update("late", "COMPLETED", token))["accepted"] is False
    assert life.status("late") == "QUEUED"


# --- updates ----------------------------------------------------------------------------------------------

UPDATES = ("RUNNING", "COMPLETED", "FAILED", "CANCELLED")


@pytest.mark.parametrize("status", UPDATES)
@pytest.mark.parametrize("place", ["outside", "TIMED_OUT (open)"])
async def test_an_update_with_the_attempts_token_moves_it(life: Life, place: str, status: str) -> None:
    """Late ones as well, and say so."""
    await PLACES[place](life)
    more = {"externalId": "x-9"} if status != "CANCELLED" else {}
    answer = await life.update("1", status, message="said", progress=40, **more)
    assert answer == {"accepted": True, "cancelRequested": False}
    last = (await life.told("1"))[-1]
    assert (last["status"], last.get("late", False)) == (status, place != "outside")
    assert last.get("externalId") == more.get("externalId")


@pytest.mark.parametrize("status", UPDATES)
@pytest.mark.parametrize("wrong", ["another", "stale", "fenced", "finished", "unknown", "unstarted"])
async def test_any_other_update_changes_nothing(life: Life, wrong: str, status: str) -> None:
    """It is refused, recorded where there is something to record it with, and no variable is applied."""
    await life.run("1", "f", Launched())
    token, name = life.token("1"), "1"
    if wrong == "another":
        token = "guessed"
    elif wrong in {"stale", "unstarted"}:
        await life.apply("1", BROKE)
        await life.command("retry", "1")
        token = token if wrong == "stale" else life.token("1")
    elif wrong == "fenced":
        await life.fall_silent("1", close=True)
    elif wrong == "finished":
        await life.apply("1", Completed())
    else:
        name = "nobody"
    before, told = life.find("1"), await life.told()
    answer = await life.update(name, status, token, jobContextVariables={"x": 1}, result="r")
    assert answer["accepted"] is False
    assert answer["reason"]
    assert (life.find("1"), await life.told()) == (before, told)
    if name == "1":
        assert life.events("1")[-1].endswith("refused by executor")
    else:
        with pytest.raises(NotFound):
            life.find(name)


@pytest.mark.parametrize("at_once", [1, 7])
async def test_a_history_holds_a_hundred_refusals(life: Life, at_once: int) -> None:
    """Of an execution, whatever is tried how often; all are answered, and what counts is recorded."""
    await life.run("1", "f", Launched())
    wrong = Update.model_validate({"executionId": "1", "status": "RUNNING", "token": "guessed"})
    for _ in range(MOST // at_once + 2):
        answers, _ = await life.ledger.updating([Reported(wrong)] * at_once)
        assert [answer["accepted"] for answer in answers] == [False] * at_once
    [illegal] = await life.apply("1", GraceEnded())
    assert illegal.refused
    refused = [entry for entry in life.history("1") if entry.event.endswith(" refused")]
    assert ["only counted" in entry.reason for entry in refused] == [False] * (MOST - 1) + [True]
    await life.update("1", "COMPLETED")
    assert life.history("1")[-1].event == "Completed"


async def test_variables_that_are_too_long_are_refused(life: Life) -> None:
    """The job goes on: its sender may send less."""
    await life.run("1", "f", Launched())
    answer = await life.update("1", "COMPLETED", jobContextVariables={"x": "y" * 300})
    assert "200 are allowed" in answer["reason"]
    assert (await life.update("1", "COMPLETED", jobContextVariables={"x": "y"}))["accepted"] is True


async def test_the_answer_to_an_update_tells_of_a_cancel_request(life: Life) -> None:
    """That is how work outside hears of it."""
    await life.run("1", "f", Launched())
    await life.command("cancel", "1")
    assert await life.update("1", "RUNNING") == {"accepted": True, "cancelRequested": True}
    assert (await life.update("1", "CANCELLED"))["accepted"] is True
    assert life.status("1") == "CANCELLED"


class Wire:
    """A bus that keeps what is done with it."""

    def __init__(self) -> None:
        self.published: list[Outgoing] = []
        self.acknowledged: list[Delivery] = []

    async def acknowledge(self, deliveries: Any) -> None:
        self.acknowledged += deliveries

    async def publish(self, messages: Any) -> Any:
        self.published += messages
        done = asyncio.get_running_loop().create_future()
        done.set_result(None)
        return done


@pytest.mark.parametrize("queue", ["updates", "control"])
@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"\xff", "not-json"),
        (b"[]", "not-an-object"),
        (b"{}", "field-invalid"),
        (b'"' * 2000, "body-too-long"),
    ],
)
async def test_what_is_no_update_and_no_command_becomes_a_dead_letter(
    life: Life, queue: str, body: bytes, code: str
) -> None:
    """Unharmed, with the reason; its sender hears of it, and the queue goes on."""
    wire = Wire()
    updates = Updates(life.ledger, wire, Names("t"), life.ledger.identity, 1000, lambda found: None)
    take = updates._take_updates if queue == "updates" else updates._take_commands
    delivery = Delivery(queue, body, 1, 1, reply_to="asker", correlation_id="c")
    await take([delivery])
    [dead] = [message for message in await life.outbox() if message.exchange == "t.dead"]
    assert dead.body == body
    assert dead.headers is not None
    assert dead.headers["x-jef-reason"] == code
    assert wire.acknowledged == [delivery]
    [answer] = [json.loads(message.body) for message in wire.published]
    assert answer["accepted"] is False
    assert answer["reason"].startswith(code)


@pytest.mark.parametrize("token", ["x" * 300 + ".y", "no-ledger.y", ".y", "0123456789AB.y"])
async def test_a_token_that_names_no_ledger_is_refused_here(life: Life, token: str) -> None:
    """It is no queue's name, perhaps longer than one may be: handed on it would end the role, again and again."""
    await life.run("1", "f", Launched())
    wire = Wire()
    updates = Updates(life.ledger, wire, Names("t"), life.ledger.identity, 1000, lambda found: None)
    body = json.dumps({"executionId": "1", "token": token, "status": "COMPLETED"}).encode()
    delivery = Delivery("updates", body, 1, 1, reply_to="asker", correlation_id="c")
    await updates._take_updates([delivery])
    assert wire.published == []
    assert wire.acknowledged == [delivery]
    [answer] = [json.loads(message.body) for message in await life.outbox() if message.routing_key == "asker"]
    assert answer == {"accepted": False, "reason": "the token is not this attempt's"}
    assert life.status("1") == "RUNNING"


# --- calls ------------------------------------------------------------------------------------------------


async def calls(life: Life) -> list[str]:
    return [f"{call.name} {call.execution.execution_id}" for call in await life.ledger.due_calls(99)]


async def test_polls_come_at_growing_intervals(life: Life) -> None:
    """The first a second after the launch, then half as late again each time, up to a minute."""
    await life.run("1", "f", Launched())
    assert await calls(life) == []
    waits = []
    for _ in range(14):
        waited = 0.0
        while not (due := await life.ledger.due_calls(9)):
            life.clock.time += 0.5
            waited += 0.5
        waits.append(waited)
        await life.ledger.answering(due[0], None)
    assert waits[:5] == [1.0, 1.5, 2.5, 3.5, 5.5]
    assert waits[-1] == 60.0


async def test_a_poll_whose_answer_is_lost_is_made_again(life: Life) -> None:
    """Its daemon died: after two minutes, not at once."""
    await life.run("1", "f", Launched())
    life.clock.time += 1
    assert await calls(life) == ["poll 1"]
    await life.reopen()
    assert await calls(life) == []
    life.clock.time += 120
    assert await calls(life) == ["poll 1"]


async def test_who_has_nothing_to_poll_is_polled_no_more(life: Life) -> None:
    """As an executor says whose updates come by themselves; the job goes on, and its cancel hook is called."""
    await life.run("1", "f", Launched())
    life.clock.time += 1
    [poll] = await life.ledger.due_calls(9)
    await life.ledger.answering(poll, Failed(error_type=NOTHING_TO_POLL, error_message=""))
    assert (life.rows("calls"), life.status("1"), life.events("1")[-1]) == (
        *([], "RUNNING", "Launched by executor"),
    )
    await life.command("cancel", "1")
    assert await calls(life) == ["cancel 1"]


@pytest.mark.parametrize("end", [Completed(), BROKE, Stopped()])
async def test_an_end_ends_the_polls(life: Life, end: Any) -> None:
    """Whoever says it; and a poll under way says nothing any more."""
    await life.run("1", "f", Launched())
    life.clock.time += 1
    [poll] = await life.ledger.due_calls(9)
    await life.apply("1", end)
    await life.ledger.answering(poll, Completed(result="late"))
    assert life.rows("calls") == []
    assert not [event for event in life.events("1") if "refused" in event]
    assert len([told for told in await life.told("1") if told["status"] == "COMPLETED"]) <= 1


async def test_many_ends_in_one_transaction(life: Life) -> None:
    """Updates come in batches: what is written for one of them is written for all at once."""
    await life.arrive_all(["1", "2", "3"], "f")
    await life.claim()
    for name in ("1", "2", "3"):
        await life.apply(name, Launched())
    ends = [
        {"executionId": name, "status": status, "token": life.token(name)}
        for name, status in zip("123", ("COMPLETED", "FAILED", "CANCELLED"), strict=True)
    ]
    await life.ledger.updating([Reported(Update.model_validate_json(json.dumps(end))) for end in ends])
    assert [life.status(name) for name in "123"] == ["COMPLETED", "FAILED", "CANCELLED"]
    assert life.rows("calls") == []


async def test_a_poll_completes_it(life: Life) -> None:
    """As an update would."""
    await life.run("1", "f", Launched())
    life.clock.time += 1
    [poll] = await life.ledger.due_calls(9)
    await life.ledger.answering(poll, Completed(result="done"))
    assert ((await life.told("1"))[-1]["result"], life.rows("calls")) == ("done", [])


async def test_a_poll_fails_it(life: Life) -> None:
    """What the other side says of the work is no trouble of the hook's own."""
    await life.run("1", "f", Launched())
    life.clock.time += 1
    [poll] = await life.ledger.due_calls(9)
    await life.ledger.answering(poll, BROKE)
    assert ((await life.told("1"))[-1]["status"], life.rows("calls")) == ("FAILED", [])


async def test_what_is_said_of_a_job_that_is_purged_means_nothing(life: Life) -> None:
    """Its hook took its time; or its executor saves what it came to."""
    await life.run("1", "f", Launched())
    await life.command("cancel", "1", force=True)
    [call] = await life.ledger.due_calls(9)
    assert await life.ledger.purge(life.clock.time + 1, 9) == 1
    await life.ledger.answering(call, Stopped())
    assert not await life.ledger.saving("1", 1, "{}")


async def test_the_cancel_hook_is_called_though_the_job_has_ended(life: Life) -> None:
    """What runs outside does not know; what the hook says then changes nothing, and it is called once."""
    await life.run("1", "f", Launched())
    await life.command("cancel", "1", force=True)
    assert life.status("1") == "CANCELLED"
    [call] = await life.ledger.due_calls(9)
    assert call.name == "cancel"
    await life.ledger.answering(call, Stopped())
    assert life.rows("calls") == []
    assert life.events("1")[-1] == "Stopped by operator:ann"
    assert [told["status"] for told in await life.told("1")].count("CANCELLED") == 1


async def test_the_cancel_hook_stops_it_or_waits_for_an_update(life: Life) -> None:
    """True: it has stopped. A hook that fails is recorded, and the job goes on."""
    for name, event in (("stops", Stopped()), ("waits", None), ("breaks", BROKE)):
        await life.run(name, "f", Launched())
        await life.command("cancel", name)
        [call] = await life.ledger.due_calls(9)
        await life.ledger.answering(call, event)
    assert [life.status(name) for name in ("stops", "waits", "breaks")] == ["CANCELLED", "RUNNING", "RUNNING"]
    assert life.events("breaks")[-1] == "cancel failed by executor"


async def test_a_cancel_while_it_is_launched_reaches_the_work(life: Life) -> None:
    """There was nothing to call when it was asked for; there is once it runs."""
    await life.run("1", "f")
    await life.command("cancel", "1")
    assert await calls(life) == []
    await life.apply("1", Launched())
    assert await calls(life) == ["cancel 1"]


async def test_a_cancel_of_an_attempt_that_is_over_does_not_meet_the_next(life: Life) -> None:
    """The work failed before its hook could be called, and somebody tries again."""
    await life.run("1", "f", Launched())
    await life.command("cancel", "1")
    await life.update("1", "FAILED")
    await life.command("retry", "1")
    await life.claim()
    await life.apply("1", Launched(external_id="x-2"))
    [call] = await life.ledger.due_calls(9)
    assert (call.name, call.execution.attempt, call.execution.external_id) == ("cancel", 1, None)
    await life.ledger.answering(call, Stopped())
    assert life.status("1") == "RUNNING"


async def test_the_answer_of_one_attempts_cancel_leaves_that_of_the_next(life: Life) -> None:
    """The first hook took its time; meanwhile the next attempt was launched, and cancelled too."""
    await life.run("1", "f", Launched())
    await life.command("cancel", "1")
    [first] = await life.ledger.due_calls(9)
    await life.update("1", "FAILED")
    await life.command("retry", "1")
    await life.claim()
    await life.apply("1", Launched(external_id="x-2"))
    await life.command("cancel", "1")
    await life.ledger.answering(first, None)
    [call] = await life.ledger.due_calls(9)
    assert (call.name, call.execution.attempt, call.execution.external_id) == ("cancel", 2, "x-2")


@pytest.mark.parametrize("how", ["command", "policy"])
async def test_a_retry_of_silent_work_gives_the_old_one_up(life: Life, how: str) -> None:
    """It may still go on outside: its executor is asked to stop that attempt, not the new one."""
    life.ledger.govern(
        {"f": Policy(RetryPolicy(2, first_s=0.0, on_timeout=True), hooks=frozenset({"cancel"}))}
    )
    await life.run("1", "f", Launched(external_id="old"), max_attempts=2)
    await life.apply("1", FellSilent())
    if how == "command":
        assert (await life.command("retry", "1"))[1].calls
    else:
        await life.apply("1", GraceEnded())
    assert life.status("1") == "QUEUED"
    [call] = await life.ledger.due_calls(9)
    assert (call.name, call.execution.attempt, call.execution.external_id) == ("cancel", 1, "old")


async def test_a_retry_of_what_is_silent_here_stops_it(life: Life) -> None:
    """Its worker stops the attempt that was given up; nothing outside is called."""
    await life.run("1")
    await life.fall_silent("1")
    _, found = await life.command("retry", "1", reason="hangs")
    [stop] = found.stops
    assert (stop.execution.attempt, stop.actor, stop.reason) == (1, "operator:ann", "hangs")
    assert (found.queued, found.calls, await calls(life)) == (["a"], False, [])


async def test_what_has_no_resume_is_not_resumed(life: Life) -> None:
    await life.run("1")
    await life.fall_silent("1")
    answer, found = await life.command("resume", "1")
    assert (answer["accepted"], answer["status"]) == (False, "TIMED_OUT")
    assert answer["reason"] == "the executor of a has no resume"
    assert (found.calls, await calls(life)) == (False, [])


async def test_resume_brings_a_timed_out_one_back(life: Life) -> None:
    """RUNNING again when its executor says so; polls go on; the token is the same."""
    await PLACES["TIMED_OUT (open)"](life)
    token = life.token("1")
    _, found = await life.command("resume", "1")
    assert found.calls is True
    [call] = await life.ledger.due_calls(9)
    assert call.name == "resume"
    await life.ledger.answering(call, Resumed())
    assert (life.status("1"), life.token("1")) == ("RUNNING", token)
    life.clock.time += 2
    assert await calls(life) == ["poll 1"]
    assert "ResumeAsked by operator:ann" in life.events("1")


async def test_a_resume_that_fails_leaves_it_timed_out(life: Life) -> None:
    """Recorded; and one that comes after the grace means nothing."""
    await PLACES["TIMED_OUT (open)"](life)
    for event, close in ((BROKE, False), (Resumed(), True)):
        await life.command("resume", "1")
        [call] = await life.ledger.due_calls(9)
        if close:
            await life.apply("1", GraceEnded())
        await life.ledger.answering(call, event)
        assert life.find("1").status is Status.TIMED_OUT
    assert "resume failed by executor" in life.events("1")


# --- checkpoints ------------------------------------------------------------------------------------------


async def test_a_checkpoint_is_kept_on_failure_and_reaches_the_retry(life: Life) -> None:
    """Also across a restart; the last one counts."""
    await life.run("1", "again")
    await life.ledger.saving("1", 1, '{"step": 1}')
    assert await life.ledger.saving("1", 1, '{"step": 2}') is True
    await life.apply("1", BROKE)
    await life.reopen()
    assert await life.ledger.saved("1") == '{"step": 2}'
    assert await life.ledger.saving("1", 1, "{}") is False
    assert await life.ledger.saved("1") == '{"step": 2}'


async def test_each_job_has_a_checkpoint_of_its_own(life: Life) -> None:
    for name in ("1", "2"):
        await life.run(name)
        assert await life.ledger.saving(name, 1, f'{{"of": "{name}"}}')
    assert [await life.ledger.saved(name) for name in ("1", "2", "3")] == ['{"of": "1"}', '{"of": "2"}', None]


async def test_a_checkpoint_and_a_failure_in_one_transaction(life: Life) -> None:
    """An attempt that saves and then fails has saved."""
    await life.run("1", "again")
    saving = life.ledger.saving("1", 1, '{"step": 1}')
    applying = life.ledger.applying("1", 1, [BROKE])
    assert await saving is True
    assert (await applying)[0].transition is not None
    assert await life.ledger.saved("1") == '{"step": 1}'


@pytest.mark.parametrize("how", ["completed", "cancelled", "purged"])
async def test_a_checkpoint_is_dropped_with_what_it_was_for(life: Life, how: str) -> None:
    """Completed, cancelled, or purged with a failure."""
    await life.run("1")
    await life.ledger.saving("1", 1, '{"step": 1}')
    if how == "completed":
        await life.apply("1", Completed())
    elif how == "cancelled":
        await life.command("cancel", "1", force=True)
    else:
        await life.apply("1", BROKE)
        assert len(life.rows("checkpoints")) == 1
        assert await life.ledger.purge(life.clock.time + 1, 10) == 1
    assert life.rows("checkpoints") == []
    assert await life.ledger.saved("1") is None
