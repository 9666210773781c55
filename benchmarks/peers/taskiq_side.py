"""taskiq: acknowledged when the task was executed."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import aio_pika
import job
from taskiq import TaskiqEvents, TaskiqState
from taskiq_aio_pika import AioPikaBroker, Queue

broker = AioPikaBroker(job.URL, qos=200, task_queues=[Queue(name=job.QUEUE)])
_told: dict[str, Any] = {}


@broker.on_event(TaskiqEvents.WORKER_STARTUP)
async def _connect(_: TaskiqState) -> None:
    connection = await aio_pika.connect_robust(job.URL)
    channel = await connection.channel()
    _told["status"] = await channel.declare_exchange(job.STATUS, "topic", durable=True)
    _told["connection"] = connection


@broker.task(task_name="nothing")
async def nothing(number: int, seconds: float) -> None:
    """The job."""
    job.begins(number)
    if seconds:
        await asyncio.sleep(seconds)
    if job.IS_TOLD:
        for word in job.WORDS:
            body = job.notification(number, word)
            message = aio_pika.Message(body, content_type="application/json", delivery_mode=2)
            await _told["status"].publish(message, job.routing_key(word))
    job.ends(number)


async def _fill(count: int, seconds: float) -> None:
    await broker.startup()
    for start in range(0, count, 200):
        await asyncio.gather(*(nothing.kiq(each, seconds) for each in range(start, min(count, start + 200))))
    await broker.shutdown()


if __name__ == "__main__":
    asyncio.run(_fill(int(sys.argv[1]), float(sys.argv[2])))
