"""What a daemon does on the broker, tried: for `jef check`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import aio_pika
from aio_pika.abc import AbstractChannel
from aiormq import exceptions

from jef_daemon.config import masked
from jef_daemon.errors import BrokerError
from jef_daemon.names import Names
from jef_daemon.rabbitmq.client import connected
from jef_daemon.rabbitmq.refusals import meaning, reason
from jef_daemon.rabbitmq.topology import Topology, trial

_TIMEOUT_S = 5.0


async def check(url: str, names: Names, actions: Sequence[str], queue_type: str) -> list[tuple[str, str]]:
    """Try what a daemon does on the broker.

    Returns:
        (what, what is wrong with it; empty: ok), in order.
    """
    found: list[tuple[str, str]] = []
    try:
        async with connected(url) as channel:
            found.append((f"broker {masked(url)}", ""))
            for what, step in _steps(channel, Topology.of(names, actions, queue_type), names):
                try:
                    await step()
                except exceptions.AMQPError as error:
                    said = meaning(error, masked(url))
                    found.append((what, str(said or reason(error))))
                    break
                found.append((what, ""))
    except BrokerError as error:
        found.append((f"broker {masked(url)}", str(error)))
    return found


def _steps(channel: AbstractChannel, topology: Topology, names: Names) -> list[tuple[str, Any]]:
    async def exchanges() -> None:
        for exchange in topology.exchanges:
            arguments = dict(exchange.arguments) or None
            await channel.declare_exchange(exchange.name, exchange.type, durable=True, arguments=arguments)

    async def queues() -> None:
        for queue in topology.queues:
            declared = await channel.declare_queue(queue.name, durable=True, arguments=dict(queue.arguments))
            if queue.exchange is not None:
                await declared.bind(queue.exchange, queue.routing_key)

    async def publish() -> None:
        # An exchange of our own that nobody listens to: readers of statuses are not to see a trial.
        exchange = await channel.declare_exchange(trial(names), "fanout", durable=False)
        await exchange.publish(aio_pika.Message(b"{}"), "check", mandatory=False, timeout=_TIMEOUT_S)
        await exchange.delete()

    async def consume() -> None:
        queue = await channel.get_queue(names.unroutable, ensure=False)
        await channel.set_qos(prefetch_count=1)
        tag = await queue.consume(lambda message: message.nack())
        await queue.cancel(tag)

    return [
        ("permission to declare exchanges", exchanges),
        ("permission to declare and bind queues", queues),
        ("permission to publish", publish),
        ("permission to consume", consume),
    ]
