"""A real ledger on a clock that moves when told, driven as the daemon's stages drive it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from jef_daemon.events import Event, FellSilent, GraceEnded
from jef_daemon.ledger import Entry, Policy, Reader, SqlLedger
from jef_daemon.lifecycle import Execution
from jef_daemon.lock.messages import LockReply
from jef_daemon.messages import Control, Update
from jef_daemon.names import Names
from jef_daemon.ports import (
    Accepted,
    Applied,
    Arrival,
    Capacity,
    Claimed,
    Command,
    Consequences,
    Heard,
    Outgoing,
    Reported,
)
from jef_daemon.retry import RetryPolicy
from tests.support.clock import ManualClock

LOCK = ("asset/1", "EXCLUSIVE")
ASYNC = Policy(hooks=frozenset({"poll", "cancel", "resume"}))
"""What is allowed of an action `f` whose work runs outside."""
POLICIES = {
    "a": Policy(),
    "f": ASYNC,
    "plain": Policy(),
    "fixed": Policy(cancellable=False),
    "again": Policy(RetryPolicy(3, 10.0, 2.0, 300.0, 0.0, frozenset({"Hopeless"}), on_timeout=True)),
}


class Life:
    """One ledger over its lives: open, used, closed or crashed, opened again.

    Args:
        url: the ledger's.
        clock: its time.
        policies: what is allowed of each action.
    """

    def __init__(self, url: str, clock: ManualClock, policies: Mapping[str, Policy] = POLICIES) -> None:
        self.url = url
        self.clock = clock
        self.policies = policies
        self.ledger: SqlLedger

    async def open(self) -> None:
        self.ledger = SqlLedger(self.url, Names("t"), self.clock, max_variables_bytes=200)
        await self.ledger.open()
        self.ledger.govern(self.policies)

    async def close(self) -> None:
        await self.ledger.close()

    async def reopen(self) -> None:
        await self.close()
        await self.open()

    # --- what the stages do ------------------------------------------------------------------------------

    async def arrive(self, execution_id: str, action: str = "a", **fields: Any) -> Accepted:
        """A request arrives."""
        [word] = await self.arrive_all([execution_id], action, **fields)
        return word

    async def arrive_all(self, ids: Sequence[str], action: str = "a", **fields: Any) -> list[Accepted]:
        """Requests arrive together."""
        locks = fields.pop("locks", ())
        attempts = fields.pop("max_attempts", self.policies[action].retry.attempts)
        arrivals = []
        for name in ids:
            terms = {"token": f"token-{name}", "max_attempts": attempts} | fields
            execution = Execution(name, action, wants_locks=bool(locks), **terms)
            arrivals.append(Arrival(execution, json.dumps({"executionId": name}), locks))
        return await self.ledger.accept(arrivals)

    async def claim(self, total: int = 1000) -> list[Claimed]:
        """Free slots for everything."""
        return await self.ledger.claim(Capacity(total, dict.fromkeys(self.policies, total)))

    async def apply(self, execution_id: str, *events: Event) -> list[Applied]:
        return await self.ledger.apply(execution_id, None, events)

    async def run(self, execution_id: str, action: str = "a", *events: Event, **fields: Any) -> None:
        """It arrives, starts, and something becomes of it."""
        await self.arrive(execution_id, action, **fields)
        await self.claim()
        if events:
            await self.apply(execution_id, *events)

    async def fall_silent(self, execution_id: str, *, close: bool = False) -> None:
        await self.apply(execution_id, FellSilent(), *([GraceEnded()] if close else []))

    async def command(
        self, command: str, execution_id: str | None = None, workflow_id: str | None = None, **more: Any
    ) -> tuple[dict[str, Any], Consequences]:
        """A command, as the daemon carries it out; returns the answer and what follows, all pages together."""
        wanted = {"command": command, "executionId": execution_id, "workflowId": workflow_id, **more}
        commands = [Command(Control.model_validate_json(json.dumps(wanted)), "operator:ann", "asker", "c")]
        total = Consequences()
        while commands:
            found = await self.ledger.commanding(commands)
            total.stops += found.stops
            total.queued += found.queued
            total.left += found.left
            total.calls = total.calls or found.calls
            total.unknown |= found.unknown
            commands = found.more
        return (await self.answers())[-1], total

    async def update(self, execution_id: str, status: str, token: str = "", **more: Any) -> dict[str, Any]:
        """An update, with the attempt's token unless another is given; returns its answer."""
        wanted = {"executionId": execution_id, "status": status, "token": token or self.token(execution_id)}
        [answer], _ = await self.ledger.updating(
            [Reported(Update.model_validate_json(json.dumps(wanted | more)))]
        )
        return dict(answer)

    async def hear(self, execution_id: str, status: str, asked_with: str = "", **fields: Any) -> None:
        """The lock service answers about the attempt that asked last, or with a correlation id."""
        if not asked_with:
            asked = [message for message in await self.outbox() if message.routing_key == "t.locks"]
            asked_with = str(
                [m for m in asked if json.loads(m.body)["owner"] == execution_id][-1].correlation_id
            )
        reply = LockReply.model_validate_json(json.dumps({"status": status, "owner": execution_id, **fields}))
        await self.ledger.hearing([Heard(reply, asked_with)])

    async def wait_for_lock(self, execution_id: str, asked_with: str = "") -> None:
        place = {"resource": LOCK[0], "mode": LOCK[1], "position": 1, "holders": ["other"]}
        await self.hear(execution_id, "WAITING", asked_with, **place)

    async def grant(self, execution_id: str, asked_with: str = "") -> None:
        until = datetime.fromtimestamp(self.clock.time + 3600, UTC).isoformat()
        grant = {"resource": LOCK[0], "mode": LOCK[1], "fencingToken": 7, "leaseUntil": until}
        await self.hear(execution_id, "GRANTED", asked_with, grants=[grant])

    # --- what can be seen --------------------------------------------------------------------------------

    async def outbox(self) -> list[Outgoing]:
        return await self.ledger.outbox(0, 1_000_000)

    async def told(self, execution_id: str | None = None) -> list[dict[str, Any]]:
        """Notifications, in order."""
        bodies = [
            json.loads(message.body) for message in await self.outbox() if message.exchange == "t.status"
        ]
        return [body for body in bodies if execution_id in {None, body["executionId"]}]

    async def answers(self, to: str = "asker") -> list[dict[str, Any]]:
        return [json.loads(message.body) for message in await self.outbox() if message.routing_key == to]

    async def locks_asked(self, execution_id: str) -> list[str]:
        """Operations sent to the lock service, in order."""
        bodies = [
            json.loads(message.body) for message in await self.outbox() if message.routing_key == "t.locks"
        ]
        return [body["operation"] for body in bodies if body["owner"] == execution_id]

    def find(self, execution_id: str) -> Execution:
        reader = Reader(self.url)
        try:
            return reader.find(execution_id)
        finally:
            reader.close()

    def status(self, execution_id: str) -> str:
        return self.find(execution_id).place.value

    def token(self, execution_id: str) -> str:
        return self.find(execution_id).token

    def events(self, execution_id: str) -> list[str]:
        """The history: event by actor."""
        return [f"{entry.event} by {entry.actor}" for entry in self.history(execution_id)]

    def history(self, execution_id: str) -> list[Entry]:
        reader = Reader(self.url)
        try:
            return reader.history(execution_id)
        finally:
            reader.close()

    def rows(self, table: str) -> Sequence[Any]:
        """All of a table."""
        import sqlite3

        with sqlite3.connect(self.url.removeprefix("sqlite:///")) as database:
            return database.execute(f"SELECT * FROM {table}").fetchall()
