"""FastStream: acknowledged when the handler has returned."""

from __future__ import annotations

import asyncio
import sys

import job
from faststream import FastStream
from faststream.rabbit import Channel, ExchangeType, RabbitBroker, RabbitExchange, RabbitQueue

broker = RabbitBroker(job.URL, default_channel=Channel(prefetch_count=200))
app = FastStream(broker)
_STATUS = RabbitExchange(job.STATUS, type=ExchangeType.TOPIC, durable=True)


@broker.subscriber(RabbitQueue(job.QUEUE, durable=True))
async def nothing(body: dict[str, float]) -> None:
    """The job."""
    number, seconds = int(body["number"]), body["seconds"]
    job.begins(number)
    if seconds:
        await asyncio.sleep(seconds)
    if job.IS_TOLD:
        for word in job.WORDS:
            await broker.publish(
                job.notification(number, word),
                routing_key=job.routing_key(word),
                exchange=_STATUS,
                content_type="application/json",
                persist=True,
            )
    job.ends(number)


async def _fill(count: int, seconds: float) -> None:
    async with broker:
        await broker.declare_queue(RabbitQueue(job.QUEUE, durable=True))
        for start in range(0, count, 200):
            await asyncio.gather(
                *(
                    broker.publish({"number": each, "seconds": seconds}, job.QUEUE, persist=True)
                    for each in range(start, min(count, start + 200))
                )
            )


if __name__ == "__main__":
    asyncio.run(_fill(int(sys.argv[1]), float(sys.argv[2])))
