"""The bare side of `locks.py`: answers every request with its own body, keeps nothing.

Usage: `echo.py AMQP_URL QUEUE`.
"""

from __future__ import annotations

import asyncio
import sys

import aio_pika
import uvloop
from aio_pika.abc import AbstractIncomingMessage


async def main(url: str, name: str) -> None:
    """Answer until killed."""
    connection = await aio_pika.connect(url)
    channel = await connection.channel(publisher_confirms=False)
    await channel.set_qos(prefetch_count=500)
    queue = await channel.declare_queue(name, durable=True, arguments={"x-queue-type": "quorum"})

    async def answer(message: AbstractIncomingMessage) -> None:
        reply = aio_pika.Message(
            message.body,
            content_type="application/json",
            delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
            correlation_id=message.correlation_id,
        )
        await channel.default_exchange.publish(reply, message.reply_to or "")
        await message.ack()

    await queue.consume(answer)
    print("ready", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], sys.argv[2]))
