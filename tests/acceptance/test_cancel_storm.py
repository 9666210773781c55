"""A thousand cancels at random moments over a thousand jobs of all kinds: each ends once, and nothing is left."""

from __future__ import annotations

import asyncio
import functools
import json
import random
import sqlite3
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import aio_pika
import psutil

from tests.support.amqp import ENDS, Client
from tests.support.process import DaemonProcess

JOBS = 1000
SUBMITTED_S, CANCELLED_S = 8.0, 16.0
"""Jobs come, and are cancelled, at random within these times: some before they come, some after they ended."""
_UNRELEASED = "job_locks WHERE state <> 'released'"
KINDS: dict[str, tuple[str, int]] = {
    "coroutine": ("slow", 250),
    "locked": ("slow", 150),
    "later": ("slow", 100),
    "blocking": ("blocking", 75),
    "command": ("nap", 125),
    "updated": ("farm", 200),
    "polled": ("polled", 100),
}
"""Action, and how many of a thousand."""


class Storm:
    """Submits, cancels, and is the farm on which work runs outside. Speaks plain AMQP.

    Args:
        client: hears what is told.
        seed: of all that is random.
    """

    def __init__(self, client: Client, seed: int) -> None:
        self.client = client
        self.lot = random.Random(seed)
        self.answers: dict[str, list[dict[str, Any]]] = {}
        self.jobs = [f"{kind}-{number}" for kind, (_, count) in KINDS.items() for number in range(count)]
        self._handled = 0
        self._farm: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """The storm, until every job has told its end."""
        replies = await self.client.channel.declare_queue(exclusive=True)
        await replies.consume(self._answered, no_ack=True)
        async with asyncio.TaskGroup() as storm:
            farming = storm.create_task(self._run_farm())
            async with asyncio.TaskGroup() as all_of_it:
                for name in self.jobs:
                    all_of_it.create_task(self._at(SUBMITTED_S, functools.partial(self._submit, name)))
                    all_of_it.create_task(
                        self._at(CANCELLED_S, functools.partial(self._cancel, name, replies.name))
                    )
            await self.client.until(lambda: len(self.answers) == JOBS, 60)
            await self.client.until(lambda: len(self.ended()) == JOBS, 60)
            farming.cancel()

    def ended(self) -> set[str]:
        return {told["executionId"] for told in self.client.told if told["status"] in ENDS}

    async def _at(self, within_s: float, act: Callable[[], Any]) -> None:
        await asyncio.sleep(self.lot.uniform(0, within_s))
        await act()

    async def _submit(self, name: str) -> None:
        kind, number = name.rsplit("-", 1)
        more: dict[str, Any] = {}
        configuration: dict[str, Any] = {"seconds": round(self.lot.uniform(0.01, 1.0), 2)}
        if kind == "locked":
            more["locks"] = [{"resource": f"asset/{int(number) % 7}", "mode": "EXCLUSIVE"}]
        elif kind == "later":
            more["notBefore"] = "2100-01-01T00:00:00Z"
        elif kind in {"updated", "polled"}:
            configuration = {"how": self.lot.choice(["updates", "stops"])}
        await self.client.submit(KINDS[kind][0], name, configuration, priority=self.lot.randint(0, 5), **more)

    async def _cancel(self, name: str, reply_to: str) -> None:
        force = self.lot.random() < 0.2
        body = {"command": "cancel", "executionId": name, "reason": "storm", "force": force, "by": "storm"}
        await self._send("control", body, reply_to, name)

    async def _answered(self, message: aio_pika.abc.AbstractIncomingMessage) -> None:
        self.answers.setdefault(str(message.correlation_id), []).append(json.loads(message.body))

    async def _run_farm(self) -> None:
        """Whoever was launched is completed some time; whoever hears of a cancel stops, or does not."""
        tokens: dict[str, str] = {}
        while True:
            told, self._handled = self.client.told[self._handled :], len(self.client.told)
            for one in told:
                name = one["executionId"]
                if not name.startswith("updated-") or one["status"] != "RUNNING":
                    continue
                if one.get("externalId") and name not in tokens:
                    tokens[name] = one["message"]
                    self._later(3.0, name, tokens[name], "COMPLETED")
                if one.get("cancelRequested") and name in tokens:
                    self._later(
                        0.3, name, tokens[name], self.lot.choice(["CANCELLED", "COMPLETED", "FAILED"])
                    )
            await asyncio.sleep(0.05)

    def _later(self, within_s: float, name: str, token: str, status: str) -> None:
        body = {"executionId": name, "token": token, "status": status}
        task = asyncio.create_task(self._at(within_s, lambda: self._send("updates", body)))
        self._farm.add(task)
        task.add_done_callback(self._farm.discard)

    async def _send(
        self, queue: str, body: dict[str, Any], reply_to: str | None = None, key: str | None = None
    ) -> None:
        message = aio_pika.Message(
            json.dumps(body).encode(), delivery_mode=2, reply_to=reply_to, correlation_id=key
        )
        await self.client.channel.default_exchange.publish(message, f"{self.client.prefix}.{queue}")


async def test_a_storm_of_cancels(daemon: DaemonProcess, client: Client) -> None:
    """Each job ends once, as it is kept and as its canceller was told; no process, lock or message is left."""
    daemon.configure(slots={"total": 24, "blocking_processes": 3, "warm_processes": 3})
    daemon.start()
    assert daemon.process is not None
    calm = len(psutil.Process(daemon.process.pid).children(recursive=True))
    storm = Storm(client, seed=1)
    await storm.run()
    kept = _kept(daemon)
    assert len(kept) == JOBS
    for name in storm.jobs:
        told = client.of(name)
        ends = [one["status"] for one in told if one["status"] in ENDS]
        assert ends == [kept[name]], (name, told)
        assert told[-1]["status"] in ENDS, (name, told)
        assert [one["sequence"] for one in told] == list(range(1, len(told) + 1)), told
        [answer] = storm.answers[name]
        _check_answer(name, answer, kept[name])
    counted = Counter(kept.values())
    assert counted["CANCELLED"] > JOBS / 3, counted
    assert counted["COMPLETED"] > JOBS / 20, counted
    await _nothing_left(daemon, client, calm)
    assert daemon.stop() == 0


def _check_answer(name: str, answer: dict[str, Any], kept: str) -> None:
    if not answer["accepted"]:
        assert answer["status"] == kept, (name, answer, kept)
    elif answer["status"] in {"CANCELLED", None}:
        assert kept == "CANCELLED", (name, answer, kept)
    else:
        assert answer["status"] == "RUNNING", (name, answer, kept)


def _database(daemon: DaemonProcess) -> sqlite3.Connection:
    return sqlite3.connect(f"file:{Path(daemon.folder) / 'data' / 'ledger.db'}?mode=ro", uri=True)


def _kept(daemon: DaemonProcess) -> dict[str, str]:
    with closing(_database(daemon)) as database:
        return dict(database.execute("SELECT execution_id, status FROM executions"))


async def _nothing_left(daemon: DaemonProcess, client: Client, calm: int) -> None:
    """Soon: what was stopped may be dying, what was told may be on its way."""
    assert daemon.process is not None
    left: list[Any] = []
    for _ in range(100):
        with closing(_database(daemon)) as database:
            rows = {
                table: database.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
                for table in ("outbox", "lock_grants", "lock_waiters", "tombstones", "calls", _UNRELEASED)
            }
        processes = psutil.Process(daemon.process.pid).children(recursive=True)
        living = [process for process in processes if process.status() != psutil.STATUS_ZOMBIE]
        left = [rows, [" ".join(process.cmdline()) for process in living]]
        if not any(rows.values()) and len(living) <= calm:
            return
        await asyncio.sleep(0.1)
    raise AssertionError(left)
