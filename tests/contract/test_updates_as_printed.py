"""The conversations of docs/wire-protocol.md on updates and commands: what is printed is what is answered."""

from __future__ import annotations

import asyncio
import json
import re
import sqlite3
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from jef_daemon.elsewhere import GONE, HANDED_ON, KIND, UPDATE
from jef_daemon.events import Launched
from jef_daemon.ledger import Reader, SqlLedger
from jef_daemon.ledger.terms import Policy
from jef_daemon.lifecycle import Execution
from jef_daemon.names import Names
from jef_daemon.ports import Arrival, Capacity, Consequences, Delivery, MessageReturned, Outgoing
from jef_daemon.updates import Updates

PAGE = (Path(__file__).resolve().parents[2] / "docs/wire-protocol.md").read_text(encoding="utf-8")
TALK = re.findall(
    r"^<!-- example: (Update|UpdateReply|Control|ControlReply) -->\n```json\n(.*?)^```",
    PAGE,
    re.MULTILINE | re.DOTALL,
)
TOKENS = dict(re.findall(r'"executionId": "(\d+)", "token": "\w+\.(\S+?)"', PAGE))
IDENTITY = re.findall(r'"token": "(\w+)\.', PAGE)[0]


class Bus:
    """Keeps what is published and what is acknowledged."""

    def __init__(self) -> None:
        self.published: list[Outgoing] = []
        self.acknowledged: list[Delivery] = []
        self.refusals = 0
        """So many publishes are refused first."""
        self.queues = {f"jef.daemon.{IDENTITY}", "jef.daemon.other"}

    async def publish(self, messages: Sequence[Outgoing]) -> asyncio.Future[None]:
        confirmed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if self.refusals:
            self.refusals -= 1
            assert self.acknowledged == []
            confirmed.set_exception(ConnectionError("the broker refused a message"))
            return confirmed
        if any(message.is_mandatory and message.routing_key not in self.queues for message in messages):
            confirmed.set_exception(MessageReturned("there is no queue for a message"))
            return confirmed
        self.published += messages
        confirmed.set_result(None)
        return confirmed

    async def acknowledge(self, deliveries: Sequence[Delivery]) -> None:
        self.acknowledged += deliveries


class Desk:
    """A daemon's updates and commands on a ledger of their own."""

    def __init__(self, ledger: SqlLedger, identity: str) -> None:
        self.ledger = ledger
        self.bus = Bus()
        self.consequences: list[Consequences] = []
        self.updates = Updates(ledger, self.bus, Names(), identity, 10_000, self.consequences.append)
        self._seen = 0

    async def ask(self, kind: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        """Deliver a message; returns the answers to it."""
        source = "updates" if kind == "Update" else "control"
        text = json.dumps(body).encode()
        return await self.take(Delivery(f":{source}", text, 1, 1, False, f"jef.{source}", {}, "me", "c"))

    async def take(self, delivery: Delivery) -> list[dict[str, Any]]:
        before = len(self.bus.published)
        inbox = {":updates": self.updates.updates, ":control": self.updates.commands}
        inbox.get(delivery.source, self.updates.handed_on).deliver(delivery)
        running = asyncio.create_task(self.updates.run())
        async with asyncio.timeout(10):
            await self.updates.finish()
        running.cancel()
        assert self.bus.acknowledged[-1] is delivery
        posted = [*await self.ledger.outbox(self._seen, 1000)]
        self._seen = max([self._seen, *(message.id for message in posted)])
        answers = [each for each in [*posted, *self.bus.published[before:]] if each.routing_key == "me"]
        assert {answer.correlation_id for answer in answers} <= {"c"}
        return [json.loads(answer.body) for answer in answers]


@pytest.fixture
async def desks(tmp_path: Path) -> AsyncIterator[tuple[Desk, Desk]]:
    """Two daemons; the first one has the page's jobs."""
    names = [f"sqlite:///{tmp_path / name}.db" for name in "ab"]
    async with SqlLedger(names[0], Names()) as first, SqlLedger(names[1], Names()) as second:
        first.govern({"transcode": Policy(hooks=frozenset({"cancel"})), "burn": Policy(cancellable=False)})
        outside = [Execution(name, "transcode", token=token) for name, token in TOKENS.items()]
        running = [*outside, Execution("627", "burn", token="t")]
        await first.accept(
            [Arrival(each, json.dumps({"executionId": each.execution_id})) for each in running]
        )
        await first.claim(Capacity(10, {"transcode": 10, "burn": 10}))
        for each in outside:
            await first.apply(each.execution_id, 1, [Launched()])
        waiting = [Execution(name, "transcode", workflow_id="w-9", token="t") for name in ("w1", "w2")]
        await first.accept([Arrival(each, "{}") for each in waiting])
        yield Desk(first, IDENTITY), Desk(second, "other")


async def test_the_examples_are_what_is_answered(desks: tuple[Desk, Desk]) -> None:
    """The page's requests, in its order: the answers are the page's, and there is none more."""
    desk, answers = desks[0], list[Any]()
    assert sorted(TOKENS) == ["624", "625", "626"]
    assert len(TALK) > 30
    for kind, text in TALK:
        example = json.loads(text)
        if not kind.endswith("Reply"):
            assert answers == []
            answers = await desk.ask(kind, example)
            continue
        if not answers:
            assert '`"command": "stop"`' in PAGE
            answers = await desk.ask("Control", {"command": "stop", "executionId": "624"})
        assert answers.pop(0) == example
    assert answers == []
    assert [call.name for call in await desk.ledger.due_calls(10)] == ["cancel"]
    assert [stop.execution.execution_id for each in desk.consequences for stop in each.stops] == [
        "626",
        "627",
    ]


@pytest.mark.parametrize(
    ("update", "reason"),
    [
        ({"executionId": "999", "token": "x"}, "no execution … is known"),
        ({"executionId": "624", "token": f"{IDENTITY}.x"}, "the token is not this attempt's"),
        ({"executionId": "624", "token": f"{IDENTITY}.{TOKENS['624']}"}, "it is … already"),
        ({"executionId": "625", "token": f"{IDENTITY}.{TOKENS['625']}"}, "the attempt is fenced …"),
        (
            {
                "executionId": "626",
                "token": f"{IDENTITY}.{TOKENS['626']}",
                "jobContextVariables": {"x": "y" * 300_000},
            },
            "the variables take … bytes …",
        ),
    ],
)
async def test_the_reasons_of_refusals(
    desks: tuple[Desk, Desk], update: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    """Each of the page's table, and the history has it."""
    desk = desks[0]
    desk.updates.max_body_bytes = 10**6
    own = {name: f"{IDENTITY}.{token}" for name, token in TOKENS.items()}
    await desk.ask("Update", {"executionId": "624", "token": own["624"], "status": "COMPLETED"})
    await desk.ask("Update", {"executionId": "625", "token": own["625"], "status": "CANCELLED"})
    [answer] = await desk.ask("Update", {"status": "COMPLETED", **update})
    assert f"| {reason} |" in PAGE
    assert answer["accepted"] is False
    assert re.fullmatch(re.escape(reason.replace(" …", "…")).replace("…", ".*"), answer["reason"])
    if update["executionId"] != "999":
        last = Reader(f"sqlite:///{tmp_path / 'a.db'}").history(update["executionId"])[-1]
        assert last.event == "Completed refused"


async def test_what_another_daemon_has(desks: tuple[Desk, Desk]) -> None:
    """A command is answered by both, an update by its own; nothing goes round in circles."""
    here, other = desks
    done = {"executionId": "624", "token": f"{IDENTITY}.{TOKENS['624']}", "status": "FAILED"}
    assert await other.ask("Update", done) == []
    sent = other.bus.published[0]
    assert (sent.exchange, sent.routing_key) == ("", f"jef.daemon.{IDENTITY}")
    assert sent.headers == {"x-jef-kind": "update", "x-jef-from": "other"}
    assert await here.take(received(sent)) == [{"accepted": True, "cancelRequested": False}]
    retry = {"command": "retry", "executionId": "624"}
    assert await other.ask("Control", retry) == [
        {"accepted": False, "status": None, "reason": "no execution 624 is known"}
    ]
    sent = other.bus.published[-1]
    assert (sent.exchange, sent.headers and sent.headers["x-jef-kind"]) == ("jef.daemons", "control")
    assert await other.take(received(sent)) == []
    assert await here.take(received(sent)) == [{"accepted": True, "status": "QUEUED", "reason": None}]
    assert here.bus.published == []


async def test_an_update_for_a_ledger_that_is_gone(desks: tuple[Desk, Desk]) -> None:
    """Its sender learns that nobody has the job any more; until there is a daemon with that ledger again."""
    here, other = desks
    gone = {"executionId": "624", "token": f"{'0' * 12}.{TOKENS['624']}", "status": "COMPLETED"}
    [answer] = await here.ask("Update", gone)
    assert answer == {"accepted": False, "reason": GONE}
    assert f"| {GONE} |" in PAGE
    assert here.updates.unread == {"unknown-ledger": 1}
    assert [sent.routing_key for sent in here.bus.published] == ["me"]
    here.bus.queues.add(f"jef.daemon.{'0' * 12}")
    assert await here.ask("Update", gone) == []
    assert here.bus.published[-1].routing_key == f"jef.daemon.{'0' * 12}"
    assert other.bus.published == []


@pytest.mark.parametrize("kind", ["Update", "Control"])
async def test_what_the_broker_refuses_is_handed_on_again(desks: tuple[Desk, Desk], kind: str) -> None:
    """Until it has it, and only then is what it came by acknowledged: nothing is lost between two daemons."""
    _, other = desks
    other.bus.refusals = 2
    done = {"executionId": "624", "token": f"{IDENTITY}.{TOKENS['624']}", "status": "FAILED"}
    await other.ask(kind, done if kind == "Update" else {"command": "retry", "executionId": "624"})
    [sent] = [sent for sent in other.bus.published if sent.headers]
    assert sent.headers == {"x-jef-kind": kind.lower(), "x-jef-from": "other"}


async def test_a_workflows_commands_with_several_daemons(desks: tuple[Desk, Desk]) -> None:
    """Both carry it out, the one that received it answers."""
    here, other = desks
    [answer] = await other.ask("Control", {"command": "cancel", "workflowId": "w-9"})
    assert answer["reason"].startswith("0 cancelled")
    assert await here.take(received(other.bus.published[-1])) == []
    assert await here.ask("Control", {"command": "cancel", "executionId": "w1"}) == [
        {"accepted": False, "status": "CANCELLED", "reason": "it is CANCELLED already"}
    ]


def received(sent: Outgoing) -> Delivery:
    """What a daemon handed on, as it arrives."""
    headers = dict(sent.headers or {})
    return Delivery(HANDED_ON, sent.body, 1, 1, False, "", headers, sent.reply_to, sent.correlation_id)


@pytest.mark.parametrize(
    ("source", "body"),
    [
        (":updates", {"executionId": "N", "status": "RUNNING", "token": IDENTITY}),
        (":control", {"executionId": "N", "command": "resume"}),
        (HANDED_ON, {"executionId": "N", "status": "RUNNING", "token": IDENTITY}),
    ],
)
async def test_nobody_is_told_twice_where_one_of_a_batch_fails(
    desks: tuple[Desk, Desk], tmp_path: Path, source: str, body: dict[str, str]
) -> None:
    """The others come again, one by one: also what was refused before the fault was met."""
    desk = desks[0]
    with sqlite3.connect(tmp_path / "a.db", timeout=10) as ledger:
        ledger.execute("UPDATE executions SET status = 'NONSENSE' WHERE execution_id = '625'")
    ledger.close()
    updates = desk.updates
    inbox = {":updates": updates.updates, ":control": updates.commands}.get(source, updates.handed_on)
    texts = ["{", json.dumps(body).replace("N", "625", 1), json.dumps(body).replace("N", "624", 1)]
    for tag, text in enumerate(texts, 1):
        headers = {KIND: UPDATE} if source == HANDED_ON else {}
        inbox.deliver(Delivery(source, text.encode(), tag, 1, False, source, headers, "me", str(tag)))
    running = asyncio.create_task(updates.run())
    async with asyncio.timeout(10):
        await updates.finish()
    running.cancel()
    posted = await desk.ledger.outbox(0, 1000)
    answers = [each for each in [*posted, *desk.bus.published] if each.routing_key == "me"]
    assert sorted(answer.correlation_id or "" for answer in answers) == ["1", "2", "3"]
    letters = [each for each in posted if each.exchange == "jef.dead"]
    assert [letter.correlation_id for letter in letters] == ["1", "2"]
    assert letters[1].routing_key == {HANDED_ON: "jef.updates"}.get(source, source), "it can be replayed"
    assert [delivery.tag for delivery in desk.bus.acknowledged] == [1, 2, 3]
