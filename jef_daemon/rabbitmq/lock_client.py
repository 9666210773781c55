"""The lock service as everybody outside speaks to it: a message to `jef.locks`, answers in a queue of one's own.

Part in the flow: the command line asks here who holds what; `lock_claim` has and keeps locks over it. Nothing of
the daemon's but the wire protocol is used, as by a foreign client; `lock.client` is for the daemon's own jobs.

A question that nobody takes within seconds leaves the queue again: a lock service that starts later does not
grant anything to somebody who has gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

import aio_pika
from aio_pika.abc import AbstractChannel, AbstractIncomingMessage
from aiormq import exceptions
from pydantic import ValidationError
from pydantic_core import to_json

from jef_daemon.errors import BrokerError, LockRefused
from jef_daemon.lock import wire
from jef_daemon.lock.messages import LockReply, ResourceInfo
from jef_daemon.lock.requests import Answer
from jef_daemon.names import Names
from jef_daemon.rabbitmq.client import connected

ANSWER_S = 5.0
"""So long an answer may take."""
_PAGE = 100
"""Resources that the lock service tells at once."""
_LASTING = frozenset({"release", "cancel", "force-release"})
"""What is worth doing however late it is read."""
BROKEN = (exceptions.AMQPError, exceptions.ChannelInvalidStateError, OSError, TimeoutError)
"""What a lost connection raises."""

_Result = TypeVar("_Result")
Message = Mapping[str, Any]
Heard = tuple[str, LockReply]
"""A correlation id and what was answered."""


class Talk:
    """One connection to the lock service.

    Args:
        channel: with confirms.
        names: of queues.
        reply_to: the queue of the answers; it lives as long as the connection.
    """

    def __init__(self, channel: AbstractChannel, names: Names, reply_to: str) -> None:
        self._channel = channel
        self._names = names
        self._reply_to = reply_to
        self._heard: asyncio.Queue[Heard | None] = asyncio.Queue()

    async def begin(self) -> None:
        """Listen."""
        queue = await self._channel.declare_queue(self._reply_to, exclusive=True)
        await queue.consume(self._take, no_ack=True)
        self._channel.close_callbacks.add(lambda *_: self._heard.put_nowait(None))

    async def _take(self, message: AbstractIncomingMessage) -> None:
        with contextlib.suppress(ValidationError):
            self._heard.put_nowait((message.correlation_id or "", wire.decode_reply(message.body)))

    async def send(self, request: Message, correlation_id: str) -> None:
        """Publish a request, confirmed.

        Args:
            request: as on the wire (`lock_messages.LockRequest`).
            correlation_id: comes back with the answer.

        Raises:
            BrokerError: there is no such queue.
        """
        message = aio_pika.Message(
            to_json(request),
            content_type="application/json",
            delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
            correlation_id=correlation_id,
            reply_to=self._reply_to,
            expiration=None if request["operation"] in _LASTING else ANSWER_S,
        )
        exchange = self._channel.default_exchange
        try:
            await exchange.publish(message, self._names.locks, mandatory=True, timeout=ANSWER_S)
        except exceptions.PublishError:
            raise BrokerError(
                f"there is no queue {self._names.locks}: no daemon with the prefix {self._names.prefix!r} has run on "
                "this broker; start one with `jef run`"
            ) from None

    async def hear(self, until: float) -> Heard | None:
        """The next answer, asked for or not; None when the time is over.

        Args:
            until: monotonic.

        Raises:
            ConnectionError: the connection is lost.
        """
        try:
            async with asyncio.timeout_at(loop_time(until)):
                heard = await self._heard.get()
        except TimeoutError:
            return None
        if heard is None:
            raise ConnectionError("the broker has closed the connection")
        return heard

    async def ask(self, request: Message) -> LockReply:
        """A question and its answer.

        Raises:
            BrokerError: nobody answers.
        """
        correlation_id = uuid.uuid4().hex
        until = time.monotonic() + ANSWER_S
        try:
            await apart(self.send(request, correlation_id))
            while (heard := await self.hear(until)) is not None:
                if heard[0] == correlation_id:
                    return heard[1]
        except BROKEN as error:
            raise BrokerError(f"the connection to the broker was lost: {error or 'no confirm'}") from None
        raise no_answer(self._names)


def no_answer(names: Names) -> BrokerError:
    """What is wrong when nobody answers."""
    return BrokerError(
        f"no lock service answers on the queue {names.locks}; start one with `jef run`, or alone with "
        "`jef run --role locks`"
    )


@contextlib.asynccontextmanager
async def talking(
    url: str, names: Names, reply_to: str = "", heartbeat_s: int | None = None
) -> AsyncIterator[Talk]:
    """A connection to the lock service.

    Args:
        url: the broker's.
        names: of queues.
        reply_to: the queue of the answers; empty: a new name.
        heartbeat_s: how soon a dead broker is seen; None: as the broker likes.
    """
    options = {} if heartbeat_s is None else {"heartbeat": heartbeat_s}
    async with connected(url, **options) as channel:
        talk = Talk(channel, names, reply_to or new_queue(names))
        await talk.begin()
        yield talk


async def apart(work: Coroutine[Any, Any, _Result]) -> _Result:
    """Await a call of the library: what it cancels of itself, when a connection breaks, is no cancellation of ours.

    Raises:
        ConnectionError: it was cancelled from inside.
    """
    task = asyncio.create_task(work)
    try:
        await asyncio.wait({task})
    except asyncio.CancelledError:
        task.cancel()
        raise
    if task.cancelled():
        raise ConnectionError("the connection to the broker was lost")
    return task.result()


def new_queue(names: Names) -> str:
    """Beginning as the queues of daemons do: those hear unasked when their place in a queue has changed."""
    return names.lock_replies(f"client-{uuid.uuid4().hex}")


def loop_time(monotonic: float) -> float:
    """An instant of the monotonic clock as the event loop counts."""
    return asyncio.get_running_loop().time() + monotonic - time.monotonic()


# --- looking ---------------------------------------------------------------------------------------------


async def look(talk: Talk, resources: Sequence[str] = ()) -> AsyncIterator[list[ResourceInfo]]:
    """Who holds and who waits, a page at a time.

    Args:
        talk: to the lock service.
        resources: only these; none: all that are held or waited for, by name.
    """
    if resources:
        for start in range(0, len(resources), _PAGE):
            names = [{"resource": name} for name in resources[start : start + _PAGE]]
            yield await _inspect(talk, {"operation": "inspect", "locks": names})
        return
    after = ""
    while found := await _inspect(talk, {"operation": "inspect", "after": after}):
        yield found
        after = found[-1].resource


async def _inspect(talk: Talk, request: Message) -> list[ResourceInfo]:
    reply = await talk.ask(request)
    if reply.status != Answer.STATE:
        raise LockRefused(f"the lock service refuses: {reply.reason or reply.status}")
    return reply.resources or []


def told(reply: LockReply) -> str:
    """Why it is not granted yet, in half a sentence."""
    if reply.resource is None:
        return reply.reason or reply.status.lower()
    holders = f"held by {', '.join(reply.holders)}" if reply.holders else "kept for an earlier one that waits"
    return f"{reply.resource} is {holders}, number {reply.position} in the queue"
