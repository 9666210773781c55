"""The whole life cycle on a real ledger, driven at random: requests, slots, updates, commands, locks, crashes.

The clock moves when told, and nothing is random but what hypothesis chooses. What is checked after every step is
what a reader of the protocol relies on: what is told, in its order, is what is kept.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import sqlite3
import tempfile
from collections import defaultdict
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from jef_daemon.events import (
    Completed,
    Event,
    Failed,
    FellSilent,
    GraceEnded,
    Interrupted,
    Launched,
    Progressed,
    Resumed,
    Stopped,
)
from jef_daemon.lifecycle import LOCKING, Place
from jef_daemon.ports import Accepted
from tests.support.clock import ManualClock
from tests.support.ledgers import LOCK, Life

T = TypeVar("T")
NAMES = st.sampled_from(["1", "2", "3", "4"])
ACTIONS = st.sampled_from(["a", "again", "f", "fixed"])
WORKFLOWS = st.sampled_from([None, "w"])
MOST = 5
"""Slots: enough that something runs, few enough that something waits."""
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None
"""Thousands of commits, and no disk is to be tried."""
SETTLED = {"COMPLETED", "CANCELLED"}


class Lives(RuleBasedStateMachine):
    """Four executions, three workflows' worth of trouble."""

    template: Path | None = None
    """An empty ledger, made once: to migrate one for each example would take longer than to use it."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.folder = Path(tempfile.mkdtemp(prefix="jef-lives-", dir=MEMORY))
        path = self.folder / "ledger.db"
        self.life = Life(f"sqlite:///{path}", ManualClock())
        if Lives.template is not None:
            shutil.copy(Lives.template, path)
        self.do(self.life.open())
        if Lives.template is None:
            self.do(self.life.close())
            Lives.template = Path(
                shutil.copy(path, Path(tempfile.mkdtemp(prefix="jef-lives-", dir=MEMORY)) / "ledger.db")
            )
            self.do(self.life.open())
        self.looking = sqlite3.connect(path, isolation_level=None)
        self.looking.row_factory = sqlite3.Row
        self.read_up_to = 0
        self.told: dict[str, list[dict[str, Any]]] = defaultdict(list)
        self.lock_words: dict[str, list[str]] = defaultdict(list)
        self.asked_with: dict[str, str] = {}
        """The correlation id of the last request for locks, as the service has it."""
        self.running: dict[str, int] = {}
        """Attempts that a worker has, by execution, as it was told: they may be over."""
        self.tokens: dict[str, list[str]] = defaultdict(list)
        """Of all attempts that ran, the newest last."""
        self.variables: dict[str, int] = {}
        """What the COMPLETED that was accepted said, by execution."""
        self.number = 0

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(work)

    def teardown(self) -> None:
        """Everything is stopped by force: then nothing is held, due or kept for later."""
        try:
            for name in "1234":
                self.do(self.life.command("cancel", name, force=True))
            self.what_is_told_is_what_is_kept()
            rows = self.rows("executions")
            assert all(row["status"] in SETTLED or row["handed_back"] for row in rows), rows
            assert all(row["state"] == "released" for row in self.rows("job_locks"))
            assert {row["call"] for row in self.rows("calls")} <= {"cancel"}
            # What was handed back keeps what it had saved, should it come back.
            gone = {row["execution_id"] for row in rows if row["handed_back"]}
            assert {row["execution_id"] for row in self.rows("checkpoints")} <= gone
            self.do(self.life.ledger.confirm([message.id for message in self.do(self.life.outbox())]))
            assert self.do(self.life.outbox()) == []
        finally:
            self.looking.close()
            self.do(self.life.close())
            self.loop.close()
            shutil.rmtree(self.folder)

    # --- what happens ------------------------------------------------------------------------------------

    @initialize(action=ACTIONS, locks=st.booleans())
    def begins(self, action: str, locks: bool) -> None:
        self.arrives("1", action, locks, None, 0)

    @rule(name=NAMES, action=ACTIONS, locks=st.booleans(), workflow=WORKFLOWS, delay=st.sampled_from([0, 30]))
    def arrives(self, name: str, action: str, locks: bool, workflow: str | None, delay: int) -> None:
        not_before = self.life.clock.time + delay if delay else None
        terms = {"workflow_id": workflow, "not_before": not_before, "update_timeout_s": 60.0}
        before = self.row(name)
        is_cancelled = self._is_to_be_cancelled(name, workflow)
        self.do(self.life.arrive(name, action, locks=(LOCK,) if locks else (), **terms))
        if before is None and is_cancelled:
            assert self.row(name)["status"] == "CANCELLED"
        elif before is not None and before["handed_back"]:
            assert self.row(name) == before, "a copy of a request took a job that is elsewhere"

    @rule(name=NAMES)
    def it_comes_back(self, name: str) -> None:
        """What was handed back, as `ledger.lifetime` has put it into the outbox."""
        before = self.row(name)
        if before is None or not before["handed_back"]:
            return
        is_cancelled = self._is_to_be_cancelled(name, before["workflow_id"])
        kept = {key: before[key] for key in ("workflow_id", "sequence", "attempt", "update_timeout_s")}
        locks = (LOCK,) if before["wants_locks"] else ()
        word = self.do(self.life.arrive(name, before["action"], locks=locks, **kept))
        row = self.row(name)
        assert not row["handed_back"]
        assert (row["status"] == "CANCELLED") is is_cancelled is (word is Accepted.CANCELLED)
        named = self.rows("tombstones WHERE kind = 'execution'")
        assert name not in {row["name"] for row in named}, "a cancel waits for what is here"

    def _is_to_be_cancelled(self, name: str, workflow: str | None) -> bool:
        return any(
            (row["kind"], row["name"]) in {("execution", name), ("workflow", workflow)}
            and row["until"] > self.life.clock.time
            for row in self.rows("tombstones")
        )

    @rule()
    def slots_come_free(self) -> None:
        for claimed in self.do(self.life.claim(MOST)):
            execution = claimed.execution
            row = self.row(execution.execution_id)
            assert row["status"] == "RUNNING"
            assert bool(claimed.grants) is execution.wants_locks, "it runs without its locks"
            assert not row["handed_back"]
            assert execution.not_before is None or execution.not_before <= self.life.clock.time
            self.running[execution.execution_id] = execution.attempt
            self.tokens[execution.execution_id].append(execution.token)

    @rule(name=NAMES, what=st.sampled_from(["progress", "launch", "complete", "raise", "stop", "interrupt"]))
    def an_executor_says(self, name: str, what: str) -> None:
        if name not in self.running:
            return
        self.number += 1
        events: dict[str, Event] = {
            "progress": Progressed(progress=self.number % 101),
            "launch": Launched(external_id=f"x-{self.number}"),
            "complete": Completed(job_context_variables={"n": self.number}),
            "raise": Failed(error_type="RuntimeError", error_message="on purpose"),
            "stop": Stopped(),
            "interrupt": Interrupted(token=f"interrupted-{self.number}"),
        }
        [applied] = self.do(self.life.ledger.apply(name, self.running[name], [events[what]]))
        if what == "complete" and applied.transition is not None:
            self.variables[name] = self.number

    @rule(
        name=NAMES,
        status=st.sampled_from(["RUNNING", "COMPLETED", "FAILED", "CANCELLED"]),
        age=st.sampled_from([1, 1, 1, 2, 9]),
    )
    def an_update_comes(self, name: str, status: str, age: int) -> None:
        self.number += 1
        known = self.tokens[name]
        token = known[-age] if len(known) >= age else "guessed"
        before = self.row(name)
        variables = {"jobContextVariables": {"n": self.number}} if status == "COMPLETED" else {}
        answer = self.do(self.life.update(name, status, token, **variables))
        if answer["accepted"]:
            assert before["token"] == token
            assert not before["fenced"]
            assert before["status"] in {"RUNNING", "TIMED_OUT"}
            if status == "COMPLETED":
                self.variables[name] = self.number

    @rule(name=NAMES, word=st.sampled_from(["cancel", "force", "retry", "retry", "resume"]))
    def somebody_wants(self, name: str, word: str) -> None:
        command = "cancel" if word == "force" else word
        answer, _ = self.do(self.life.command(command, name, force=word == "force"))
        row = self.row(name)
        if row is None or row["handed_back"]:
            assert (answer["accepted"], answer["status"]) == (command == "cancel", None)
            return
        assert answer["status"] == row["status"]
        if command == "cancel" and answer["accepted"]:
            assert row["status"] == "CANCELLED" or (row["status"] == "RUNNING" and row["cancel_requested"])

    @rule(word=st.sampled_from(["cancel", "retry", "resume"]))
    def somebody_wants_of_all(self, word: str) -> None:
        self.do(self.life.command(word, workflow_id="w"))

    @rule(name=NAMES)
    def it_falls_silent(self, name: str) -> None:
        self.do(self.life.apply(name, FellSilent()))

    @rule(name=NAMES)
    def its_grace_ends(self, name: str) -> None:
        self.do(self.life.apply(name, GraceEnded()))

    @rule(
        answer=st.sampled_from(
            [None, Completed(), Stopped(), Resumed(), Failed(error_type="E", error_message="")]
        )
    )
    def executors_are_called(self, answer: Event | None) -> None:
        for call in self.do(self.life.ledger.due_calls(9)):
            place = self._place(self.row(call.execution.execution_id))
            fits = answer if call.name in {"poll", "cancel"} or isinstance(answer, Resumed | Failed) else None
            self.do(self.ask(call, fits))
            if isinstance(answer, Completed) and place in {Place.RUNNING, Place.TIMED_OUT_OPEN} and fits:
                self.variables.pop(call.execution.execution_id, None)

    async def ask(self, call: Any, event: Event | None) -> None:
        await self.life.ledger.answering(call, event)

    @rule(name=NAMES)
    def it_saves(self, name: str) -> None:
        if name in self.running:
            self.do(asyncio.wait_for(self.saving(name), 10))

    async def saving(self, name: str) -> bool:
        return await self.life.ledger.saving(name, self.running[name], "{}")

    @rule(
        name=NAMES,
        word=st.sampled_from(["WAITING", "GRANTED", "GRANTED", "GRANTED", "REFUSED", "EXPIRED", "LOST"]),
    )
    def the_lock_service_answers(self, name: str, word: str) -> None:
        if name not in self.asked_with:
            return
        if word == "WAITING":
            self.do(self.life.wait_for_lock(name, self.asked_with[name]))
        elif word == "GRANTED":
            self.do(self.life.grant(name, self.asked_with[name]))
        else:
            self.do(self.life.hear(name, word, self.asked_with[name], reason="so it is"))

    @rule(seconds=st.sampled_from([1, 15, 400]))
    def time_goes_by(self, seconds: int) -> None:
        self.life.clock.time += seconds
        self.do(self.life.ledger.go_on_locking(self.life.clock.time - 100))

    @rule(again=st.booleans())
    def the_daemon_dies(self, again: bool) -> None:
        before = {row["execution_id"]: row for row in self.rows("executions")}
        self._read()
        self.do(self.life.reopen())
        if not self.looking.execute("SELECT count(*) FROM outbox").fetchone()[0]:
            self.read_up_to = 0  # numbers are an outbox's own: an empty one begins anew
        self.do(self.life.ledger.interrupt(lambda action: again, "it died"))
        self.running.clear()
        for row in self.rows("executions"):
            was = before[row["execution_id"]]
            if was["status"] != "RUNNING" or was["outside"]:
                assert row["status"] == was["status"]
            elif was["cancel_requested"]:
                assert row["status"] == "CANCELLED"
            else:
                assert row["status"] == ("QUEUED" if again else "FAILED")

    @rule()
    def it_hands_back(self) -> None:
        self.do(self.life.ledger.hand_back())

    @rule()
    def the_broker_confirms(self) -> None:
        """What was read is told: the outbox forgets it."""
        self.what_is_told_is_what_is_kept()
        self.do(self.life.ledger.confirm(range(1, self.read_up_to + 1)))

    # --- what holds --------------------------------------------------------------------------------------

    @invariant()
    def what_is_told_is_what_is_kept(self) -> None:
        self._read()
        for row in self.rows("executions"):
            told = self.told[row["execution_id"]]
            assert told[-1]["status"] == row["status"]
            assert told[-1]["sequence"] == row["sequence"] or row["handed_back"]
            assert (told[-1]["attempt"], told[-1]["progress"]) == (row["attempt"], row["progress"])

    def _read(self) -> None:
        query = "SELECT * FROM outbox WHERE id > ? ORDER BY id"
        for message in self.looking.execute(query, (self.read_up_to,)):
            assert message["id"] == self.read_up_to + 1, "a number was left out or used twice"
            self.read_up_to = message["id"]
            body = json.loads(message["body"])
            if message["routing_key"] == "t.locks":
                self.lock_words[body["owner"]].append(body["operation"])
                self.asked_with[body["owner"]] = message["correlation_id"]
            elif message["exchange"] == "t.status":
                self._hear(body)

    def _hear(self, body: dict[str, Any]) -> None:
        name, status = body["executionId"], body["status"]
        if name in self.told:
            self._follows(self.told[name][-1], body)
        assert ("jobContextVariables" in body) is (status == "COMPLETED")
        if status == "COMPLETED" and name in self.variables:
            assert body["jobContextVariables"] == {"n": self.variables[name]}
        assert ("error" in body) is (status == "FAILED")
        self.told[name].append(body)

    @staticmethod
    def _follows(last: dict[str, Any], body: dict[str, Any]) -> None:
        """One notification after another of the same execution."""
        if body["sequence"] == last["sequence"]:
            assert body == last, "a duplicate is told the very same end"
            return
        assert body["sequence"] > last["sequence"]
        assert last["status"] not in SETTLED, (last, body)
        if body["attempt"] == last["attempt"]:
            assert last["status"] != "FAILED" or body["status"] == "CANCELLED", (last, body)
            assert (
                last["status"] != "TIMED_OUT"
                or body["status"] == "CANCELLED"
                or body.get("late")
                or (body["status"] == "RUNNING")
            ), (last, body)
        else:
            assert body["attempt"] == last["attempt"] + 1
            assert last["status"] in {"RUNNING", "FAILED", "TIMED_OUT"}
            assert body["status"] == "QUEUED"

    @invariant()
    def locks_are_held_by_those_that_run_and_nobody_else(self) -> None:
        self._read()
        executions = {row["execution_id"]: row for row in self.rows("executions")}
        places = {name: self._place(row) for name, row in executions.items()}
        for row in self.rows("job_locks"):
            place, state = places[row["execution_id"]], row["state"]
            if place not in LOCKING or executions[row["execution_id"]]["handed_back"]:
                assert state == "released", (place, state)
                assert self.lock_words[row["execution_id"]][-1:] in ([], ["release"])
            elif place in {Place.RUNNING, Place.TIMED_OUT_OPEN}:
                assert state in {"held", "lost"}, (place, state)
            else:
                assert state in {"later", "asked", "waiting", "granted"}, (place, state)

    @invariant()
    def calls_and_checkpoints_are_for_those_that_go_on(self) -> None:
        executions = {row["execution_id"]: row for row in self.rows("executions")}
        for row in self.rows("calls"):
            execution = executions[row["execution_id"]]
            assert execution["outside"]
            if row["call"] != "cancel":
                assert self._place(execution) in {Place.RUNNING, Place.TIMED_OUT_OPEN}
        for row in self.rows("checkpoints"):
            assert executions[row["execution_id"]]["status"] not in SETTLED

    # --- looking -----------------------------------------------------------------------------------------

    def rows(self, table: str) -> list[Any]:
        return self.looking.execute(f"SELECT * FROM {table}").fetchall()

    def row(self, name: str) -> Any:
        query = "SELECT * FROM executions WHERE execution_id = ?"
        return self.looking.execute(query, (name,)).fetchone()

    @staticmethod
    def _place(row: Any) -> Place:
        if row["status"] == "TIMED_OUT":
            return Place.TIMED_OUT_CLOSED if row["fenced"] else Place.TIMED_OUT_OPEN
        return Place(row["status"])


TestLives = Lives.TestCase
TestLives.settings = settings(max_examples=25, stateful_step_count=40, deadline=None)
