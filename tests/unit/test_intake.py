"""What intake makes of a delivery: an execution by the request's and the action's terms, or a dead letter."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import pytest

from jef_daemon.intake import UNROUTABLE, Intake
from jef_daemon.lifecycle import Execution
from jef_daemon.ports import Accepted, Arrival, Delivery, Refusal
from jef_daemon.retry import RetryPolicy
from jef_daemon.run.catalogue import Action, ActionSpec

ACTIONS = {
    "a": Action(
        ActionSpec("a", "x:Y"),
        execution_timeout_s=60.0,
        update_timeout_s=5.0,
        queue_timeout_s=7.0,
        lock_timeout_s=8.0,
        timeout_grace_s=9.0,
        retry=RetryPolicy(attempts=3),
    ),
    "old": Action(ActionSpec("old", "x:Y"), scope="OBSOLETE"),
    "gone": Action(ActionSpec("gone", "x:Y"), is_retired=True),
}


class World:
    """A ledger that says of each message what a test wants, and a bus."""

    def __init__(self, *words: Accepted) -> None:
        self.words = list(words)
        self.messages: list[Arrival | Refusal] = []
        self.steps: list[str] = []
        self.arrived: dict[str, int] = {}
        self.intake = Intake(
            self, self, ACTIONS, 1000, lambda: self.steps.append("recorded"), self.arrived.__setitem__
        )

    def accepting(self, messages: list[Arrival | Refusal]) -> asyncio.Future[list[Accepted]]:
        self.messages = messages
        self.steps.append("accepting")
        future: asyncio.Future[list[Accepted]] = asyncio.get_running_loop().create_future()
        future.set_result(self.words or [Accepted.NEW] * len(messages))
        return future

    async def acknowledge(self, deliveries: Sequence[Delivery]) -> None:
        self.steps.append(f"acknowledged {len(deliveries)}")

    async def take(self, *deliveries: Delivery) -> None:
        for delivery in deliveries:
            self.intake.deliver(delivery)
        task = asyncio.create_task(self.intake.run())
        await self.intake.finish()
        task.cancel()


def request(
    source: str = "a", key: str = "", headers: dict[str, Any] | None = None, **fields: Any
) -> Delivery:
    body = json.dumps({"executionId": "1", **fields}).encode()
    return Delivery(source, body, 1, 1, routing_key=key or source, headers=headers or {})


async def execution(*delivered: Delivery) -> Execution:
    world = World()
    await world.take(*delivered)
    [arrival] = world.messages
    assert isinstance(arrival, Arrival)
    return arrival.execution


async def test_what_a_request_does_not_say_says_its_action() -> None:
    """And where it says something, that counts; it may want fewer attempts, not more."""
    plain = await execution(request())
    assert (plain.execution_timeout_s, plain.update_timeout_s, plain.timeout_grace_s) == (60.0, 5.0, 9.0)
    assert (plain.queue_timeout_s, plain.lock_timeout_s, plain.max_attempts) == (7.0, 8.0, 3)
    timeouts = {"queue": 1, "lock": 2, "update": 3, "execution": 4}
    own = await execution(request(timeouts=timeouts, retry={"attempts": 2}))
    assert (own.queue_timeout_s, own.lock_timeout_s) == (1, 2)
    assert (own.update_timeout_s, own.execution_timeout_s, own.max_attempts) == (3, 4, 2)
    assert (await execution(request(retry={"attempts": 9}))).max_attempts == 3


@pytest.mark.parametrize(
    ("value", "attempt", "sequence"),
    [(2, 2, 2), (2**31, 2**31, 2**31), (1, 1, 1)]
    + [(value, 1, 0) for value in (0, -1, 2**31 + 1, 2**63, "3", 2.0, None, True, b"3")],
)
async def test_only_a_number_that_counts_is_counted_on_from(value: Any, attempt: int, sequence: int) -> None:
    """Anybody can write headers; what is told is a number, and there is room for the next."""
    found = await execution(request(headers={"x-jef-attempt": value, "x-jef-sequence": value}))
    assert (repr(found.attempt), repr(found.sequence)) == (str(attempt), str(sequence))


@pytest.mark.parametrize(
    ("header", "kept"),
    [("00-x", "00-x"), (b"00-x", "00-x"), ("x" * 512, "x" * 512), ("x" * 513, None), (7, None), (None, None)],
)
async def test_a_traceparent_that_fits_is_kept(header: Any, kept: str | None) -> None:
    assert (await execution(request(headers={"traceparent": header}))).traceparent == kept


@pytest.mark.parametrize(
    ("delivery", "code"),
    [
        (request("nobody's"), "unroutable"),
        (request(UNROUTABLE, key="nobody's"), "unroutable"),
        (request(UNROUTABLE, key="gone"), "unroutable"),
        (request("old"), "action-obsolete"),
        (Delivery("a", b"{", 1, 1, routing_key="a"), "not-json"),
    ],
)
async def test_what_can_be_no_job_is_refused_and_acknowledged(delivery: Delivery, code: str) -> None:
    """It is a dead letter in the same transaction, named by where it was sent to."""
    world = World(Accepted.REFUSED)
    await world.take(delivery)
    [refusal] = world.messages
    assert isinstance(refusal, Refusal)
    assert (refusal.error.code, refusal.action) == (code, delivery.routing_key)
    assert world.steps == ["accepting", "recorded", "acknowledged 1"]
    assert world.arrived == {}


@pytest.mark.parametrize("delivery", [request(UNROUTABLE, key="a"), request("gone")])
async def test_what_is_served_by_now_is_taken(delivery: Delivery) -> None:
    """What could not be routed before; and what was under way to an action that a reload took out."""
    assert (await execution(delivery)).action == delivery.routing_key


async def test_only_what_is_ready_and_new_here_counts_as_backlog() -> None:
    """It fills the backlog; what waits for a time or a lock would keep ready jobs out."""
    lock = {"resource": "asset/1", "mode": "SHARED"}
    words = [Accepted.NEW, Accepted.TAKEN_AGAIN, Accepted.KNOWN, Accepted.FINISHED, Accepted.CANCELLED]
    world = World(*words, Accepted.NEW, Accepted.NEW)
    later = [request(notBefore="2100-01-01T00:00:00Z"), request(locks=[lock])]
    await world.take(*[request()] * len(words), *later)
    assert world.arrived == {"a": 2}
    assert world.steps[-1] == "acknowledged 7"
