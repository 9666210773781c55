"""Async jobs' updates and operators' commands → the ledger, and what follows from them here.

Both come by shared queues, so one daemon may receive what concerns another. A token names the ledger of its
execution: an update for another goes there. A command for an execution that is not known here is told to all
daemons; the one that knows it answers.
"""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import structlog
from pydantic_core import to_json

from jef_daemon.errors import RequestRefused
from jef_daemon.inbox import Inbox
from jef_daemon.messages import Control, Update, decode_control, decode_update
from jef_daemon.names import Names
from jef_daemon.ports import (
    Accepted,
    Arrival,
    Command,
    Consequences,
    Delivery,
    Outgoing,
    Refusal,
    Reported,
    seen,
)

log = structlog.get_logger()

KIND = "x-jef-kind"
"""Header of what one daemon hands to another: `update` or `control`."""
_UPDATE, _CONTROL = "update", "control"
_UPDATES = "updates"
"""What dead letters of updates are called."""
_PAUSE_S = 0.1
"""Before a message that the broker refused, or that its connection took along, is handed on again."""
_IDENTITY = re.compile(r"[0-9a-f]{12}\.")
"""What a token begins with: the name of a ledger."""


class UpdateLedger(Protocol):
    """The part of a ledger that updates need."""

    def updating(
        self, reported: Sequence[Reported]
    ) -> asyncio.Future[tuple[list[dict[str, object]], Consequences]]:
        """See `SqlLedger.updating`."""
        ...

    def commanding(self, commands: Sequence[Command]) -> asyncio.Future[Consequences]:
        """See `SqlLedger.commanding`."""
        ...

    def accepting(self, messages: Sequence[Arrival | Refusal]) -> asyncio.Future[list[Accepted]]:
        """`accept` of `ports.Ledger`, put in at once."""
        ...

    async def knows(self, ids: Sequence[str]) -> set[str]:
        """Which executions are in the ledger and ours."""
        ...


class UpdateBus(Protocol):
    """The part of a bus that updates need."""

    async def acknowledge(self, deliveries: Sequence[Delivery]) -> None:
        """See `ports.Bus`."""
        ...

    async def publish(self, messages: Sequence[Outgoing]) -> asyncio.Future[None]:
        """See `ports.Bus`."""
        ...


class Updates:
    """Takes updates and commands in.

    Args:
        ledger: where they take effect.
        bus: where they come from.
        names: of queues.
        identity: the ledger's own name.
        max_body_bytes: longest message.
        follow: does here what follows: stops attempts, starts calls.
    """

    def __init__(
        self,
        ledger: UpdateLedger,
        bus: UpdateBus,
        names: Names,
        identity: str,
        max_body_bytes: int,
        follow: Callable[[Consequences], None],
    ) -> None:
        self._ledger = ledger
        self._bus = bus
        self._names = names
        self._identity = identity
        self.max_body_bytes = max_body_bytes
        """Longest message."""
        self._follow = follow
        self.taken = 0
        """Updates that counted, since the start."""
        self.refused = 0
        """Those that did not."""
        self.unread: Counter[str] = Counter()
        """Those that never came before the ledger, by why: `malformed`, `no-token`."""
        self.updates = Inbox(self._take_updates)
        """From `jef.updates`."""
        self.commands = Inbox(self._take_commands)
        """From `jef.control`."""
        self.handed_on = Inbox(self._take_handed_on)
        """From other daemons."""

    async def run(self) -> None:
        """Work until cancelled."""
        async with asyncio.TaskGroup() as parts:
            for name in ("updates", "commands", "handed_on"):
                inbox: Inbox = getattr(self, name)
                parts.create_task(inbox.run(), name=name)

    async def finish(self) -> None:
        """Wait until everything delivered has taken effect."""
        for inbox in (self.updates, self.commands, self.handed_on):
            await inbox.finish()

    async def report(self, update: Update) -> dict[str, object]:
        """Take one update that came by another way than a queue; returns what its sender is told."""
        [told] = await self._apply([self._reported(update)])
        return told

    async def pass_on(self, update: Update) -> bool:
        """Hand an update on whose token is of another daemon's ledger; returns whether it was.

        Raises:
            ConnectionError: the broker went away meanwhile.
        """
        ledger = self._other_ledger(update)
        if ledger is None:
            return False
        await self._send(self._names.daemon(ledger), update.model_dump_json(by_alias=True), _UPDATE)
        return True

    async def command(self, control: Control, actor: str) -> Consequences:
        """Carry out one command that came by another way than a queue; the last answer is its.

        One for an execution that is not known here is told to all daemons too.

        Raises:
            ConnectionError: they could not be told; commands may be repeated.
        """
        known = control.execution_id is not None and await self.knows(control.execution_id)
        consequences = await self._command([Command(control, actor)])
        if not known:
            await self._send("", control.model_dump_json(by_alias=True), _CONTROL, self._names.daemons)
        return consequences

    async def knows(self, execution_id: str) -> bool:
        """Whether an execution is ours."""
        return bool(await self._ledger.knows([execution_id]))

    def note_unread(self, reason: str) -> None:
        """Count an update that never came before the ledger."""
        self.unread[reason] += 1

    # --- updates -----------------------------------------------------------------------------------------

    async def _take_updates(self, batch: Sequence[Delivery]) -> None:
        ours: list[Reported] = []
        for delivery in batch:
            try:
                update = decode_update(delivery.body, self.max_body_bytes)
            except RequestRefused as error:
                await self._refuse(delivery, error, _UPDATES)
                continue
            ledger = self._other_ledger(update)
            if ledger is not None and not is_handed_on(delivery):
                await self._hand_on(delivery, "", self._names.daemon(ledger), _UPDATE)
            else:
                ours.append(self._reported(update, delivery))
        if ours:
            await self._apply(ours)
        await self._bus.acknowledge(batch)

    async def _apply(self, reported: Sequence[Reported]) -> list[dict[str, object]]:
        answers, consequences = await self._ledger.updating(reported)
        self._follow(consequences)
        taken = sum(answer["accepted"] is True for answer in answers)
        self.taken += taken
        self.refused += len(answers) - taken
        return answers

    def _other_ledger(self, update: Update) -> str | None:
        """Whose an update's token is, if it is not ours; what is no name of a ledger names no queue."""
        found = _IDENTITY.match(update.token)
        ledger = found[0][:-1] if found else self._identity
        return None if ledger == self._identity else ledger

    def _reported(self, update: Update, delivery: Delivery | None = None) -> Reported:
        secret = update.token.removeprefix(f"{self._identity}.")
        update = update.model_copy(update={"token": secret})
        if delivery is None:
            return Reported(update)
        return Reported(update, delivery.reply_to, delivery.correlation_id)

    # --- commands ----------------------------------------------------------------------------------------

    async def _take_commands(self, batch: Sequence[Delivery]) -> None:
        controls: list[tuple[Control, Delivery]] = []
        for delivery in batch:
            try:
                controls.append((decode_control(delivery.body, self.max_body_bytes), delivery))
            except RequestRefused as error:
                await self._refuse(delivery, error, "control")
        if controls:
            await self._carry_out(controls)
        await self._bus.acknowledge(batch)

    async def _carry_out(self, controls: Sequence[tuple[Control, Delivery]]) -> None:
        """Commands of a batch in one transaction, a workflow's further pages in others."""
        named = [control.execution_id for control, _ in controls if control.execution_id is not None]
        known = await self._ledger.knows(named)
        # All of a workflow may be anywhere; one execution is at one daemon.
        await self._hand_on_commands(
            delivery for control, delivery in controls if control.execution_id not in known
        )
        commands = [
            Command(
                control,
                f"operator:{control.by}",
                # A daemon that was only told, and does not know it, remembers a cancel and leaves the word to others.
                None if is_handed_on(delivery) and control.execution_id not in known else delivery.reply_to,
                delivery.correlation_id,
            )
            for control, delivery in controls
        ]
        consequences = await self._command(commands)
        # Handed back between the two looks: whoever takes it is to know.
        gone = known & consequences.unknown
        await self._hand_on_commands(
            delivery for control, delivery in controls if control.execution_id in gone
        )

    async def _command(self, commands: Sequence[Command]) -> Consequences:
        """Carry commands out to their end, a page of a workflow at a time; returns what followed first."""
        first = consequences = await self._ledger.commanding(commands)
        self._follow(consequences)
        while consequences.more:
            consequences = await self._ledger.commanding(consequences.more)
            self._follow(consequences)
        return first

    async def _hand_on_commands(self, deliveries: Iterable[Delivery]) -> None:
        for delivery in deliveries:
            if not is_handed_on(delivery):
                await self._hand_on(delivery, self._names.daemons, "", _CONTROL)

    # --- between daemons ---------------------------------------------------------------------------------

    async def _take_handed_on(self, batch: Sequence[Delivery]) -> None:
        for delivery in batch:
            if delivery.headers.get("x-jef-from") == self._identity:
                await self._bus.acknowledge([delivery])  # our own broadcast
                continue
            take = self._take_updates if delivery.headers.get(KIND) == _UPDATE else self._take_commands
            await take([delivery])

    async def _hand_on(self, delivery: Delivery, exchange: str, routing_key: str, kind: str) -> None:
        headers = {KIND: kind, "x-jef-from": self._identity}
        message = Outgoing(
            0, exchange, routing_key, delivery.body, headers, delivery.correlation_id, delivery.reply_to
        )
        # Again until it is confirmed: what it came by is acknowledged behind it. Twice does no harm.
        while True:
            try:
                return await (await self._bus.publish([message]))
            except ConnectionError as error:
                log.debug("handing_on_again", reason=str(error))
                await asyncio.sleep(_PAUSE_S)

    async def _send(self, routing_key: str, body: str, kind: str, exchange: str = "") -> None:
        headers = {KIND: kind, "x-jef-from": self._identity}
        await (await self._bus.publish([Outgoing(0, exchange, routing_key, body.encode(), headers)]))

    async def _refuse(self, delivery: Delivery, error: RequestRefused, action: str) -> None:
        """Kept as a dead letter; whoever waits for an answer gets one."""
        await self._ledger.accepting([Refusal(error, delivery, action)])
        if action == _UPDATES:
            self.note_unread("malformed")
        log.warning("message_refused", queue=action, reason=error.code, detail=error.detail)
        if delivery.reply_to:
            body = to_json({"accepted": False, "reason": f"{error.code}: {error.detail}"})
            message = Outgoing(0, "", delivery.reply_to, body, None, delivery.correlation_id)
            try:
                seen(await self._bus.publish([message]))
            except ConnectionError as lost:
                log.debug("answer_lost", reason=str(lost))


HANDED_ON = ":handed-on"
"""The source of what other daemons hand on (`rabbitmq.topology`)."""


def is_handed_on(delivery: Delivery) -> bool:
    """Whether another daemon has sent it to us: it is not sent any further."""
    return delivery.source == HANDED_ON
