"""Updates and commands between daemons, without broker and ledger: who takes what, who is told, what is counted."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import pytest

from jef_daemon.elsewhere import CONTROL, FROM, HANDED_ON, KIND, UPDATE
from jef_daemon.messages import Control, Update
from jef_daemon.names import Names
from jef_daemon.ports import Accepted, Arrival, Command, Consequences, Delivery, Outgoing, Refusal, Reported
from jef_daemon.updates import Updates

OURS, THEIRS = "0" * 12, "1" * 12
T = TypeVar("T")


def done(result: T) -> asyncio.Future[T]:
    future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
    future.set_result(result)
    return future


class World:
    """A ledger that knows the executions that a test names, and a bus."""

    def __init__(self, *known: str) -> None:
        self.known = set(known)
        self.steps: list[str] = []
        """What was done, in order."""
        self.commands: list[list[Command]] = []
        self.reported: list[Reported] = []
        self.refusals: list[Any] = []
        self.published: list[Outgoing] = []
        self.followed: list[Consequences] = []
        self.follows: list[Consequences] = []
        """What comes of the next commands; nothing, where there is none left."""
        self.accepts: Callable[[Update], bool] = lambda update: True
        self.updates = Updates(self, self, Names("t"), OURS, 1000, self.followed.append)

    def updating(
        self, reported: Sequence[Reported]
    ) -> asyncio.Future[tuple[list[dict[str, object]], Consequences]]:
        self.reported += reported
        self.steps.append("apply")
        return done(([{"accepted": self.accepts(each.update)} for each in reported], Consequences()))

    def commanding(self, commands: Sequence[Command]) -> asyncio.Future[Consequences]:
        self.commands.append(list(commands))
        self.steps.append("command")
        return done(self.follows.pop(0) if self.follows else Consequences())

    def accepting(self, messages: Sequence[Arrival | Refusal]) -> asyncio.Future[list[Accepted]]:
        self.refusals += messages
        return done([Accepted.REFUSED])

    async def knows(self, ids: Sequence[str]) -> set[str]:
        assert None not in ids
        return self.known & set(ids)

    async def acknowledge(self, deliveries: Sequence[Delivery]) -> None:
        self.steps.append(f"acknowledge {len(deliveries)}")

    async def publish(self, messages: Sequence[Outgoing]) -> asyncio.Future[None]:
        self.published += messages
        self.steps.append("publish")
        return done(None)

    async def has_queue(self, name: str) -> bool:
        return True

    async def take(self, *deliveries: Delivery) -> None:
        """As the bus delivers: what daemons send one another by a queue of its own."""
        for delivery in deliveries:
            boxes = {"updates": self.updates.updates, "control": self.updates.commands}
            boxes.get(delivery.source, self.updates.handed_on).deliver(delivery)
        running = asyncio.create_task(self.updates.run())
        await self.updates.finish()
        running.cancel()


def command(name: str | None = "1", source: str = "control", **more: Any) -> Delivery:
    body = {"command": "cancel", "executionId": name, "by": "ann", **more}
    headers = {KIND: CONTROL, FROM: THEIRS} if source == HANDED_ON else {}
    return Delivery(
        source, json.dumps(body).encode(), 1, 1, headers=headers, reply_to="asker", correlation_id="c"
    )


def update(ledger: str = OURS, source: str = "updates") -> Delivery:
    body = {"executionId": "1", "status": "RUNNING", "token": f"{ledger}.secret"}
    headers = {KIND: UPDATE, FROM: THEIRS} if source == HANDED_ON else {}
    return Delivery(
        source, json.dumps(body).encode(), 1, 1, headers=headers, reply_to="asker", correlation_id="c"
    )


@pytest.mark.parametrize(
    ("known", "delivery", "is_handed_on", "answers_to"),
    [
        (["1"], command(), False, "asker"),
        ([], command(), True, "asker"),
        (["1"], command(source=HANDED_ON), False, "asker"),
        ([], command(source=HANDED_ON), False, None),
        (["1"], command(None, workflowId="w"), True, "asker"),
        (["1"], command(None, source=HANDED_ON, workflowId="w"), False, None),
    ],
)
async def test_a_command_is_told_to_the_others_where_they_may_know_more(
    known: list[str], delivery: Delivery, is_handed_on: bool, answers_to: str | None
) -> None:
    """Once: what came from another daemon goes no further, and who does not know what it is about is silent."""
    world = World(*known)
    await world.take(delivery)
    [[asked]] = world.commands
    assert (asked.actor, asked.reply_to, asked.correlation_id) == ("operator:ann", answers_to, "c")
    assert world.steps == [*["publish"] * is_handed_on, "command", "acknowledge 1"]
    for message in world.published:
        assert (message.exchange, message.body) == ("t.daemons", delivery.body)
        assert message.headers == {KIND: CONTROL, FROM: OURS}
        assert (message.reply_to, message.correlation_id) == ("asker", "c")


async def test_what_is_known_here_is_not_told_though_another_of_the_batch_is() -> None:
    world = World("1")
    await world.take(command("1"), command("2"))
    assert [json.loads(each.body)["executionId"] for each in world.published] == ["2"]
    assert [each.control.execution_id for each in world.commands[0]] == ["1", "2"]


@pytest.mark.parametrize("by_http", [False, True])
async def test_what_was_handed_back_between_two_looks_is_told_to_whoever_takes_it(by_http: bool) -> None:
    """Known at first, and remembered then: the job is on its way to another daemon."""
    world = World("1", "2")
    world.follows = [Consequences(unknown={"1"})]
    if by_http:
        await world.updates.command(Control.model_validate_json(command("1").body), "operator:ann")
    else:
        await world.take(command("1"), command("2"))
    assert [json.loads(each.body)["executionId"] for each in world.published] == ["1"]
    assert world.steps[:2] == ["command", "publish"]


@pytest.mark.parametrize(("name", "is_told"), [("1", False), ("2", True), (None, True)])
async def test_a_command_by_http_is_told_as_one_by_the_queue(name: str | None, is_told: bool) -> None:
    world = World("1")
    control = Control.model_validate_json(command(name, workflowId=None if name else "w").body)
    await world.updates.command(control, "operator:ann")
    assert bool(world.published) is is_told
    assert [each.actor for each in world.commands[0]] == ["operator:ann"]


async def test_a_workflow_is_gone_through_to_its_end() -> None:
    """A page at a time; what follows from each happens here, and the first says what came of it."""
    world = World()
    more = Command(Control.model_validate_json(command().body))
    first, second, last = Consequences(more=[more]), Consequences(more=[more]), Consequences()
    world.follows = [first, second, last]
    await world.take(command(None, workflowId="w"))
    assert world.followed == [first, second, last]
    assert world.commands[1:] == [[more], [more]]
    assert world.steps[-1] == "acknowledge 1"


async def test_what_we_told_all_daemons_ourselves_is_not_taken_again() -> None:
    world = World()
    own = dataclasses.replace(command(source=HANDED_ON), headers={KIND: CONTROL, FROM: OURS})
    await world.take(own)
    assert (world.steps, world.commands) == (["acknowledge 1"], [])


async def test_an_update_goes_to_the_daemon_whose_token_it_has() -> None:
    """With whoever waits for the answer. From another daemon it is taken, whatever its token says."""
    world = World()
    await world.take(update(THEIRS), update(THEIRS, HANDED_ON), update(OURS))
    [sent] = world.published
    assert (sent.exchange, sent.routing_key, sent.reply_to) == ("", f"t.daemon.{THEIRS}", "asker")
    assert sent.headers == {KIND: UPDATE, FROM: OURS}
    assert sorted(each.update.token for each in world.reported) == [f"{THEIRS}.secret", "secret"]
    assert {(each.reply_to, each.correlation_id) for each in world.reported} == {("asker", "c")}


async def test_updates_are_counted_by_what_became_of_them() -> None:
    """Those that cannot be read as well; what is wrong with a command is none."""
    world = World()
    world.accepts = lambda update: update.token == "secret"
    await world.take(update(), update(), update("another"))
    assert (world.updates.taken, world.updates.refused) == (2, 1)
    assert len(world.followed) == 1
    broken = Delivery("updates", b"{", 1, 1)
    handed_on = Delivery(HANDED_ON, b"{", 1, 1, headers={KIND: UPDATE, FROM: THEIRS})
    await world.take(broken, handed_on, Delivery("control", b"{", 1, 1))
    assert [each.action for each in world.refusals].count("updates") == 2
    assert world.updates.unread == {"malformed": 2}


async def test_an_update_by_http_is_answered_to_whoever_brought_it() -> None:
    """Or handed on, where its token is another daemon's."""
    world = World()
    ours, theirs = (Update.model_validate_json(update(ledger).body) for ledger in (OURS, THEIRS))
    assert await world.updates.pass_on(ours) is None
    assert await world.updates.report(ours) == {"accepted": True}
    assert [each.update.token for each in world.reported] == ["secret"]
    assert await world.updates.pass_on(theirs) is True
    assert [each.routing_key for each in world.published] == [f"t.daemon.{THEIRS}"]
