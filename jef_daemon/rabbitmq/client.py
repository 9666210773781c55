"""What people do on the broker: submit a job, start a workflow, watch statuses, command. For the command line.

Every function opens a connection of its own and closes it. A broker that is not there is a `BrokerError` of
one sentence within seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import aio_pika
from aio_pika.abc import AbstractChannel, AbstractIncomingMessage, AbstractQueue
from aiormq import exceptions

from jef_daemon.config import masked
from jef_daemon.errors import BrokerError
from jef_daemon.names import Names
from jef_daemon.rabbitmq.refusals import meaning, reason
from jef_daemon.rabbitmq.session import open_connection

_TIMEOUT_S = 5.0


@contextlib.asynccontextmanager
async def connected(url: str, **options: Any) -> AsyncIterator[AbstractChannel]:
    """A channel with confirms.

    Args:
        url: the broker's.
        options: of the connection.

    Raises:
        BrokerError: the broker is not there, or refuses us.
    """
    where = masked(url)
    try:
        async with asyncio.timeout(2 * _TIMEOUT_S):
            connection = await open_connection(url, timeout=_TIMEOUT_S, **options)
            channel = await connection.channel(publisher_confirms=True, on_return_raises=True)
    except Exception as error:  # noqa: BLE001 - the library raises what it likes; all mean: no broker
        raise meaning(error, where) or BrokerError(
            f"no broker answers at {where} ({reason(error)}); start RabbitMQ or set JEF_AMQP_URL"
        ) from None
    try:
        yield channel
    except exceptions.AMQPError as error:
        raise meaning(error, where) or BrokerError(
            f"the broker at {where} refuses: {reason(error)}"
        ) from None
    finally:
        await connection.close()


async def submit(
    url: str, names: Names, action: str, request: Mapping[str, Any], headers: Mapping[str, Any] | None = None
) -> bool:
    """Publish a request, confirmed.

    Returns:
        Whether there is a queue for its action; without one it has become a dead letter.

    Raises:
        BrokerError: no daemon has ever run with this prefix, or the broker refuses.
    """
    async with connected(url) as channel:
        await publish(channel, names, action, json.dumps(request).encode(), headers)
        try:
            await channel.declare_queue(names.job_queue(action), passive=True)
        except exceptions.ChannelNotFoundEntity:
            return False
        return True


async def publish(
    channel: AbstractChannel,
    names: Names,
    action: str,
    body: bytes,
    headers: Mapping[str, Any] | None,
    *,
    reply_to: str | None = None,
    correlation_id: str | None = None,
) -> None:
    """Publish a request, or a message to one of our queues, over a channel that is there.

    Raises:
        BrokerError: nothing takes it.
    """
    message = aio_pika.Message(
        body,
        content_type="application/json",
        delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
        headers=dict(headers or {}),
        reply_to=reply_to,
        correlation_id=correlation_id,
    )
    try:
        # What was sent to a queue goes to that queue again, anything else is a request for a job.
        queues = {names.updates, names.control, names.locks, names.workflows, names.coordinator}
        is_queue = action in queues
        exchange = channel.default_exchange if is_queue else await channel.get_exchange(names.jobs)
        await exchange.publish(message, action, mandatory=True, timeout=_TIMEOUT_S)
    except exceptions.ChannelNotFoundEntity:
        raise BrokerError(
            f"there is no exchange {names.jobs}: no daemon with the prefix {names.prefix!r} has run on this broker; "
            "start one with `jef run`"
        ) from None
    except exceptions.PublishError:
        raise BrokerError(
            f"no queue takes {action!r} and {names.jobs} has no alternate; start a daemon"
        ) from None


class Statuses:
    """Status notifications as they come.

    Args:
        where: the broker, as it may be shown.
        of_workflows: those of workflows.
    """

    def __init__(self, where: str, *, of_workflows: bool = False) -> None:
        self._where = where
        self._shown_by = "workflows go on, `jef workflows list`" if of_workflows else "jobs go on, `jef list`"
        self._seen: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()

    async def take(self, message: AbstractIncomingMessage) -> None:
        """One came."""
        with contextlib.suppress(ValueError):
            self._seen.put_nowait(json.loads(message.body))

    def end(self) -> None:
        """No more will come."""
        self._seen.put_nowait(None)

    async def get(self) -> dict[str, Any]:
        """The next one.

        Raises:
            BrokerError: the connection is lost.
        """
        told = await self._seen.get()
        if told is None:
            raise BrokerError(
                f"the broker at {self._where} has closed the connection; {self._shown_by} shows them"
            )
        return told


async def start_workflow(url: str, names: Names, request: Mapping[str, Any]) -> bool:
    """Publish a request for a workflow, confirmed.

    Returns:
        Whether a coordinator runs; without one the request waits for it.

    Raises:
        BrokerError: no daemon has ever run with this prefix, or the broker refuses.
    """
    message = aio_pika.Message(
        json.dumps(request).encode(),
        content_type="application/json",
        delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
    )
    async with connected(url) as channel:
        try:
            # Its own exchange: that a producer may write to it lets it reach no other queue.
            exchange = await channel.get_exchange(names.workflows)
            await exchange.publish(message, "", mandatory=True, timeout=_TIMEOUT_S)
            return await _consumers(channel, names.workflows) > 0
        except (exceptions.ChannelNotFoundEntity, exceptions.PublishError):
            raise BrokerError(
                f"nothing takes what is published to {names.workflows}: no daemon with the prefix {names.prefix!r} has "
                "run on this broker; start one with `jef run`"
            ) from None


async def is_heard(url: str, queue: str) -> bool:
    """Whether somebody consumes a queue."""
    async with connected(url) as channel:
        return await _consumers(channel, queue) > 0


async def _consumers(channel: AbstractChannel, queue: str) -> int:
    try:
        found = await channel.declare_queue(queue, passive=True)
    except exceptions.ChannelNotFoundEntity:
        return 0
    return int(found.declaration_result.consumer_count or 0)


@contextlib.asynccontextmanager
async def statuses(
    url: str, names: Names, *patterns: str, of_workflows: bool = False
) -> AsyncIterator[Statuses]:
    """Status notifications from now on.

    Args:
        url: the broker's.
        names: of exchanges.
        patterns: routing keys, `<action>.<status>`; `*` and `#` as in AMQP.
        of_workflows: those of workflows, `<workflow>.<status>`.
    """
    seen = Statuses(masked(url), of_workflows=of_workflows)
    source = names.workflow_status if of_workflows else names.status
    async with connected(url) as channel:
        try:
            await channel.get_exchange(source)
        except exceptions.ChannelNotFoundEntity:
            raise BrokerError(
                f"there is no exchange {source}: no daemon with the prefix {names.prefix!r} has run on this "
                "broker; start one with `jef run`"
            ) from None
        queue = await channel.declare_queue(exclusive=True)
        for pattern in patterns:
            await queue.bind(source, pattern)
        await queue.consume(seen.take, no_ack=True)
        channel.close_callbacks.add(lambda *_: seen.end())
        yield seen


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of a command."""

    accepted: bool
    status: str | None
    """The execution's, where it is known."""
    reason: str | None


async def control(
    url: str,
    names: Names,
    commands: Sequence[Mapping[str, Any]],
    patience_s: float = 10.0,
    *,
    is_coordinated: bool = False,
) -> AsyncIterator[tuple[Mapping[str, Any], Answer]]:
    """Send commands; yields each with its answer, in order.

    Args:
        url: the broker's.
        names: of queues.
        commands: as on the wire (`messages.Control`).
        patience_s: how long an answer is waited for.
        is_coordinated: the coordinator's answer is waited for, where daemons answer for a workflow's jobs too.

    Raises:
        BrokerError: no daemon has ever run with this prefix, or none answers in time.
    """
    async with connected(url) as channel:
        answers = _Answers(await channel.declare_queue(exclusive=True), masked(url))
        await answers.queue.consume(answers.take, no_ack=True)
        for start in range(0, len(commands), _COMMANDS_AT_ONCE):
            chosen = commands[start : start + _COMMANDS_AT_ONCE]
            for number, each in enumerate(chosen, start):
                await _send_command(channel, names, each, answers.queue.name, str(number))
            for number, each in enumerate(chosen, start):
                # All of a workflow has one answer; one execution may be at another daemon than the first that answers.
                another_s = 0.0 if each.get("workflowId") and not is_coordinated else _ANOTHER_S
                yield each, await answers.of(str(number), patience_s, another_s=another_s)


_COMMANDS_AT_ONCE = 200
_ANOTHER_S = 1.0
"""A daemon that does not know an execution says so at once; the one that does may answer a little later."""


class _Answers:
    """Answers to commands, by correlation id."""

    def __init__(self, queue: AbstractQueue, where: str) -> None:
        self.queue = queue
        self._where = where
        self._found: dict[str, tuple[Answer, float]] = {}
        """With the time of the first one."""
        self._came = asyncio.Event()

    async def take(self, message: AbstractIncomingMessage) -> None:
        """One came."""
        try:
            told = json.loads(message.body)
            answer = Answer(bool(told["accepted"]), told.get("status"), told.get("reason"))
        except (ValueError, TypeError, KeyError):
            return
        key = str(message.correlation_id)
        first, at = self._found.get(key, (answer, asyncio.get_running_loop().time()))
        self._found[key] = (first if answer.status is None else answer), at
        self._came.set()

    async def of(self, key: str, patience_s: float, *, another_s: float) -> Answer:
        """The answer of whoever knows the execution; the first one if that is all that comes."""
        loop = asyncio.get_running_loop()
        until = loop.time() + patience_s
        while True:
            answer, at = self._found.get(key, (None, 0.0))
            if answer is not None:
                until = at + another_s
            if answer is not None and (answer.status is not None or loop.time() >= until):
                return answer
            self._came.clear()
            try:
                async with asyncio.timeout_at(until):
                    await self._came.wait()
            except TimeoutError:
                if answer is None:
                    raise BrokerError(
                        f"no daemon answers on the broker at {self._where}; the command waits for one that runs"
                    ) from None


async def _send_command(
    channel: AbstractChannel, names: Names, command: Mapping[str, Any], reply_to: str, key: str
) -> None:
    message = aio_pika.Message(
        json.dumps(command).encode(),
        content_type="application/json",
        delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
        reply_to=reply_to,
        correlation_id=key,
    )
    try:
        await channel.default_exchange.publish(message, names.control, mandatory=True, timeout=_TIMEOUT_S)
    except exceptions.PublishError:
        raise BrokerError(
            f"there is no queue {names.control}: no daemon with the prefix {names.prefix!r} has run on this broker; "
            "start one with `jef run`"
        ) from None
