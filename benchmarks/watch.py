"""The watcher with a hundred thousand jobs outside: memory, CPU when idle, how late it flags, how fast it restarts.

A real daemon on a real broker, started on a ledger in which that many executions run outside; a few thousand of them
fall silent while it is watched, spread over a time. The same daemon on an empty ledger is what it is compared with.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aio_pika
import psutil
from own_broker import own_broker
from sqlalchemy import create_engine, text

from jef_daemon.events import Launched
from jef_daemon.ledger import SqlLedger
from jef_daemon.lifecycle import Execution
from jef_daemon.names import Names
from jef_daemon.ports import Arrival, Capacity

HERE = Path(__file__).resolve().parent

_AT_ONCE = 1000
_LONG_S = 86_400.0
_READY_S = 120
_FIRST_S = 30.0
"""Between the preparation and the first deadline: the daemon has to be up by then, and idle for a while."""

_SETTLE_S = 5.0
"""After a start, before idling is measured: all is read once more when the broker is connected."""


@dataclass
class Running:
    """A daemon that is watched."""

    process: psutil.Process
    lines: list[dict[str, Any]]
    started_at: float

    async def until(self, event: str, **fields: Any) -> float:
        """Wait for a line of the log; returns the seconds since the start of the process."""
        async with asyncio.timeout(_READY_S):
            while True:
                for line in self.lines:
                    if line.get("event") == event and fields.items() <= line.items():
                        return float(line["seen_at"] - self.started_at)
                await asyncio.sleep(0.01)

    async def idle_cpu(self, seconds: float) -> float:
        """Per cent of a processor that it takes while nothing happens."""
        before = sum(self.process.cpu_times()[:2])
        await asyncio.sleep(seconds)
        return 100 * (sum(self.process.cpu_times()[:2]) - before) / seconds

    @property
    def memory_mb(self) -> float:
        return float(self.process.memory_info().rss / 2**20)


@contextlib.asynccontextmanager
async def daemon(url: str, prefix: str, folder: Path) -> AsyncIterator[Running]:
    """A daemon on the ledger in a folder; killed afterwards."""
    configuration = folder / "jef.toml"
    configuration.write_text(
        f'amqp_url = "{url}"\nprefix = "{prefix}"\ndata_dir = "{folder}"\npython_path = ["{HERE}"]\n'
        '[logging]\nformat = "json"\n[actions.nothing]\nexecutor = "bench_actions:Nothing"\n'
    )
    begin = time.monotonic()
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "jef_daemon", "run", "--config", str(configuration)),
        stderr=asyncio.subprocess.PIPE,
    )
    running = Running(psutil.Process(child.pid), [], begin)

    async def read() -> None:
        assert child.stderr is not None
        async for line in child.stderr:
            with contextlib.suppress(ValueError):
                running.lines.append(json.loads(line) | {"seen_at": time.monotonic()})

    reading = asyncio.create_task(read())
    try:
        await running.until("ready")
        yield running
    finally:
        child.kill()
        await child.wait()
        reading.cancel()


async def fill(folder: Path, prefix: str, timeouts: Sequence[float]) -> dict[str, float]:
    """A ledger with so many executions outside, each silent from now on; returns their deadlines."""
    folder.mkdir(parents=True)
    deadlines: dict[str, float] = {}
    async with SqlLedger(f"sqlite:///{folder / 'ledger.db'}", Names(prefix)) as ledger:
        for start in range(0, len(timeouts), _AT_ONCE):
            chunk = timeouts[start : start + _AT_ONCE]
            names = [f"w{start + number}" for number in range(len(chunk))]
            await ledger.accept(
                [
                    Arrival(Execution(name, "nothing", token="t", update_timeout_s=silence), "{}")
                    for name, silence in zip(names, chunk, strict=True)
                ]
            )
            await ledger.claim(Capacity(len(names), {"nothing": len(names)}))
            await asyncio.gather(*(ledger.applying(name, 1, [Launched()]) for name in names))
            # As if it had been told long ago.
            await ledger.confirm([message.id for message in await ledger.outbox(0, 10 * _AT_ONCE)])
        after = (0.0, "")
        while page := await ledger.watched(after, 10_000):
            deadlines |= page
            after = (page[-1][1], page[-1][0])
    return deadlines


def flagged(folder: Path) -> dict[str, float]:
    """When each silent one was flagged, as the history says."""
    engine = create_engine(f"sqlite:///{folder / 'ledger.db'}")
    with engine.connect() as connection:
        found = connection.execute(text("SELECT execution_id, at FROM history WHERE event = 'FellSilent'"))
        times = {row.execution_id: row.at for row in found}
    engine.dispose()
    return times


def quantiles(values: Sequence[float]) -> str:
    """p50, p99 and the most, in milliseconds."""
    ordered = sorted(values)
    p50, p99 = ordered[len(ordered) // 2], ordered[int(len(ordered) * 0.99)]
    return f"p50 {p50 * 1000:.1f} ms, p99 {p99 * 1000:.1f} ms, most {ordered[-1] * 1000:.1f} ms"


class Bench:
    """One broker, one folder."""

    def __init__(self, url: str, folder: Path, options: argparse.Namespace) -> None:
        self.url = url
        self.folder = folder
        self.options = options
        self.heard: dict[str, float] = {}

    async def run(self) -> None:
        """All measurements, one line each."""
        await self._empty()
        await self._watched()
        await self._overdue()

    async def _empty(self) -> None:
        folder = self.folder / "empty"
        folder.mkdir()
        async with daemon(self.url, "empty", folder) as running:
            await asyncio.sleep(_SETTLE_S)
            cpu = await running.idle_cpu(self.options.idle_s)
            print(
                f"nothing to watch:   {running.memory_mb:.0f} MB, idle {cpu:.2f} % of a processor", flush=True
            )

    async def _watched(self) -> None:
        options, folder = self.options, self.folder / "watched"
        print(f"preparing {options.watched} executions …", flush=True)
        began = time.time()
        # The clock of each runs from when it is launched: those that are to fall silent come last.
        timeouts = [_LONG_S] * (options.watched - options.silent)
        timeouts += [
            _FIRST_S + options.idle_s + options.over_s * n / options.silent for n in range(options.silent)
        ]
        deadlines = await fill(folder, "watched", timeouts)
        print(f"prepared in {time.time() - began:.0f} s", flush=True)
        async with daemon(self.url, "watched", folder) as running, self._listening("watched"):
            took = await running.until("watching", executions=options.watched)
            read = next(line["read_in_s"] for line in running.lines if line["event"] == "watching")
            print(
                f"restart:            all {options.watched} watched {took:.1f} s after the start of the process "
                f"(read in {read:.2f} s)"
            )
            await asyncio.sleep(_SETTLE_S)
            cpu = await running.idle_cpu(options.idle_s)
            print(
                f"watching:           {running.memory_mb:.0f} MB, idle {cpu:.2f} % of a processor", flush=True
            )
            silent = {name: at for name, at in deadlines.items() if at < began + _LONG_S / 2}
            if min(silent.values()) < time.time():
                raise SystemExit("the machine is too slow for these options: some are silent already")
            async with asyncio.timeout(max(silent.values()) - time.time() + 30):
                while len(self.heard) < len(silent):
                    await asyncio.sleep(0.1)
        recorded = flagged(folder)
        print(
            f"flagged late by:    {quantiles([recorded[name] - at for name, at in silent.items()])} (recorded)"
        )
        print(
            f"                    {quantiles([self.heard[name] - at for name, at in silent.items()])} (heard)"
        )

    async def _overdue(self) -> None:
        folder, overdue = self.folder / "overdue", self.options.overdue
        await fill(folder, "overdue", [0.001] * overdue)
        self.heard.clear()
        async with self._listening("overdue"), daemon(self.url, "overdue", folder) as running:
            async with asyncio.timeout(300):
                while len(self.heard) < overdue:
                    await asyncio.sleep(0.02)
            total = time.monotonic() - running.started_at
        times = sorted(flagged(folder).values())
        rate = overdue / max(times[-1] - times[0], 0.001)
        print(
            f"restart, overdue:   {overdue} flagged at {rate:.0f} per second; all heard {total:.1f} s after the start"
        )

    @contextlib.asynccontextmanager
    async def _listening(self, prefix: str) -> AsyncIterator[None]:
        connection = await aio_pika.connect(self.url)
        channel = await connection.channel()
        status = await channel.declare_exchange(f"{prefix}.status", "topic", durable=True)
        queue = await channel.declare_queue(exclusive=True)
        await queue.bind(status, "*.timed_out")

        async def hear(message: aio_pika.abc.AbstractIncomingMessage) -> None:
            self.heard.setdefault(json.loads(message.body)["executionId"], time.time())

        await queue.consume(hear, no_ack=True)
        try:
            yield
        finally:
            await connection.close()


def main() -> None:
    """Read the options, find a broker, measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--watched", type=int, default=100_000, help="executions (default %(default)s)")
    parser.add_argument(
        "--silent", type=int, default=5_000, help="of them, that fall silent (default %(default)s)"
    )
    parser.add_argument("--over-s", type=float, default=20.0, help="within this time (default %(default)s)")
    parser.add_argument(
        "--overdue", type=int, default=20_000, help="silent before a restart (default %(default)s)"
    )
    parser.add_argument(
        "--idle-s", type=float, default=15.0, help="how long idling is measured (default %(default)s)"
    )
    options = parser.parse_args()
    with own_broker() as (broker, folder):
        asyncio.run(Bench(broker.url, folder, options).run())


if __name__ == "__main__":
    main()
