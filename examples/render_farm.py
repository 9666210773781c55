"""Jobs whose work runs somewhere else: `start` hands it over and returns, updates tell how it goes.

The work is done by `external_worker.py`, a program of its own that shares nothing with the daemon but the broker.
In the configuration:

    [actions.render]
    executor = "render_farm:RenderFarm"
    url = "amqp://guest:guest@127.0.0.1:5672/"
    update_timeout_s = 30            # silent for longer: TIMED_OUT
    timeout_grace_s = 300            # and so long a late update still counts
    retry = { attempts = 2, on_timeout = true }

The executor has no `cancel`: a worker learns from the answer to its next update that it is to stop.
"""

from __future__ import annotations

import asyncio
import json

import aio_pika
from pydantic import BaseModel

from jef_daemon import AsyncActionExecutor, ExecutionContext


class RenderFarm(AsyncActionExecutor):
    """Puts the work into the farm's queue, with the token by which the farm may tell of it."""

    action = "render"

    class Settings(BaseModel):
        url: str
        queue: str = "render-farm"

    class Configuration(BaseModel):
        steps: int = 10
        step_s: float = 1.0

    def __init__(self, settings: BaseModel | None = None) -> None:
        super().__init__(settings)
        self._channel: aio_pika.abc.AbstractChannel | None = None
        self._connecting = asyncio.Lock()

    async def start(self, context: ExecutionContext[Configuration]) -> str:
        """Hand the work over. If this raises, the job is FAILED, and tried again where the policy says so."""
        work = context.configuration.model_dump()
        work |= {"executionId": context.execution_id, "token": context.token}
        message = aio_pika.Message(json.dumps(work).encode(), delivery_mode=2)
        await (await self._connect()).default_exchange.publish(message, self.settings.queue)
        return f"{context.execution_id}/{context.attempt}"

    async def _connect(self) -> aio_pika.abc.AbstractChannel:
        """One connection for all jobs."""
        async with self._connecting:
            if self._channel is None:
                connection = await aio_pika.connect_robust(self.settings.url)
                self._channel = await connection.channel()
                await self._channel.declare_queue(self.settings.queue, durable=True)
        return self._channel
