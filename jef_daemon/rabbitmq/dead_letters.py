"""Dead letters: looked at, published again, dropped. For the command line; see `client`."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aio_pika.abc import AbstractChannel, AbstractIncomingMessage, AbstractQueue
from aiormq import exceptions

from jef_daemon.errors import NotFound
from jef_daemon.names import Names
from jef_daemon.rabbitmq.client import connected, publish

_MOST = 10_000
"""Dead letters looked at, at most."""
_WHY = ("x-jef-reason", "x-jef-detail", "x-jef-routing-key")
_LOOKS, _LOOK_AGAIN_S = 10, 0.2
"""Dead letters that somebody else looks at just now come back when he has looked."""


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
        return self._read("executionId")

    @property
    def workflow_id(self) -> str:
        """Of a request for a workflow, or of a command for one; else empty."""
        return "" if self.execution_id else self._read("workflowId")

    def _read(self, key: str) -> str:
        try:
            found = json.loads(self.body)[key]
        except (ValueError, TypeError, KeyError, RecursionError):
            return ""
        return "" if found is None else str(found)


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
                    await publish(
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
