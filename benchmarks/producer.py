"""Publishes requests as fast as the broker takes them. Usage: `producer.py AMQP_URL PREFIX FIRST COUNT [LOCK]`.

LOCK is a resource that each wants EXCLUSIVE; `{}` in it becomes the request's number.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any, cast

import aio_pika
import aiormq

from jef_daemon.ports import Outgoing
from jef_daemon.rabbitmq.publisher import Publisher
from jef_daemon.rabbitmq.tap import TappedConnection

_AT_ONCE = 500


async def main(url: str, prefix: str, first: int, count: int, lock: str = "") -> None:
    """Publish, wait for the confirms."""
    connection = cast("TappedConnection", await aio_pika.connect(url, connection_class=TappedConnection))
    channel = await connection.channel(publisher_confirms=True)
    underlay = cast("aiormq.Channel", await channel.get_underlay_channel())
    publisher = Publisher(connection.tap, underlay, 5000)
    confirms = []
    for start in range(first, first + count, _AT_ONCE):
        numbers = range(start, min(start + _AT_ONCE, first + count))
        messages = [Outgoing(number, f"{prefix}.jobs", "nothing", _body(number, lock)) for number in numbers]
        confirms.append(await publisher.publish(messages))
    await asyncio.gather(*confirms)
    await connection.close()


def _body(number: int, lock: str) -> bytes:
    request: dict[str, Any] = {"executionId": f"b{number}", "configuration": {}}
    if lock:
        request["locks"] = [{"resource": lock.format(number), "mode": "EXCLUSIVE"}]
    return json.dumps(request).encode()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), *sys.argv[5:]))
