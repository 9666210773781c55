"""Async jobs' updates and operators' commands → the ledger, and what follows from them here.

Both come by shared queues, so one daemon may receive what concerns another. A token names the ledger of its
execution: an update for another goes there. A command for an execution that is not known here is told to all
daemons; the one that knows it answers.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Protocol

import structlog
from pydantic_core import to_json

from jef_daemon.elsewhere import GONE, KIND, UPDATE, Elsewhere, is_handed_on
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

_UPDATES = "updates"
_CONTROL = "control"
"""What dead letters of updates and commands are called."""


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
        self._elsewhere = Elsewhere(bus, names, identity)
        self.max_body_bytes = max_body_bytes
        """Longest message."""
        self._follow = follow
        self.taken = 0
        """Updates that counted, since the start."""
        self.refused = 0
        """Those that did not."""
        self.unread: Counter[str] = Counter()
        """Those that never came before the ledger, by why: `malformed`, `no-token`, `unknown-ledger`."""
        self.updates = Inbox(self._take_updates, functools.partial(self._leave_out, _UPDATES))
        """From `jef.updates`."""
        self.commands = Inbox(self._take_commands, functools.partial(self._leave_out, _CONTROL))
        """From `jef.control`."""
        # One by one: each is acknowledged by itself, so none is to come again for a fault that another one meets.
        self.handed_on = Inbox(self._take_handed_on, functools.partial(self._leave_out, _CONTROL), 1)
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

    async def pass_on(self, update: Update) -> bool | None:
        """Hand an update on that came by another way than a queue, and whose token is of another daemon's ledger.

        Returns:
            Whether there is such a daemon; None: the token is ours.

        Raises:
            ConnectionError: the broker went away meanwhile.
        """
        ledger = self._elsewhere.ledger_of(update)
        if ledger is None:
            return None
        is_there = await self._elsewhere.send_update(update, ledger)
        if not is_there:
            self._note_gone(ledger, update)
        return is_there

    async def command(self, control: Control, actor: str) -> Consequences:
        """Carry out one command that came by another way than a queue; the last answer is its.

        One for an execution that is not known here is told to all daemons too.

        Raises:
            ConnectionError: they could not be told; commands may be repeated.
        """
        known = control.execution_id is not None and await self.knows(control.execution_id)
        consequences = await self._command([Command(control, actor)])
        if not known or control.execution_id in consequences.unknown:  # or handed back between the two looks
            await self._elsewhere.send_command(control)
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
        others: list[Callable[[], Awaitable[None]]] = []
        for delivery in batch:
            try:
                update = decode_update(delivery.body, self.max_body_bytes)
            except RequestRefused as error:
                others.append(functools.partial(self._refuse, delivery, error, _UPDATES))
                continue
            ledger = self._elsewhere.ledger_of(update)
            if ledger is None or is_handed_on(delivery):
                ours.append(self._reported(update, delivery))
            else:
                others.append(functools.partial(self._hand_on, delivery, update, ledger))
        if ours:
            await self._apply(ours)
        # Behind what one of ours may make fail: then all come again, one by one, and nobody is to be told twice.
        for each in others:
            await each()
        await self._bus.acknowledge(batch)

    async def _hand_on(self, delivery: Delivery, update: Update, ledger: str) -> None:
        if not await self._elsewhere.hand_on_update(delivery, ledger):
            self._note_gone(ledger, update)
            await self._answer(delivery, GONE)

    async def _apply(self, reported: Sequence[Reported]) -> list[dict[str, object]]:
        answers, consequences = await self._ledger.updating(reported)
        self._follow(consequences)
        taken = sum(answer["accepted"] is True for answer in answers)
        self.taken += taken
        self.refused += len(answers) - taken
        return answers

    def _note_gone(self, ledger: str, update: Update) -> None:
        self.note_unread("unknown-ledger")
        log.warning(
            "update_refused", execution_id=update.execution_id, reason="unknown-ledger", ledger=ledger
        )

    def _reported(self, update: Update, delivery: Delivery | None = None) -> Reported:
        secret = update.token.removeprefix(f"{self._identity}.")
        update = update.model_copy(update={"token": secret})
        if delivery is None:
            return Reported(update)
        return Reported(update, delivery.reply_to, delivery.correlation_id)

    # --- commands ----------------------------------------------------------------------------------------

    async def _take_commands(self, batch: Sequence[Delivery]) -> None:
        controls: list[tuple[Control, Delivery]] = []
        refused: list[tuple[Delivery, RequestRefused]] = []
        for delivery in batch:
            try:
                controls.append((decode_control(delivery.body, self.max_body_bytes), delivery))
            except RequestRefused as error:
                refused.append((delivery, error))
        if controls:
            await self._carry_out(controls)
        for delivery, why in refused:  # behind those, as with updates
            await self._refuse(delivery, why, _CONTROL)
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
                await self._elsewhere.hand_on_command(delivery)

    # --- between daemons ---------------------------------------------------------------------------------

    async def _take_handed_on(self, batch: Sequence[Delivery]) -> None:
        for delivery in batch:
            if self._elsewhere.is_own(delivery):
                await self._bus.acknowledge([delivery])
                continue
            take = self._take_updates if delivery.headers.get(KIND) == UPDATE else self._take_commands
            await take([delivery])

    async def _leave_out(self, action: str, delivery: Delivery, error: RequestRefused) -> None:
        sent = delivery
        if is_handed_on(
            delivery
        ):  # sent again, it is to come by the queue that all share: nobody else may use ours
            is_update = delivery.headers.get(KIND) == UPDATE
            action, queue = (_UPDATES, self._names.updates) if is_update else (_CONTROL, self._names.control)
            sent = dataclasses.replace(delivery, routing_key=queue)
        await self._refuse(sent, error, action)
        await self._bus.acknowledge([delivery])

    async def _refuse(self, delivery: Delivery, error: RequestRefused, action: str) -> None:
        """Kept as a dead letter; whoever waits for an answer gets one."""
        await self._ledger.accepting([Refusal(error, delivery, action)])
        if action == _UPDATES:
            self.note_unread("malformed")
        log.warning("message_refused", queue=action, reason=error.code, detail=error.detail)
        await self._answer(delivery, f"{error.code}: {error.detail}")

    async def _answer(self, delivery: Delivery, reason: str) -> None:
        """Tell whoever waits that it is refused; once, as nothing remembers it."""
        if delivery.reply_to:
            body = to_json({"accepted": False, "reason": reason})
            message = Outgoing(0, "", delivery.reply_to, body, None, delivery.correlation_id)
            try:
                seen(await self._bus.publish([message]))
            except ConnectionError as lost:
                log.debug("answer_lost", reason=str(lost))
