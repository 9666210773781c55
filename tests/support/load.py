"""A daemon under a load in which everything happens that a metric tells of."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterable
from typing import Any

import aio_pika
import httpx

from tests.support.amqp import Client
from tests.support.http import client_of, free_port
from tests.support.process import DaemonProcess

_SEEN_S = 2.0
"""How long a status lasts that is to be seen by who looks each second."""
ACTIONS = f"""
[actions.watchful]
executor = "tests.support.executors:Farm"
update_timeout_s = 0.5
timeout_grace_s = 600
[actions.watchful.retry]
attempts = 2
first_s = {_SEEN_S}
[actions.locked]
executor = "tests.support.executors:Locked"
"""


WORKFLOW = """
name: delivery
variables: {fails: 0}
stages:
  - {name: slow, action: slow, configuration: {seconds: 1.0}}
  - {name: last, action: staged, configuration: {fails: "{{ workflow.fails }}"}}
"""


class Load:
    """Sends jobs of all kinds, again and again.

    Args:
        client: submits them, and hears.
        port: the daemon's, for updates.
    """

    def __init__(self, client: Client, port: int) -> None:
        self._client = client
        self._http = client_of(port)

    async def run(self, pauses_s: Iterable[float]) -> None:
        """Until cancelled: rounds, with these pauses between their beginnings, whatever becomes of each."""
        async with self._http, asyncio.TaskGroup() as rounds:
            await self._lock("acquire", owner="hoarder", locks=[exclusive("hoarded")], leaseSeconds=3600)
            for number, pause_s in enumerate(pauses_s, 1):
                rounds.create_task(self._round(str(number)), name=f"round {number}")
                await asyncio.sleep(pause_s)

    async def _round(self, name: str) -> None:
        submit = self._client.submit
        for kind in ("a", "b", "c"):
            await submit("quick", f"quick-{name}-{kind}")
        await submit("quick", f"quick-{name}-a")  # a duplicate
        await submit("slow", f"slow-{name}", {"seconds": 2.0, "steps": 4})
        await submit("blocking", f"blocking-{name}", {"seconds": 0.3, "steps": 3})
        await submit("misbehave", f"misbehave-{name}", {"how": "raise"})
        await submit("broken", f"broken-{name}", {"how": "os-exit"})
        for kind, mode in (("a", "EXCLUSIVE"), ("b", "EXCLUSIVE"), ("c", "SHARED")):
            lock = exclusive(f"asset/{int(name) % 2}") | {"mode": mode}
            await submit("locked", f"locked-{name}-{kind}", {"seconds": 0.4}, locks=[lock])
        await self._client.start_workflow(
            "delivery", f"w-{name}", variables={"fails": int(int(name) % 4 == 0)}
        )
        await self._client.publish("quick", b"no json")
        await asyncio.gather(
            self._outside(f"farm-{name}"),
            self._late(f"watchful-{name}", exclusive(f"late/{int(name) // 2 % 8}")),
            self._locks(name),
        )

    async def _outside(self, name: str) -> None:
        """Work outside as it should be, but for somebody who has no right to end it."""
        token = await self._launch("farm", name)
        await self._update(name, {"status": "RUNNING", "progress": 50, "token": token})
        await self._update(name, {"status": "COMPLETED", "token": "another's"})
        await self._update(name, {"status": "COMPLETED", "token": token})

    async def _late(self, name: str, lock: dict[str, str]) -> None:
        """Fails; its next attempt is silent for too long, and completes all the same. With a lock, for all of it."""
        first = await self._launch("watchful", name, locks=[lock])
        await self._update(name, {"status": "FAILED", "message": "for the first time", "token": first})
        second = await self._token(name, 2)
        await self._update(name, {"status": "COMPLETED", "token": first})  # fenced
        await self._client.until(lambda: "TIMED_OUT" in self._client.statuses(name), 60)
        await asyncio.sleep(_SEEN_S)
        await self._update(name, {"status": "COMPLETED", "token": second})

    async def _locks(self, name: str) -> None:
        """A client that forgets what it holds, another that never held it; jobs that are robbed, or give up waiting."""
        left, robbed = exclusive(f"left/{name}"), exclusive(f"robbed/{name}")
        await self._lock("acquire", owner="forgetful", locks=[left], leaseSeconds=1)
        await self._lock("renew", owner="stranger", locks=[left], leaseSeconds=1)
        waits = {"locks": [exclusive("hoarded")], "timeouts": {"lock": 0.5}}
        await self._client.submit("locked", f"impatient-{name}", {}, **waits)
        await self._client.submit("locked", f"robbed-{name}", {"seconds": 600}, locks=[robbed])
        await self._client.until(lambda: "RUNNING" in self._client.statuses(f"robbed-{name}"), 60)
        await self._lock("force-release", locks=[robbed], reason="for the load", by="load")

    async def _lock(self, operation: str, **more: Any) -> None:
        """Ask the lock service; nobody reads the answer."""
        channel = self._client.channel
        answers = await channel.declare_queue(exclusive=True, arguments={"x-max-length": 1})
        message = aio_pika.Message(
            json.dumps({"operation": operation, **more}).encode(),
            reply_to=answers.name,
            correlation_id=operation,
        )
        await channel.default_exchange.publish(message, f"{self._client.prefix}.locks")

    async def _launch(self, action: str, name: str, **more: object) -> str:
        await self._client.submit(action, name, **more)
        return await self._token(name, 1)

    async def _token(self, name: str, attempt: int) -> str:
        """An attempt's token, which the executor tells when it has launched the work."""

        def launched() -> list[dict[str, object]]:
            told = self._client.of(name)
            return [each for each in told if each.get("externalId") and each["attempt"] == attempt]

        await self._client.until(lambda: bool(launched()), 60)
        return str(launched()[0]["message"])

    async def _update(self, name: str, update: dict[str, object]) -> None:
        with contextlib.suppress(httpx.TransportError):  # the daemon may be on its way down
            await self._http.post(f"/executions/{name}/updates", json=update)


def exclusive(resource: str) -> dict[str, str]:
    """A demand for a lock."""
    return {"resource": resource, "mode": "EXCLUSIVE"}


@contextlib.asynccontextmanager
async def under_load(daemon: DaemonProcess, pauses_s: Iterable[float]) -> AsyncIterator[int]:
    """A daemon that has much to do, in rounds with these pauses between them; where its HTTP port is."""
    port = free_port()
    # Leases end when they end: nobody of this load has a right to be waited for.
    locks = {"takeover_grace_s": 0}
    folder = daemon.folder / "data" / "workflows"
    folder.mkdir(parents=True)
    (folder / "delivery.yaml").write_text(WORKFLOW)
    daemon.configure(ACTIONS, slots={"total": 16}, logging={"level": "info"}, locks=locks)
    daemon.start(JEF_HTTP_PORT=str(port))
    async with Client(daemon.url, daemon.prefix) as client:
        load = asyncio.create_task(Load(client, port).run(pauses_s), name="load")
        try:
            yield port
        finally:
            load.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await load
