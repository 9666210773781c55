"""The peer: a plain aio-pika handler. Validates, publishes three confirmed notifications, acknowledges.

It keeps no ledger: a crash between two of its lines loses or repeats what was in them. Usage:
`plain_handler.py AMQP_URL PREFIX WINDOW`.
"""

from __future__ import annotations

import asyncio
import json
import sys
from datetime import UTC, datetime

import aio_pika
import uvloop
from aio_pika.abc import AbstractIncomingMessage

from jef_daemon.messages import JobRequest


async def main(url: str, prefix: str, window: int) -> None:
    """Consume until killed."""
    connection = await aio_pika.connect_robust(url)
    consuming = await connection.channel()
    await consuming.set_qos(prefetch_count=window)
    publishing = await connection.channel(publisher_confirms=True)
    dead = await publishing.declare_exchange(f"{prefix}.dead", "fanout", durable=True)
    jobs = await publishing.declare_exchange(f"{prefix}.jobs", "topic", durable=True)
    status = await publishing.declare_exchange(f"{prefix}.status", "topic", durable=True)
    queue = await consuming.declare_queue(
        f"{prefix}.jobs.nothing",
        durable=True,
        arguments={"x-queue-type": "quorum", "x-dead-letter-exchange": dead.name},
    )
    await queue.bind(jobs, "nothing")

    async def tell(request: JobRequest, sequence: int, word: str, progress: int, **more: object) -> None:
        body = {
            "executionId": request.execution_id,
            "workflowId": request.workflow_id,
            "progress": progress,
            "message": "",
            "status": word,
            "action": "nothing",
            "attempt": 1,
            "sequence": sequence,
            "timestamp": datetime.now(UTC).isoformat(timespec="milliseconds"),
            **more,
        }
        message = aio_pika.Message(
            json.dumps(body).encode(),
            content_type="application/json",
            delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
        )
        await status.publish(message, f"nothing.{word.lower()}")

    async def handle(message: AbstractIncomingMessage) -> None:
        request = JobRequest.model_validate_json(message.body)
        await tell(request, 1, "QUEUED", 0)
        await tell(request, 2, "RUNNING", 0)
        variables = {"width": 320}
        await tell(
            request,
            3,
            "COMPLETED",
            100,
            result="done",
            jobContextVariables=variables,
            workflowContextVariables={},
        )
        await message.ack()

    await queue.consume(handle)
    print("ready", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
