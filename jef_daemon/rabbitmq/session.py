"""One connection to the broker: topology declared, consumers running, a publisher. It lives until it breaks."""

from __future__ import annotations

import asyncio
import itertools
import secrets
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import aio_pika
import aiormq
import structlog
from aio_pika.connection import make_url
from aiormq.abc import DeliveredMessage
from pamqp import commands

from jef_daemon.names import Names
from jef_daemon.ports import Delivery, Outgoing
from jef_daemon.rabbitmq import unreadable
from jef_daemon.rabbitmq.deliveries import Deliveries
from jef_daemon.rabbitmq.publisher import Publisher
from jef_daemon.rabbitmq.refusals import current_value, reason
from jef_daemon.rabbitmq.tap import TappedConnection
from jef_daemon.rabbitmq.topology import (
    CONTROL,
    COORDINATOR,
    HANDED_ON,
    LOCK_REPLIES,
    LOCKS,
    UNROUTABLE,
    UPDATES,
    WATCHED,
    WORKFLOWS,
    Topology,
)
from jef_daemon.sections import Bus as BusSettings

log = structlog.get_logger()

OnDelivery = Callable[[Delivery], None]
_numbers = itertools.count(1)
_REQUESTS = "requests"
_APART = frozenset({LOCKS, LOCK_REPLIES, UPDATES, CONTROL, HANDED_ON, WATCHED, WORKFLOWS, COORDINATOR})
"""Sources that are acknowledged on their own."""
_APART_PREFETCH = 500
"""What is acknowledged apart is small, takes effect at once, and never waits for a slot."""
unreadable.install()
_ACK_LINGER_S = 0.5
"""On quorum queues, acknowledgements written just before the connection closes are lost."""


class Session:
    """A connection with everything on it.

    Args:
        connection: open.
        settings: flow control.
        on_delivery: called in the event loop for each delivery, in order.
        prefix: of the queues that are the daemons' own.
    """

    def __init__(
        self,
        connection: TappedConnection,
        settings: BusSettings,
        on_delivery: OnDelivery,
        prefix: str = "jef",
    ) -> None:
        self.number = next(_numbers)
        self._connection = connection
        self._settings = settings
        self._on_delivery = on_delivery
        self._own = f"{prefix}."
        self._tags: dict[str, str] = {}
        self._loop = asyncio.get_running_loop()
        self._broken: asyncio.Future[BaseException | None] = self._loop.create_future()
        self._channels: dict[str, aiormq.Channel] = {}
        """Of consumers, by group: whoever acknowledges up to a tag has a channel of its own."""
        self._deliveries: dict[str, Deliveries] = {}
        """Of the same."""
        self._publisher: Publisher | None = None
        self._replies: Publisher | None = None
        self._asking: aiormq.Channel | None = None
        """Where the broker is asked whether it answers."""
        connection.close_callbacks.add(lambda _, error: self._break(error))

    async def set_up(self, topology: Topology) -> None:
        """Declare the topology, open the channels."""
        await self.declare(topology)
        self._publisher = self._publish_on(await self._open_channel(confirms=True))

    async def declare(self, topology: Topology) -> None:
        """Declare it, on a channel of its own: one that the broker refuses takes nothing else along."""
        declaring = await self._connection.channel()
        for exchange in topology.exchanges:
            declared_exchange = await declaring.declare_exchange(
                exchange.name, exchange.type, durable=True, arguments=dict(exchange.arguments) or None
            )
            if exchange.source is not None:
                await declared_exchange.bind(exchange.source, "#")
        for queue in topology.queues:
            declared = await declaring.declare_queue(
                queue.name, durable=True, arguments=dict(queue.arguments)
            )
            if queue.exchange is not None:
                await declared.bind(queue.exchange, queue.routing_key)
        await declaring.close()

    async def _open_channel(self, *, confirms: bool) -> aiormq.Channel:
        channel = await self._connection.channel(publisher_confirms=confirms)
        channel.close_callbacks.add(lambda _, error: self._break(error))
        underlay = cast("aiormq.Channel", await channel.get_underlay_channel())
        # Without the declared queue, or refused by a newer broker's timeout: start over as a whole.
        underlay.on_consumer_cancel_callbacks.add(
            lambda frame: self._break(ConnectionError(f"the broker cancelled consumer {frame.consumer_tag}"))
        )
        return underlay

    async def consume(self, source: str, queue: str) -> None:
        """Let the deliveries of a queue come."""
        if source in self._tags:
            return
        tag = self._tags[source] = f"{source}.{self.number}"

        channel = await self._channel_of(source, tag)
        await channel.basic_consume(queue, _untaken, consumer_tag=tag)

    async def listen(self, source: str, queue: str, exchange: str, headers: Mapping[str, Any]) -> None:
        """Let copies of what is published come, as long as the session lives: what is missed then, nobody keeps.

        Args:
            source: of the deliveries; they need no acknowledgement.
            queue: begins the name of the session's own queue: not the whole of it, as the last session's may still
                be there, locked by a connection of which the broker has not noticed that it is dead.
            exchange: a headers exchange.
            headers: all of which a message has.
        """
        if source in self._tags:
            return
        tag = self._tags[source] = f"{source}.{self.number}"

        channel = await self._channel_of(source, tag)
        own = f"{queue}.{secrets.token_hex(4)}"
        await channel.queue_declare(own, exclusive=True, auto_delete=True)
        await channel.queue_bind(own, exchange, arguments={"x-match": "all", **headers})
        await channel.basic_consume(own, _untaken, consumer_tag=tag, no_ack=True)

    async def bind(self, queue: str, exchange: str, routing_keys: Iterable[str]) -> None:
        """Let what is published with these keys come into a queue."""
        channel = await self._connection.channel()
        declared = await channel.get_queue(queue, ensure=False)
        for key in routing_keys:
            await declared.bind(exchange, key)
        await channel.close()

    async def _channel_of(self, source: str, consumer_tag: str) -> aiormq.Channel:
        """The channel that a source's deliveries will come by, and whose they are known to be."""
        group = group_of(source)
        if group not in self._channels:
            channel = await self._open_channel(confirms=False)
            prefetch = self._settings.prefetch if group == _REQUESTS else _APART_PREFETCH
            await channel.basic_qos(prefetch_count=prefetch)
            self._deliveries[group] = deliveries = Deliveries(self.number, self._deliver)
            self._connection.tap.take(channel.number, deliveries)
            self._channels[group] = channel
        self._deliveries[group].expect(consumer_tag, source)
        return self._channels[group]

    def _deliver(self, delivery: Delivery) -> None:
        # In the loop's next turn, one by one: whoever fails at one leaves the others and the connection alone.
        self._loop.call_soon(self._on_delivery, delivery)

    async def keeper(self, exchange: str, ours: str) -> str:
        """Whose name an exchange was declared with: ours, if it was not there.

        RabbitMQ refuses to declare an exchange again with another alternate exchange, and says which one it has.
        That makes a durable exchange a register that the first to come sets and that nobody can set otherwise.
        """
        channel = await self._connection.channel()
        try:
            await channel.declare_exchange(
                exchange, "fanout", durable=True, internal=True, arguments={"alternate-exchange": ours}
            )
        except aiormq.exceptions.ChannelPreconditionFailed as error:
            return current_value(error)
        await channel.close()
        return ours

    async def cancel(self, source: str) -> None:
        """Let no more deliveries of a source come; those on their way still arrive."""
        tag = self._tags.pop(source, None)
        if tag is not None:
            await self._channels[group_of(source)].basic_cancel(tag)

    async def publish(self, messages: Sequence[Outgoing]) -> asyncio.Future[None]:
        """Send messages in order; see `ports.Bus`. Answers to a foreign `reply_to` go beside the rest."""
        if self._publisher is None:
            raise ConnectionError("the session is not set up")
        replies = [message for message in messages if self._is_foreign(message)]
        if not replies:
            return await self._publisher.publish(messages)
        own = [message for message in messages if not self._is_foreign(message)]
        told = await self._publisher.publish(own) if own else None
        return asyncio.ensure_future(self._settled(told, await self._reply(replies)))

    def _is_foreign(self, message: Outgoing) -> bool:
        return not message.exchange and not message.routing_key.startswith(self._own)

    async def _reply(self, messages: Sequence[Outgoing]) -> asyncio.Future[None]:
        """Answers go over a channel of their own: what a requester names must not stop the notifications.

        A `reply_to` that the user may not publish to closes the channel; the answers on it are given up.
        """
        if self._replies is None:
            try:
                channel = await self._connection.channel(publisher_confirms=True)
                underlay = cast("aiormq.Channel", await channel.get_underlay_channel())
            except Exception as error:  # noqa: BLE001  the client raises what it likes where the connection is closing
                raise ConnectionError(reason(error)) from None
            channel.close_callbacks.add(lambda _, error: self._lose_replies(error))
            self._replies = self._publish_on(underlay)
        return await self._replies.publish(messages)

    def _publish_on(self, channel: aiormq.Channel) -> Publisher:
        return Publisher(self._connection.tap, channel, self._settings.publish_window)

    async def _settled(self, told: asyncio.Future[None] | None, replied: asyncio.Future[None]) -> None:
        if told is not None:
            await told
        try:
            await replied
        except ConnectionError:
            if self.is_broken or self._connection.is_closed:
                raise  # nothing was wrong with the answers: they are sent again

    def _lose_replies(self, error: BaseException | None) -> None:
        replies, self._replies = self._replies, None
        if replies is not None:
            if replies.unconfirmed:
                log.warning("replies_lost", replies=replies.unconfirmed, reason=str(error))
            replies.fail("the channel of replies was closed")

    @property
    def unconfirmed(self) -> int:
        """Messages that the broker has not confirmed yet."""
        return sum(one.unconfirmed for one in (self._publisher, self._replies) if one is not None)

    async def acknowledge(self, source: str, up_to: int) -> None:
        """Acknowledge every delivery of a source, and of those of its group, up to a tag."""
        await self._channels[group_of(source)].basic_ack(up_to, multiple=True, wait=False)

    async def stop(self) -> None:
        """End in good order: no more deliveries, acknowledgements drained, then closed."""
        for source in list(self._tags):
            await self.cancel(source)
        await asyncio.sleep(_ACK_LINGER_S)
        await self._connection.close()

    async def wait_broken(self) -> BaseException | None:
        """Wait until it is of no use any more; returns why."""
        return await asyncio.shield(self._broken)

    @property
    def is_broken(self) -> bool:
        """Whether it has ended."""
        return self._broken.done()

    async def answers(self) -> None:
        """Return once the broker has answered a question: our tasks, the connection and the broker all work."""
        if self._asking is None:
            self._asking = await self._open_channel(confirms=False)
        # The cheapest of all questions, which nobody needs a permission for.
        await self._asking.basic_qos(prefetch_count=1)

    async def is_blocked(self) -> bool:
        """Whether the broker has said that it takes nothing from us for the time being (`connection.blocked`)."""
        underlay = self._connection.transport and self._connection.transport.connection
        try:
            async with asyncio.timeout(0):
                if underlay is not None:
                    await underlay.ready()
        except TimeoutError:
            return True
        return False

    def give_up(self, why: str) -> None:
        """Be of no use any more."""
        self._break(ConnectionError(why))

    async def discard(self) -> None:
        """Let go of a broken one."""
        self._break(None)
        await self._connection.close()

    def _break(self, error: BaseException | None) -> None:
        if not self._broken.done():
            self._broken.set_result(error)
        for publisher in (self._publisher, self._replies):
            if publisher is not None:
                publisher.fail("the connection to the broker was lost")


async def _untaken(message: DeliveredMessage) -> None:
    raise AssertionError(f"a delivery went past the tap: {message.delivery}")


async def connect(url: str, settings: BusSettings, name: str, timeout_s: float) -> TappedConnection:
    """Open a connection that does not try to heal itself: the bus starts a new session instead."""
    properties = {"connection_name": name}
    connection = await open_connection(
        url,
        timeout=timeout_s,
        heartbeat=settings.heartbeat_s,
        client_properties=properties,
        connection_class=TappedConnection,
    )
    return cast("TappedConnection", connection)


async def open_connection(
    url: str,
    *,
    timeout: float,  # noqa: ASYNC109 - the library's
    client_properties: dict[str, Any] | None = None,
    connection_class: type[aio_pika.Connection] = aio_pika.Connection,
    **parameters: Any,
) -> aio_pika.Connection:
    """Open a connection; one that is refused says so in the broker's own words."""
    connection = connection_class(
        make_url(url, **parameters), client_properties=client_properties, **parameters
    )
    try:
        await connection.connect(timeout=timeout)
    except BaseException as error:
        # Else it closes itself when it is thrown away, in a task, though there may be no loop for one any more.
        await connection.close()
        closed = _close_behind(error) if isinstance(error, aiormq.exceptions.InvalidFrameError) else None
        if closed is None:
            raise
        raise aiormq.exceptions.ConnectionClosed(closed.reply_code, closed.reply_text) from None
    return connection


def _close_behind(error: BaseException) -> commands.Connection.Close | None:
    """The broker's own words on a refused `Connection.Open`.

    The client (aiormq 7.2) reports only that a frame was not the expected one; what it was is in the
    variables of the function that raised.
    """
    for frame, _ in traceback.walk_tb(error.__traceback__):
        found = frame.f_locals.get("frame")
        if isinstance(found, commands.Connection.Close):
            return found
    return None


def group_of(source: str) -> str:
    """Sources whose deliveries are acknowledged together."""
    return source if source in _APART else _REQUESTS


def queues_of(names: Names, actions: Iterable[str], ledger: str | None) -> dict[str, str]:
    """The queue of each source of deliveries."""
    own = {
        UNROUTABLE: names.unroutable,
        LOCKS: names.locks,
        UPDATES: names.updates,
        CONTROL: names.control,
        WORKFLOWS: names.workflows,
        COORDINATOR: names.coordinator,
    }
    if ledger:
        own |= {LOCK_REPLIES: names.lock_replies(ledger), HANDED_ON: names.daemon(ledger)}
        own[WATCHED] = f"{names.watched}.{ledger}"
    return {action: names.job_queue(action) for action in actions} | own
