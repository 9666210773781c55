"""What concerns another daemon's ledger → that daemon, or all of them.

Updates and commands come by queues that all daemons share, so that one may receive what concerns another. A token
names the ledger of its execution, and with it the queue of the daemon that has it.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from typing import Protocol

import structlog

from jef_daemon.messages import Control, Update
from jef_daemon.names import Names
from jef_daemon.ports import Delivery, MessageReturned, Outgoing

log = structlog.get_logger()

KIND = "x-jef-kind"
"""Header of what one daemon hands to another: `update` or `control`."""
UPDATE, CONTROL = "update", "control"
FROM = "x-jef-from"
"""Header with the name of the ledger whose daemon hands it on."""
HANDED_ON = ":handed-on"
"""The source of what other daemons hand on (`rabbitmq.topology`)."""
GONE = "no daemon here has the ledger that the token names"
"""What the sender of an update for such a ledger is told."""
_PAUSE_S = 0.1
"""Before a message that the broker refused, or that its connection took along, is handed on again."""
_IDENTITY = re.compile(r"[0-9a-f]{12}\.")
"""What a token begins with: the name of a ledger."""


class ElsewhereBus(Protocol):
    """The part of a bus that is needed to reach others."""

    async def publish(self, messages: Sequence[Outgoing]) -> asyncio.Future[None]:
        """See `ports.Bus`."""
        ...


class Elsewhere:
    """Hands on what is not for this daemon.

    Args:
        bus: reaches the others.
        names: of their queues.
        identity: the own ledger's name.
    """

    def __init__(self, bus: ElsewhereBus, names: Names, identity: str) -> None:
        self._bus = bus
        self._names = names
        self._identity = identity

    def ledger_of(self, update: Update) -> str | None:
        """Whose an update's token is, if it is not ours; what is no name of a ledger names no queue."""
        found = _IDENTITY.match(update.token)
        ledger = found[0][:-1] if found else self._identity
        return None if ledger == self._identity else ledger

    def is_own(self, delivery: Delivery) -> bool:
        """Whether it is what we told all daemons ourselves."""
        return delivery.headers.get(FROM) == self._identity

    async def hand_on_update(self, delivery: Delivery, ledger: str) -> bool:
        """Let the daemon of a ledger have what was delivered here; returns whether there is one, though it be down.

        That its queue is there is asked by sending, never before, and never remembered: whoever makes a name up costs
        no more than who names one that is, and a daemon that has just come is reached at once.
        """
        try:
            await self._hand_on(delivery, "", self._names.daemon(ledger), UPDATE)
        except MessageReturned:
            return False
        return True

    async def hand_on_command(self, delivery: Delivery) -> None:
        """Let all daemons have a command."""
        await self._hand_on(delivery, self._names.daemons, "", CONTROL)

    async def send_update(self, update: Update, ledger: str) -> bool:
        """As `hand_on_update`, what came by another way than a queue.

        Raises:
            ConnectionError: the broker went away meanwhile.
        """
        try:
            await self._send("", self._names.daemon(ledger), update.model_dump_json(by_alias=True), UPDATE)
        except MessageReturned:
            return False
        return True

    async def send_command(self, control: Control) -> None:
        """As `hand_on_command`, what came by another way than a queue.

        Raises:
            ConnectionError: the broker went away meanwhile.
        """
        await self._send(self._names.daemons, "", control.model_dump_json(by_alias=True), CONTROL)

    async def _send(self, exchange: str, routing_key: str, body: str, kind: str) -> None:
        headers = {KIND: kind, FROM: self._identity}
        message = Outgoing(0, exchange, routing_key, body.encode(), headers, is_mandatory=kind == UPDATE)
        await (await self._bus.publish([message]))

    async def _hand_on(self, delivery: Delivery, exchange: str, routing_key: str, kind: str) -> None:
        headers = {KIND: kind, FROM: self._identity}
        message = Outgoing(
            *(0, exchange, routing_key, delivery.body, headers, delivery.correlation_id, delivery.reply_to),
            is_mandatory=kind == UPDATE,
        )
        # Again until it is confirmed: what it came by is acknowledged behind it. Twice does no harm.
        while True:
            try:
                return await (await self._bus.publish([message]))
            except ConnectionError as error:
                log.debug("handing_on_again", reason=str(error))
                await asyncio.sleep(_PAUSE_S)


def is_handed_on(delivery: Delivery) -> bool:
    """Whether another daemon has sent it to us: it is not sent any further."""
    return delivery.source == HANDED_ON
