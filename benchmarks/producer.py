"""Publishes requests as fast as the broker takes them. Usage: `producer.py AMQP_URL PREFIX FIRST COUNT`."""

from __future__ import annotations

import asyncio
import sys
from typing import cast

import aio_pika
import aiormq

from jef_daemon.ports import Outgoing
from jef_daemon.rabbitmq.publisher import Publisher

_AT_ONCE = 500


async def main(url: str, prefix: str, first: int, count: int) -> None:
    """Publish, wait for the confirms."""
    connection = await aio_pika.connect(url)
    channel = await connection.channel(publisher_confirms=True)
    publisher = Publisher(cast("aiormq.Channel", await channel.get_underlay_channel()), 5000)
    confirms = []
    for start in range(first, first + count, _AT_ONCE):
        numbers = range(start, min(start + _AT_ONCE, first + count))
        messages = [
            Outgoing(
                number, f"{prefix}.jobs", "nothing", b'{"executionId": "b%d", "configuration": {}}' % number
            )
            for number in numbers
        ]
        confirms.append(await publisher.publish(messages))
    await asyncio.gather(*confirms)
    await connection.close()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
