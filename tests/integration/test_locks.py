"""Locks on a real broker with a real daemon: its own jobs, and clients that only know the wire protocol."""

from __future__ import annotations

import asyncio

import aio_pika

from tests.support.amqp import Client
from tests.support.process import DaemonProcess


def lock(resource: str, mode: str = "EXCLUSIVE") -> dict[str, str]:
    return {"resource": resource, "mode": mode}


def overlaps(client: Client, one: str, other: str) -> bool:
    """Whether two jobs were RUNNING at the same time, by the times they were told at."""
    spans = []
    for name in (one, other):
        told = client.of(name)
        begin = next(each["timestamp"] for each in told if each["status"] == "RUNNING")
        spans.append((begin, told[-1]["timestamp"]))
    first, second = sorted(spans)
    return bool(second[0] < first[1])


async def test_two_jobs_with_one_lock_run_one_after_the_other(daemon: DaemonProcess, client: Client) -> None:
    """The second waits, is told for what and behind whom, and runs when the first has ended."""
    daemon.start()
    await client.submit("slow", "1", {"seconds": 1.0}, locks=[lock("asset/42")])
    await client.until(lambda: "RUNNING" in client.statuses("1"))
    await client.submit("slow", "2", {"seconds": 0.1}, locks=[lock("asset/42")])
    await client.submit("slow", "3", {"seconds": 0.1}, locks=[lock("asset/43")])
    await client.end_of("2")
    assert (await client.end_of("3"))["status"] == "COMPLETED"
    assert client.statuses("2")[:3] == ["QUEUED", "WAITING_FOR_LOCK", "RUNNING"]
    waiting = client.of("2")[1]
    assert waiting["waitingFor"] == {
        "resource": "asset/42",
        "mode": "EXCLUSIVE",
        "position": 1,
        "holders": ["1"],
    }
    assert not overlaps(client, "1", "2")
    assert "WAITING_FOR_LOCK" not in client.statuses("3")


async def test_answers_to_others_leave_the_outbox(daemon: DaemonProcess, client: Client) -> None:
    """A transaction that tells nobody but a foreign client is confirmed as any other, and not told again."""
    daemon.start()
    answers = await client.channel.declare_queue(exclusive=True)
    request = aio_pika.Message(b'{"operation": "inspect"}', reply_to=answers.name, correlation_id="1")
    await client.channel.default_exchange.publish(request, f"{client.prefix}.locks")
    async with asyncio.timeout(20):
        while (answer := await answers.get(fail=False)) is None:
            await asyncio.sleep(0.05)
    assert answer.correlation_id == "1"
    assert await asyncio.to_thread(daemon.stop) == 0
    assert not {"not_all_told", "replies_lost"} & {event["event"] for event in daemon.events()}
