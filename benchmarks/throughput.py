"""The daemon against a plain aio-pika handler: jobs/s, ratio, processor time, idle latency, memory.

Same broker, same run, in turns. Both get the same requests and publish the same three persistent, confirmed
notifications for each. The daemon also keeps a ledger on disk: every status is in it before it is told.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import aio_pika
import psutil
from aio_pika.abc import AbstractChannel, AbstractIncomingMessage, AbstractQueue
from own_broker import own_broker

HERE = Path(__file__).resolve().parent

_READY_S = 60
_PATIENCE_S = 300
_PRODUCED_AT_ONCE = 500


@dataclass
class Measured:
    """What was seen of one side."""

    rates: list[float] = field(default_factory=list)
    work_ms: list[float] = field(default_factory=list)
    """Processor time of its process for a job, in each round."""
    latencies_ms: list[float] = field(default_factory=list)
    memory_mb: float = 0.0
    children_mb: float = 0.0
    waiting_rate: float = 0.0
    waiting_memory_mb: float = 0.0


@dataclass
class Side:
    """One that is measured, running."""

    process: psutil.Process
    prefix: str
    told: AbstractQueue
    measured: Measured = field(default_factory=Measured)


class Bench:
    """One broker, one prefix per side, a queue that counts the notifications."""

    def __init__(self, url: str, channel: AbstractChannel, options: argparse.Namespace) -> None:
        self.url = url
        self.channel = channel
        self.options = options
        self.number = 0

    async def measure(self, names: Sequence[str]) -> dict[str, Measured]:
        """The sides in turns, each in one process: latency, rates, then the long queue.

        In turns, because a machine may be twice as fast some minutes later.
        """
        async with contextlib.AsyncExitStack() as stack:
            sides = {name: await stack.enter_async_context(self._side(name)) for name in names}
            for side in sides.values():
                await self._rate(side, 1000)  # warm
                side.measured.latencies_ms = await self._latencies(side.prefix)
            for number in range(self.options.rounds):
                for side in sides.values():
                    await self._round(side)
                told = ", ".join(f"{name} {side.measured.rates[-1]:.0f}" for name, side in sides.items())
                print(f"round {number + 1}, jobs/s: {told}", flush=True)
            for side in sides.values():
                side.measured.memory_mb, side.measured.children_mb = _memory(side.process)
                if self.options.waiting:
                    await self._wait_long(side)
            return {name: side.measured for name, side in sides.items()}

    async def _round(self, side: Side) -> None:
        before_s = _processor_s(side.process)
        side.measured.rates.append(await self._rate(side, self.options.jobs))
        took_s = _processor_s(side.process) - before_s
        side.measured.work_ms.append(1000 * took_s / self.options.jobs)

    async def _wait_long(self, side: Side) -> None:
        peak = asyncio.create_task(_peak(side.process))
        side.measured.waiting_rate = await self._rate(side, self.options.waiting)
        peak.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await peak
        side.measured.waiting_memory_mb = _peaks.pop(side.process.pid)

    @contextlib.asynccontextmanager
    async def _side(self, name: str) -> AsyncIterator[Side]:
        async with self._process(name) as (process, prefix):
            told = await self._told(prefix)
            yield Side(process, prefix, told)
            await told.delete(if_unused=False, if_empty=False)

    async def _told(self, prefix: str) -> AbstractQueue:
        queue = await self.channel.declare_queue(
            f"{prefix}.told", durable=True, arguments={"x-queue-type": "quorum"}
        )
        await queue.bind(f"{prefix}.status", "#")
        return queue

    async def _rate(self, side: Side, jobs: int) -> float:
        """Jobs per second from the first request published to the last notification confirmed."""
        prefix, told = side.prefix, side.told
        await told.purge()
        begin = time.perf_counter()
        patience = begin + _PATIENCE_S
        producing = asyncio.create_task(self._produce(prefix, jobs))
        while True:
            declared = await self.channel.declare_queue(told.name, passive=True)
            if (declared.declaration_result.message_count or 0) >= 3 * jobs:
                break
            if time.perf_counter() > patience:
                raise SystemExit(
                    f"{prefix}: {declared.declaration_result.message_count} of {3 * jobs} were told"
                )
            await asyncio.sleep(0.02)
        took = time.perf_counter() - begin
        await producing
        return jobs / took

    async def _produce(self, prefix: str, jobs: int) -> None:
        """Requests, from a process of its own so that producing costs neither side its event loop."""
        first, self.number = self.number, self.number + jobs
        producer = await asyncio.create_subprocess_exec(
            sys.executable, str(HERE / "producer.py"), self.url, prefix, str(first), str(jobs)
        )
        if await producer.wait():
            raise SystemExit("the producer failed")

    async def _latencies(self, prefix: str) -> list[float]:
        exchange = await self.channel.get_exchange(f"{prefix}.jobs", ensure=False)
        done = asyncio.Event()

        async def see(message: AbstractIncomingMessage) -> None:
            if json.loads(message.body)["status"] == "COMPLETED":
                done.set()

        seen = await self.channel.declare_queue(exclusive=True)
        await seen.bind(f"{prefix}.status", "#")
        tag = await seen.consume(see, no_ack=True)
        taken = []
        for _ in range(self.options.latencies):
            done.clear()
            body = json.dumps({"executionId": f"b{self.number}"}).encode()
            self.number += 1
            begin = time.perf_counter()
            await exchange.publish(aio_pika.Message(body, delivery_mode=2), "nothing")
            await done.wait()
            taken.append((time.perf_counter() - begin) * 1000)
        await seen.cancel(tag)
        return taken

    @contextlib.asynccontextmanager
    async def _process(self, side: str) -> AsyncIterator[tuple[psutil.Process, str]]:
        """The side's process, ready to consume; killed and cleaned up afterwards."""
        prefix = f"bench-{os.getpid()}-{side}"
        folder = Path(tempfile.mkdtemp(prefix="jef-bench-"))
        command, environment = _command(side, self.url, prefix, folder)
        child = await asyncio.create_subprocess_exec(
            *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, env=environment
        )
        drain = None
        try:
            await asyncio.wait_for(_until_ready(child), _READY_S)
            drain = asyncio.create_task(_drain(child))
            yield psutil.Process(child.pid), prefix
        finally:
            child.terminate()
            await child.wait()
            if drain:
                drain.cancel()
            shutil.rmtree(folder, ignore_errors=True)
            await self._delete(prefix)

    async def _delete(self, prefix: str) -> None:
        for queue in ("jobs.nothing", "unroutable", "dead-letters"):
            await self.channel.queue_delete(f"{prefix}.{queue}")
        for exchange in ("jobs", "status", "unroutable", "dead"):
            await self.channel.exchange_delete(f"{prefix}.{exchange}")


def _command(side: str, url: str, prefix: str, folder: Path) -> tuple[list[str], dict[str, str]]:
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if side == "plain":
        return [sys.executable, str(HERE / "plain_handler.py"), url, prefix, "200"], environment
    configuration = folder / "jef.toml"
    configuration.write_text(
        f'amqp_url = "{url}"\nprefix = "{prefix}"\ndata_dir = "{folder / "data"}"\n'
        f'python_path = ["{HERE}"]\n[slots]\ntotal = 200\n[logging]\nformat = "json"\n'
        '[actions.nothing]\nexecutor = "bench_actions:Nothing"\n'
    )
    return [sys.executable, "-m", "jef_daemon", "run", "--config", str(configuration)], environment


async def _until_ready(child: asyncio.subprocess.Process) -> None:
    seen = []
    if child.stdout is None:
        raise AssertionError("it is a pipe")
    while line := await child.stdout.readline():
        seen.append(line)
        if b"ready" in line:
            return
    raise SystemExit("it ended before it was ready:\n" + b"".join(seen).decode())


async def _drain(child: asyncio.subprocess.Process) -> None:
    if child.stdout is not None:
        while await child.stdout.readline():
            pass


def _memory(process: psutil.Process) -> tuple[float, float]:
    children = 0
    for child in process.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            children += child.memory_info().rss
    return process.memory_info().rss / 2**20, children / 2**20


def _processor_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


_peaks: dict[int, float] = {}


async def _peak(process: psutil.Process) -> None:
    while True:
        _peaks[process.pid] = max(_peaks.get(process.pid, 0.0), _memory(process)[0])
        await asyncio.sleep(0.1)


def _row(name: str, measured: Measured) -> str:
    ordered = sorted(measured.latencies_ms)
    p50, p99 = ordered[len(ordered) // 2], ordered[int(len(ordered) * 0.99)]
    return (
        f"{name:<26}{statistics.median(measured.rates):>9.0f}{statistics.median(measured.work_ms):>9.2f}"
        f"{measured.waiting_rate:>14.0f}"
        f"{p50:>9.1f}{p99:>9.1f}{measured.memory_mb:>9.0f}{measured.waiting_memory_mb:>14.0f}{measured.children_mb:>10.0f}"
    )


async def compare(url: str, options: argparse.Namespace) -> None:
    """Measure both and print the table."""
    connection = await aio_pika.connect(url)
    bench = Bench(url, await connection.channel(), options)
    print(f"{options.jobs} jobs, {options.rounds} rounds, {options.waiting} waiting; measuring …", flush=True)
    measured = await bench.measure(["plain", "daemon"])
    plain, daemon = measured["plain"], measured["daemon"]
    await connection.close()
    print(f"\n{'':<26}{'jobs/s':>9}{'CPU, ms':>9}{'with waiting':>14}{'p50 ms':>9}{'p99 ms':>9}", end="")
    print(f"{'MB':>9}{'MB, waiting':>14}{'children':>10}")
    print(_row("plain aio-pika, no ledger", plain))
    print(_row("jef_daemon, full custody", daemon))
    ratios = sorted(ours / theirs for ours, theirs in zip(daemon.rates, plain.rates, strict=True))
    print(f"\nratio of throughput: {statistics.median(ratios):.2f}", end="")
    print(f" (round by round {ratios[0]:.2f} to {ratios[-1]:.2f})", end="")
    if options.waiting:
        print(f"; with {options.waiting} waiting: {daemon.waiting_rate / plain.waiting_rate:.2f}", end="")
    print()


def main() -> None:
    """Read the options, find a broker, compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=10_000, help="jobs per round (default %(default)s)")
    parser.add_argument(
        "--rounds", type=int, default=3, help="rounds; the median counts (default %(default)s)"
    )
    parser.add_argument(
        "--waiting", type=int, default=100_000, help="requests in the long queue; 0: leave it out"
    )
    parser.add_argument("--latencies", type=int, default=300, help="single jobs timed when idle")
    options = parser.parse_args()
    with own_broker() as (broker, _):
        asyncio.run(compare(broker.url, options))


if __name__ == "__main__":
    main()
