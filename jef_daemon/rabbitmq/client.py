"""What people do on the broker: submit a job, watch statuses, look after dead letters. For the command line.

Every function opens a connection of its own and closes it. A broker that is not there is a `BrokerError` of
one sentence within seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import aio_pika
from aio_pika.abc import AbstractChannel, AbstractIncomingMessage, AbstractQueue
from aiormq import exceptions

from jef_daemon.config import masked
from jef_daemon.errors import BrokerError, NotFound
from jef_daemon.names import Names
from jef_daemon.rabbitmq.refusals import meaning, reason
from jef_daemon.rabbitmq.session import open_connection
from jef_daemon.rabbitmq.topology import Topology, trial

_TIMEOUT_S = 5.0
_MOST = 10_000
"""Dead letters looked at, at most."""
_WHY = ("x-jef-reason", "x-jef-detail", "x-jef-routing-key")
_LOOKS, _LOOK_AGAIN_S = 10, 0.2
"""Dead letters that somebody else looks at just now come back when he has looked."""


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
) -> None:
    """Publish a request, confirmed.

    Raises:
        BrokerError: no daemon has ever run with this prefix, or the broker refuses.
    """
    async with connected(url) as channel:
        await _publish(channel, names, action, json.dumps(request).encode(), headers)


async def _publish(
    channel: AbstractChannel,
    names: Names,
    action: str,
    body: bytes,
    headers: Mapping[str, Any] | None,
    *,
    reply_to: str | None = None,
    correlation_id: str | None = None,
) -> None:
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
        is_queue = action in {names.updates, names.control, names.locks, names.workflows}
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
    """

    def __init__(self, where: str) -> None:
        self._where = where
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
                f"the broker at {self._where} has closed the connection; jobs go on, `jef list` shows them"
            )
        return told


async def start_workflow(url: str, names: Names, request: Mapping[str, Any]) -> None:
    """Publish a request for a workflow, confirmed.

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
        except (exceptions.ChannelNotFoundEntity, exceptions.PublishError):
            raise BrokerError(
                f"nothing takes what is published to {names.workflows}: no daemon with the prefix {names.prefix!r} has "
                "run on this broker; start one with `jef run`"
            ) from None


@contextlib.asynccontextmanager
async def statuses(
    url: str, names: Names, pattern: str = "#", *, of_workflows: bool = False
) -> AsyncIterator[Statuses]:
    """Status notifications from now on.

    Args:
        url: the broker's.
        names: of exchanges.
        pattern: routing keys, `<action>.<status>`; `*` and `#` as in AMQP.
        of_workflows: those of workflows, `<workflow>.<status>`.
    """
    seen = Statuses(masked(url))
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


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A message that could not become a job."""

    number: int
    """Its place in the queue, from 1."""
    reason: str
    detail: str
    routing_key: str
    body: bytes
    headers: Mapping[str, Any]

    @property
    def identity(self) -> tuple[str, str, bytes]:
        """What makes it this one and no other, wherever it stands."""
        return (self.reason, self.routing_key, self.body)

    @property
    def execution_id(self) -> str:
        """Where it can be read, else empty."""
        try:
            found = json.loads(self.body)["executionId"]
        except (ValueError, TypeError, KeyError):
            return ""
        return str(found)


async def dead_letters(url: str, names: Names, most: int = _MOST) -> list[DeadLetter]:
    """Look at them; every one stays where it is."""
    async with connected(url) as channel:
        queue = await _dead_letter_queue(channel, names)
        # Taken without acknowledging: closing the channel puts all of them back in their order.
        return [_dead_letter(number, message) async for number, message in _each(queue, most)]


async def take_dead_letters(url: str, names: Names, letters: Sequence[DeadLetter], *, replay: bool) -> int:
    """Publish dead letters again, to where they were sent, or only drop them.

    They are known by what they hold, never by their place: whoever else looks at the queue meanwhile holds
    some of them, and the places of the others shift.

    Args:
        url: the broker's.
        names: of exchanges and queues.
        letters: which, as `dead_letters` found them.
        replay: True: published and confirmed before it is taken away; False: dropped.

    Returns:
        How many; fewer than wanted where others took them first.
    """
    done = 0
    wanted = Counter(letter.identity for letter in letters)
    async with connected(url) as channel:
        queue = await _dead_letter_queue(channel, names)
        for _ in range(_LOOKS):
            async for number, message in _each(queue, _MOST):
                letter = _dead_letter(number, message)
                if not wanted[letter.identity]:
                    continue
                wanted[letter.identity] -= 1
                if replay:
                    headers = {key: value for key, value in letter.headers.items() if not _is_of_death(key)}
                    await _publish(
                        channel,
                        names,
                        letter.routing_key,
                        letter.body,
                        headers,
                        reply_to=message.reply_to,
                        correlation_id=message.correlation_id,
                    )
                await message.ack()
                done += 1
                if done == len(letters):
                    break
            if done == len(letters):
                break
            await asyncio.sleep(_LOOK_AGAIN_S)
        # An acknowledgement written just before a quorum queue's connection closes is lost.
        await asyncio.sleep(0.5 if done else 0)
    return done


def _is_of_death(header: str) -> bool:
    """Why and how it died. All else goes along: what a daemon that handed it back had counted up to, too."""
    return header.startswith(("x-death", "x-first-death-", "x-last-death-")) or header in _WHY


async def _dead_letter_queue(channel: AbstractChannel, names: Names) -> AbstractQueue:
    try:
        return await channel.declare_queue(names.dead_letters, passive=True)
    except exceptions.ChannelNotFoundEntity:
        raise NotFound(
            f"there is no queue {names.dead_letters}: no daemon with this prefix has run here"
        ) from None


async def _each(queue: AbstractQueue, most: int) -> AsyncIterator[tuple[int, AbstractIncomingMessage]]:
    number = 0
    while number < most:
        message = await queue.get(fail=False)
        if message is None:
            return
        number += 1
        yield number, message


def _dead_letter(number: int, message: AbstractIncomingMessage) -> DeadLetter:
    headers = message.headers
    return DeadLetter(
        number,
        str(headers.get("x-jef-reason", headers.get("x-first-death-reason", "unknown"))),
        str(headers.get("x-jef-detail", "")),
        str(headers.get("x-jef-routing-key") or message.routing_key or ""),
        message.body,
        headers,
    )


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
