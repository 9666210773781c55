"""A foreign client: plain AMQP, nothing of the daemon's but the wire protocol."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import defaultdict
from collections.abc import Callable
from typing import Any, Self

import aio_pika
from aio_pika.abc import AbstractChannel, AbstractIncomingMessage

ENDS = {"COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT"}
ACTIONS = (
    "quick",
    "slow",
    "staged",
    "probe",
    "proxy",
    "picture",
    "review",
    "clean",
    "blocking",
    "again",
    "nap",
    "checksum",
    "copy",
    "http",
    "misbehave",
    "broken",
    "watchful",
    "held",
    "farm",
    "tidy",
    "tidy-blocking",
    "fixed",
    "stubborn",
    "polled",
    "locked",
    "locked-blocking",
    "locked-command",
    "resumed",
    "traced",
    "traced-blocking",
    "traced-command",
    "probe",
    "later",
)


class Client:
    """Submits requests, keeps every notification.

    The queue of notifications is durable and bound before anything is published, so that nothing is missed
    whatever happens to daemon or broker.

    Args:
        url: the broker's.
        prefix: the daemon's.
        queue_type: of the queue of notifications.
    """

    def __init__(self, url: str, prefix: str, queue_type: str = "quorum") -> None:
        self._queue_type = queue_type
        self.url = url
        self.prefix = prefix
        self.told: list[dict[str, Any]] = []
        self.told_of_workflows: list[dict[str, Any]] = []
        self._of: defaultdict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
        self._sorted_in = 0
        self._changed = asyncio.Event()
        self._connection: aio_pika.abc.AbstractRobustConnection
        self.channel: AbstractChannel

    async def __aenter__(self) -> Self:
        # A broker that has just started may let a request hang until its queues have leaders.
        for patience_s in (5, 5, 10, 20, 60):
            try:
                async with asyncio.timeout(patience_s):
                    return await self._connect()
            except (TimeoutError, ConnectionError, aio_pika.exceptions.AMQPError):
                continue
        raise AssertionError(f"the broker at {self.url} cannot be used")

    async def _connect(self) -> Self:
        self._connection = await aio_pika.connect_robust(self.url)
        self.channel = await self._connection.channel()
        # The same declarations as the wire protocol's; the daemon finds them equal.
        status = await self.channel.declare_exchange(f"{self.prefix}.status", "topic", durable=True)
        queue = await self.channel.declare_queue(
            f"{self.prefix}.told", durable=True, arguments={"x-queue-type": self._queue_type}
        )
        await queue.bind(status, "#")
        workflows = await self.channel.declare_exchange(
            f"{self.prefix}.workflow-status", "topic", durable=True
        )
        await queue.bind(workflows, "#")
        await queue.consume(self._take)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._connection.close()

    async def _take(self, message: AbstractIncomingMessage) -> None:
        told = json.loads(message.body)
        (self.told if "executionId" in told else self.told_of_workflows).append(told)
        await message.ack()
        self._changed.set()

    async def publish(
        self,
        action: str,
        body: bytes,
        *,
        headers: dict[str, Any] | None = None,
        reply_to: str | None = None,
        correlation_id: str | None = None,
    ) -> None:
        """Publish any bytes to the jobs exchange, confirmed."""
        exchange = await self.channel.get_exchange(f"{self.prefix}.jobs", ensure=False)
        message = aio_pika.Message(
            body,
            delivery_mode=2,
            content_type="application/json",
            headers=headers or {},
            reply_to=reply_to,
            correlation_id=correlation_id,
        )
        await exchange.publish(message, action)

    async def submit(self, action: str, execution_id: str, configuration: Any = None, **more: Any) -> None:
        """Publish a request."""
        request = {"executionId": execution_id, "configuration": configuration or {}, **more}
        await self.publish(action, json.dumps(request).encode())

    async def start_workflow(self, workflow: str, workflow_id: str, **more: Any) -> None:
        """Publish a request for a workflow."""
        request = {"workflowId": workflow_id, "workflow": workflow, **more}
        await self.send("workflows", request)

    async def send(self, queue: str, body: dict[str, Any], **properties: Any) -> None:
        """Publish to a queue of the daemon's."""
        message = aio_pika.Message(json.dumps(body).encode(), delivery_mode=2, **properties)
        await self.channel.default_exchange.publish(message, f"{self.prefix}.{queue}")

    async def tell(self, routing_key: str, told: dict[str, Any]) -> None:
        """Publish a status notification, as another executor does."""
        exchange = await self.channel.get_exchange(f"{self.prefix}.status", ensure=False)
        await exchange.publish(aio_pika.Message(json.dumps(told).encode(), delivery_mode=2), routing_key)

    async def until_answered(self, queue: Any, within_s: float = 30) -> dict[str, Any]:
        """The next answer in a queue of our own."""
        async with asyncio.timeout(within_s):
            while (message := await queue.get(fail=False, no_ack=True)) is None:
                await asyncio.sleep(0.02)
        return dict(json.loads(message.body))

    async def end_of_workflow(self, workflow_id: str, within_s: float = 30) -> dict[str, Any]:
        """The final notification of a workflow."""
        try:
            await self.until(
                lambda: any(told["status"] in ENDS for told in self.of_workflow(workflow_id)), within_s
            )
        except TimeoutError:
            raise AssertionError(
                f"no end of {workflow_id} was told: {self.of_workflow(workflow_id)}"
            ) from None
        return next(told for told in reversed(self.of_workflow(workflow_id)) if told["status"] in ENDS)

    def of_workflow(self, workflow_id: str) -> list[dict[str, Any]]:
        """What was told of a workflow, repetitions dropped, in order."""
        seen = {
            told["sequence"]: told for told in self.told_of_workflows if told["workflowId"] == workflow_id
        }
        return [seen[number] for number in sorted(seen)]

    async def until(self, is_true: Callable[[], bool], within_s: float = 60) -> None:
        """Wait until something is true of what was told."""
        async with asyncio.timeout(within_s):
            while not is_true():
                self._changed.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), 0.2)

    async def end_of(self, execution_id: str, within_s: float = 60) -> dict[str, Any]:
        """The final notification of a job."""
        try:
            await self.until(lambda: any(told["status"] in ENDS for told in self.of(execution_id)), within_s)
        except TimeoutError:
            raise AssertionError(f"no end of {execution_id} was told: {self.of(execution_id)}") from None
        return next(told for told in reversed(self.of(execution_id)) if told["status"] in ENDS)

    def of(self, execution_id: str) -> list[dict[str, Any]]:
        """What was told of a job, repetitions dropped as a reader of the protocol does, in order."""
        # Some tests ask after each notification for each of hundreds of jobs.
        for told in self.told[self._sorted_in :]:
            self._of[told["executionId"]].setdefault(told["sequence"], told)
        self._sorted_in = len(self.told)
        seen = self._of[execution_id]
        return [seen[number] for number in sorted(seen)]

    def remember(self, told: list[dict[str, Any]]) -> None:
        """What another client was told before."""
        self.told[:0] = told
        self._sorted_in = 0

    def statuses(self, execution_id: str) -> list[str]:
        """The statuses of a job, in order."""
        return [told["status"] for told in self.of(execution_id)]

    async def dead_letters(self, count: int, within_s: float = 20) -> list[AbstractIncomingMessage]:
        """So many dead letters."""
        queue = await self.channel.get_queue(f"{self.prefix}.dead-letters", ensure=False)
        found: list[AbstractIncomingMessage] = []
        async with asyncio.timeout(within_s):
            while len(found) < count:
                message = await queue.get(fail=False)
                if message is None:
                    await asyncio.sleep(0.05)
                    continue
                await message.ack()
                found.append(message)
        return found


async def delete_all(url: str, prefix: str) -> None:
    """Delete what a test has made on the broker."""
    connection = await aio_pika.connect(url)
    try:
        channel = await connection.channel()
        queues = [
            "told",
            "unroutable",
            "dead-letters",
            "locks",
            "updates",
            "control",
            "workflows",
            "coordinator",
        ]
        for name in (*queues, *(f"jobs.{action}" for action in ACTIONS)):
            await channel.queue_delete(f"{prefix}.{name}")
        exchanges = ["jobs", "unroutable", "dead", "status", "daemons", "watched", "lock-keeper"]
        for name in (*exchanges, "workflows", "workflow-status", "workflow-keeper"):
            await channel.exchange_delete(f"{prefix}.{name}")
    finally:
        await connection.close()
