"""A worker of a render farm: takes work from a queue, tells how it goes. It knows AMQP, and nothing of jef_daemon.

    python external_worker.py --url amqp://guest:guest@127.0.0.1:5672/ --queue render-farm --updates jef.updates

Each piece of work is a JSON object with an `executionId` and a `token`; whatever is told of it carries both, to the
queue `jef.updates`. Each update names a `reply_to`, and the answer says whether it was taken, and whether somebody
wants the work cancelled. An update that is not taken means that nobody waits for this work any more: it took too
long and is done by somebody else, or was cancelled. Any language with an AMQP library does the same in as many lines.

It needs aio-pika. Answers go to standard output as JSON lines.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import uuid
from typing import Any

import aio_pika
from aio_pika.abc import AbstractChannel, AbstractIncomingMessage


class Worker:
    """Does all that is in the queue, at the same time.

    Args:
        channel: to the broker.
        updates: the daemon's queue.
    """

    def __init__(self, channel: AbstractChannel, updates: str) -> None:
        self._channel = channel
        self._updates = updates
        self._answers: dict[str, asyncio.Future[dict[str, Any]]] = {}
        self._reply_to = ""
        self._at_work: set[asyncio.Task[None]] = set()

    async def run(self, queue: str) -> None:
        """Work until killed."""
        replies = await self._channel.declare_queue(exclusive=True)
        self._reply_to = replies.name
        await replies.consume(self._hear, no_ack=True)
        work = await self._channel.declare_queue(queue, durable=True)
        async for message in work.iterator():
            # Acknowledged when it is taken, not when it is done: the broker would take long work back. If we die, the
            # daemon hears nothing from us any more, and has it done again.
            await message.ack()
            task = asyncio.create_task(self._do(json.loads(message.body)))
            self._at_work.add(task)
            task.add_done_callback(self._at_work.discard)

    async def _do(self, work: dict[str, Any]) -> None:
        about = {"executionId": work["executionId"], "token": work["token"]}
        steps = work["steps"]
        for step in range(steps):
            told = about | {"status": "RUNNING", "progress": 100 * step // steps, "message": f"frame {step}"}
            answer = await self._tell(told)
            if not answer["accepted"]:
                return
            if answer["cancelRequested"]:
                await self._tell(about | {"status": "CANCELLED", "message": "stopped by the farm"})
                return
            await asyncio.sleep(work["step_s"])
        frames = {"frames": steps}
        await self._tell(about | {"status": "COMPLETED", "result": "rendered", "jobContextVariables": frames})

    async def _tell(self, update: dict[str, Any]) -> dict[str, Any]:
        """Send an update; returns the answer. One that does not come yet is waited for: the daemon may be away."""
        correlation_id = uuid.uuid4().hex
        answered = self._answers[correlation_id] = asyncio.get_running_loop().create_future()
        message = aio_pika.Message(
            json.dumps(update).encode(),
            delivery_mode=2,
            content_type="application/json",
            reply_to=self._reply_to,
            correlation_id=correlation_id,
        )
        await self._channel.default_exchange.publish(message, self._updates)
        answer: dict[str, Any] = await answered
        told = {"executionId": update["executionId"], "status": update["status"], **answer}
        print(json.dumps(told), flush=True)
        return answer

    async def _hear(self, message: AbstractIncomingMessage) -> None:
        answered = self._answers.pop(message.correlation_id or "", None)
        if answered is not None and not answered.done():
            answered.set_result(json.loads(message.body))


async def main() -> None:
    """Connect and work."""
    parser = argparse.ArgumentParser(description="a worker of a render farm")
    parser.add_argument("--url", required=True)
    parser.add_argument("--queue", default="render-farm")
    parser.add_argument("--updates", default="jef.updates")
    options = parser.parse_args()
    connection = await aio_pika.connect(options.url)
    async with connection:
        channel = await connection.channel()
        await Worker(channel, options.updates).run(options.queue)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main())
