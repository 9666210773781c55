"""The way from a daemon's ledger to the lock service and back, without a broker: when the test says so, or again."""

from __future__ import annotations

import json
from typing import Any

from jef_daemon.ledger import SqlLedger
from jef_daemon.lock import wire
from jef_daemon.names import Names
from jef_daemon.ports import Heard, Lost, Outgoing

NAMES = Names("t")


class Wire:
    """The broker between daemons and the lock service, a message at a time.

    Args:
        service: the ledger that keeps the locks, a daemon's too.
        others: of further daemons.
    """

    def __init__(self, service: SqlLedger, *others: SqlLedger) -> None:
        self.service = service
        self.ledgers = (service, *others)
        self._seen = dict.fromkeys(self.ledgers, 0)
        self.requests: list[Outgoing] = []
        """All that were sent to the service, in order."""
        self._served = 0
        self._answers: dict[str, list[Outgoing]] = {}
        """Not heard yet, by queue."""
        self.heard: list[Outgoing] = []
        self.told: list[dict[str, Any]] = []
        self.returned: list[Outgoing] = []
        """Jobs that went back to the broker."""
        self.log: list[str] = []
        """Purpose of each message, in the order of the outbox."""

    async def carry(self) -> None:
        """Take what is in the outboxes."""
        for ledger in self.ledgers:
            for message in await ledger.outbox(self._seen[ledger], 100_000):
                self._seen[ledger] = message.id
                if message.routing_key == NAMES.locks:
                    self.requests.append(message)
                    self.log.append(f"{json.loads(message.body)['operation']} {message.correlation_id}")
                elif message.routing_key.startswith(NAMES.lock_replies("")):
                    self._answers.setdefault(message.routing_key, []).append(message)
                elif message.exchange == NAMES.jobs:
                    self.returned.append(message)
                    self.log.append(f"job {json.loads(message.body)['executionId']}")
                else:
                    self.told.append(json.loads(message.body))

    async def serve(self) -> None:
        """Let the service decide what it has not seen yet."""
        await self.carry()
        fresh, self._served = self.requests[self._served :], len(self.requests)
        await self.repeat(*fresh)

    async def repeat(self, *requests: Outgoing) -> None:
        """Deliver requests, perhaps once more."""
        decoded = [wire.decode(r.body, 10_000, r.reply_to, r.correlation_id) for r in requests]
        await self.service.deciding(decoded)

    async def hear(self) -> list[Lost]:
        """Let every daemon hear what it was answered."""
        await self.carry()
        lost: list[Lost] = []
        for ledger in self.ledgers:
            answers = self._answers.pop(NAMES.lock_replies(ledger.identity), [])
            self.heard += answers
            lost += await ledger.hearing([heard(answer) for answer in answers])
        await self.carry()
        return lost

    async def settle(self) -> None:
        """To and fro until nothing more is said."""
        await self.carry()
        while self._answers or self._served < len(self.requests):
            await self.serve()
            await self.hear()

    def statuses(self, execution_id: str = "1") -> list[str]:
        return [each["status"] for each in self.told if each.get("executionId") == execution_id]

    def asked(self) -> list[str]:
        """`operation correlation id` of each request."""
        return [f"{json.loads(r.body)['operation']} {r.correlation_id}" for r in self.requests]


def heard(answer: Outgoing) -> Heard:
    return Heard(wire.decode_reply(answer.body), answer.correlation_id or "")
