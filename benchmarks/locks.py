"""What a lock costs: each figure beside what it is to be compared with, measured in turns on the same broker.

    request     a bare request-reply: a queue, a plain aio-pika handler that answers, the queue of answers
    lock        acquire + release of a free lock, through the queue of the lock service
    hand-over   of a contended lock: the release is sent, until the next holder has its GRANTED
    jobs        jobs/s with a lock of their own each, and with none
    waiting     jobs/s without locks while very many wait for one resource, and while none does
    held        acquire + release while 1, 1,000 and 100,000 other resources are held
    rivals      acquire + release of a lock in PostgreSQL and Redis, called directly, without a queue

All queues are quorum queues, all messages persistent. The lock service writes every decision to its ledger on disk
before it answers; the bare handler keeps nothing.
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
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, cast

import aio_pika
import aiormq
import uvloop
from aiormq import spec
from aiormq.abc import DeliveredMessage
from own_broker import own_broker
from rivals import rivals

HERE = Path(__file__).resolve().parent

_PATIENCE_S = 900
_LEASE_S = 6 * 86400.0
_QUORUM: dict[str, Any] = {"x-queue-type": "quorum"}


class Caller:
    """Sends requests to a queue and gets the answers, many at once; the same client for every side.

    Args:
        connection: the broker's.
    """

    def __init__(self, connection: aio_pika.abc.AbstractConnection) -> None:
        self._connection = connection
        self._waiting: dict[str, asyncio.Future[dict[str, Any]]] = {}
        self._last = 0
        self._replies = f"bench-{os.getpid()}-replies"
        self._channel: aiormq.Channel

    async def open(self) -> None:
        """Declare the queue of answers."""
        self._connection.close_callbacks.add(lambda *_: self._give_up())
        channel = await self._connection.channel(publisher_confirms=False)
        await channel.declare_queue(self._replies, durable=True, arguments=_QUORUM)
        self._channel = cast("aiormq.Channel", await channel.get_underlay_channel())
        await self._channel.basic_consume(self._replies, self._take, no_ack=True)

    async def _take(self, message: DeliveredMessage) -> None:
        answer = json.loads(message.body)
        # A lock that is not free is answered twice: what is waited for is the second.
        if answer.get("status") != "WAITING":
            self._waiting.pop(str(message.header.properties.correlation_id)).set_result(answer)

    def _give_up(self) -> None:
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(ConnectionError("the broker has gone"))

    async def send(self, queue: str, request: dict[str, Any]) -> asyncio.Future[dict[str, Any]]:
        """Ask; the answer comes."""
        self._last += 1
        answer = self._waiting[str(self._last)] = asyncio.get_running_loop().create_future()
        properties = spec.Basic.Properties(
            content_type="application/json",
            delivery_mode=2,
            reply_to=self._replies,
            correlation_id=str(self._last),
        )
        body = json.dumps(request).encode()
        await self._channel.basic_publish(body, routing_key=queue, properties=properties, wait=False)
        return answer

    async def call(self, queue: str, request: dict[str, Any]) -> dict[str, Any]:
        """Ask and wait for the answer."""
        return await (await self.send(queue, request))


Operation = Callable[[Caller, int], Awaitable[object]]


def bare(queue: str, size: int) -> Operation:
    """Two requests, as long as those for locks."""

    async def operation(caller: Caller, number: int) -> None:
        for _ in range(2):
            await caller.call(queue, {"padding": "x" * size})

    return operation


def lock(prefix: str) -> Operation:
    """Acquire + release of a resource of its own."""

    async def operation(caller: Caller, number: int) -> None:
        await caller.call(f"{prefix}.locks", acquire(f"owner-{number}", f"asset/{number}"))
        await caller.call(f"{prefix}.locks", {"operation": "release", "owner": f"owner-{number}"})

    return operation


def acquire(owner: str, resource: str) -> dict[str, Any]:
    """The request."""
    locks = [{"resource": resource, "mode": "EXCLUSIVE"}]
    return {"operation": "acquire", "owner": owner, "locks": locks, "leaseSeconds": _LEASE_S}


class Bench:
    """All measurements, on one broker.

    Args:
        url: the broker's.
        connection: to it.
        options: how much of everything.
    """

    def __init__(
        self, url: str, connection: aio_pika.abc.AbstractConnection, options: argparse.Namespace
    ) -> None:
        self._url = url
        self._connection = connection
        self._options = options
        self._caller = Caller(connection)
        self._admin: aio_pika.abc.AbstractChannel
        self._numbers = 0
        self._round_trip_ms = 0.0

    async def run(self) -> None:
        """Measure what was asked for and print it as it comes."""
        self._admin = await self._connection.channel()
        await self._caller.open()
        for name in self._options.only:
            await getattr(self, f"_{name}")()
        await self._admin.queue_delete(f"bench-{os.getpid()}-replies")

    # --- one lock against one request-reply ------------------------------------------------------------------

    async def _service(self) -> None:
        queue = f"bench-{os.getpid()}-echo"
        async with self._running("lock", roles='["locks"]') as prefix, self._echoing(queue):
            size = len(json.dumps(acquire("owner-1000", "asset/1000")))
            operations = {"request": bare(queue, size), "lock": lock(prefix)}
            singles = await self._singles(operations)
            rates = await self._rates(operations)
            hand_overs = await self._hand_overs(prefix)
        with rivals() as others:
            rival_ms = {name: self._direct(call) for name, call in others.items()}
        print("\nlatency, one at a time, ms     p50     p99")
        for name, taken in {
            "2 bare request-replies": singles["request"],
            "acquire + release": singles["lock"],
        }.items():
            print(f"{name:<26}{_p(taken, 50):>8.2f}{_p(taken, 99):>8.2f}")
        for name, taken in rival_ms.items():
            print(f"{name:<26}{_p(taken, 50):>8.2f}{_p(taken, 99):>8.2f}   direct, no queue")
        print(
            f"ratio acquire + release : 2 requests, p50  {_p(singles['lock'], 50) / _p(singles['request'], 50):.2f}"
        )
        medians = {name: statistics.median(values) for name, values in rates.items()}
        print(f"\npipelined, {self._options.window} at once: requests/s {2 * medians['request']:.0f}", end="")
        print(
            f", acquires and releases/s {2 * medians['lock']:.0f}; ratio {medians['lock'] / medians['request']:.2f}"
        )
        round_trip = _p(singles["request"], 50) / 2
        print(f"\nhand-over of a contended lock: p50 {_p(hand_overs, 50):.2f} ms", end="")
        print(f" = {_p(hand_overs, 50) / round_trip:.2f} round trips", flush=True)

    async def _singles(self, operations: dict[str, Operation]) -> dict[str, list[float]]:
        """Milliseconds of each, in turns."""
        taken: dict[str, list[float]] = {name: [] for name in operations}
        for _ in range(self._options.turns):
            for name, operation in operations.items():
                for number in range(self._options.singles):
                    begin = time.perf_counter()
                    await operation(self._caller, number)
                    taken[name].append((time.perf_counter() - begin) * 1000)
        return taken

    async def _rates(self, operations: dict[str, Operation], per_turn: int = 0) -> dict[str, list[float]]:
        """Operations per second with many at once, in turns."""
        count = per_turn or self._options.operations
        taken: dict[str, list[float]] = {name: [] for name in operations}
        for operation in operations.values():
            await self._many(operation, count // 4)  # warm
        for _ in range(self._options.turns):
            for name, operation in operations.items():
                begin = time.perf_counter()
                await self._many(operation, count)
                taken[name].append(count / (time.perf_counter() - begin))
        return taken

    async def _many(self, operation: Operation, count: int) -> None:
        numbers = iter(range(count))

        async def work() -> None:
            for number in numbers:
                await operation(self._caller, number)

        await asyncio.gather(*(work() for _ in range(self._options.window)))

    async def _hand_overs(self, prefix: str) -> list[float]:
        """Two owners take turns: the release of one is the grant of the other."""
        queue = f"{prefix}.locks"
        await self._caller.call(queue, acquire("owner-0", "contended"))
        taken = []
        for number in range(self._options.singles * self._options.turns):
            holder, heir = f"owner-{number}", f"owner-{number + 1}"
            granted = await self._caller.send(queue, acquire(heir, "contended"))
            await self._caller.call(queue, {"operation": "inspect", "locks": [{"resource": "nothing"}]})
            begin = time.perf_counter()
            released = await self._caller.send(queue, {"operation": "release", "owner": holder})
            await granted
            taken.append((time.perf_counter() - begin) * 1000)
            await released
        return taken

    def _direct(self, call: Callable[[int], None]) -> list[float]:
        taken = []
        for number in range(self._options.singles * self._options.turns):
            begin = time.perf_counter()
            call(number)
            taken.append((time.perf_counter() - begin) * 1000)
        return taken

    # --- many held -------------------------------------------------------------------------------------------

    async def _held(self) -> None:
        counts = [1, 1000, self._options.held]
        async with contextlib.AsyncExitStack() as stack:
            prefixes = {
                count: await stack.enter_async_context(self._running(f"held-{count}", roles='["locks"]'))
                for count in counts
            }
            for count, prefix in prefixes.items():
                await self._many(self._hold(prefix), count)
            operations = {str(count): lock(prefix) for count, prefix in prefixes.items()}
            rates = await self._rates(operations)
            singles = await self._singles(operations)
        print("\nheld        acquires and releases/s   ratio   p50 ms   ratio")
        few = str(counts[0])
        for name in operations:
            rate, p50 = statistics.median(rates[name]), _p(singles[name], 50)
            ratio, slower = rate / statistics.median(rates[few]), p50 / _p(singles[few], 50)
            print(f"{name:<12}{2 * rate:>23.0f}{ratio:>8.2f}{p50:>9.2f}{slower:>8.2f}", flush=True)

    def _hold(self, prefix: str) -> Operation:
        async def operation(caller: Caller, number: int) -> None:
            await caller.call(f"{prefix}.locks", acquire(f"holder-{number}", f"held/{number}"))

        return operation

    # --- jobs ------------------------------------------------------------------------------------------------

    async def _jobs(self) -> None:
        rates: dict[str, list[float]] = {"": [], "asset/{}": []}
        async with self._running("jobs") as prefix, self._telling(prefix) as told:
            for name in rates:
                await self._rate(prefix, told, self._options.jobs // 10, name)  # warm
            for _ in range(self._options.turns):
                for name, taken in rates.items():
                    taken.append(await self._rate(prefix, told, self._options.jobs, name))
        without, with_one = (statistics.median(taken) for taken in rates.values())
        print(
            f"\njobs/s without a lock {without:.0f}, with one each {with_one:.0f}; ratio {with_one / without:.2f}",
            flush=True,
        )

    async def _waiting(self) -> None:
        rates: dict[str, list[float]] = {}
        async with contextlib.AsyncExitStack() as stack:
            places = []
            for name in ("none", "many"):
                prefix = await stack.enter_async_context(self._running(f"waiting-{name}"))
                told = await stack.enter_async_context(self._telling(prefix))
                places.append((name, prefix, told))
            _, prefix, told = places[1]
            await self._caller.call(f"{prefix}.locks", acquire("holder", "busy"))
            begin = time.perf_counter()
            await self._produce(prefix, self._options.waiting, "busy")
            await self._until_told(told, 2 * self._options.waiting)  # QUEUED, WAITING_FOR_LOCK
            print(
                f"\n{self._options.waiting} jobs wait since {time.perf_counter() - begin:.0f} s", flush=True
            )
            for _ in range(self._options.turns):
                for name, prefix, told in places:
                    rates.setdefault(name, []).append(await self._rate(prefix, told, self._options.jobs, ""))
        none, many = (statistics.median(taken) for taken in rates.values())
        print(
            f"other jobs/s while none waits {none:.0f}, while {self._options.waiting} do {many:.0f}", end=""
        )
        print(f"; ratio {many / none:.2f}", flush=True)

    async def _rate(self, prefix: str, told: aio_pika.abc.AbstractQueue, jobs: int, name: str) -> float:
        """Jobs per second, from the first request to the last of their three notifications."""
        await told.purge()
        begin = time.perf_counter()
        producing = asyncio.create_task(self._produce(prefix, jobs, name))
        await self._until_told(told, 3 * jobs)
        took = time.perf_counter() - begin
        await producing
        return jobs / took

    async def _produce(self, prefix: str, jobs: int, name: str) -> None:
        first, self._numbers = self._numbers, self._numbers + jobs
        command = [sys.executable, str(HERE / "producer.py"), self._url, prefix, str(first), str(jobs), name]
        producer = await asyncio.create_subprocess_exec(*command)
        if await producer.wait():
            raise SystemExit("the producer failed")

    async def _until_told(self, told: aio_pika.abc.AbstractQueue, count: int) -> None:
        patience = time.perf_counter() + _PATIENCE_S
        while True:
            declared = await self._admin.declare_queue(told.name, passive=True)
            found = declared.declaration_result.message_count or 0
            if found >= count:
                return
            if time.perf_counter() > patience:
                raise SystemExit(f"{told.name}: {found} of {count} were told")
            await asyncio.sleep(0.02)

    # --- the sides -------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _telling(self, prefix: str) -> AsyncIterator[aio_pika.abc.AbstractQueue]:
        queue = await self._admin.declare_queue(f"{prefix}.told", durable=True, arguments=_QUORUM)
        for key in ("*.queued", "*.waiting_for_lock", "*.running", "*.completed"):
            await queue.bind(f"{prefix}.status", key)
        yield queue
        await queue.delete(if_unused=False, if_empty=False)

    @contextlib.asynccontextmanager
    async def _echoing(self, queue: str) -> AsyncIterator[None]:
        async with _process([sys.executable, str(HERE / "echo.py"), self._url, queue]):
            yield
        await self._admin.queue_delete(queue)

    @contextlib.asynccontextmanager
    async def _running(self, side: str, roles: str = '["worker", "locks"]') -> AsyncIterator[str]:
        """A daemon, ready; gives its prefix."""
        prefix = f"bench-{os.getpid()}-{side}"
        folder = Path(tempfile.mkdtemp(prefix="jef-bench-"))
        configuration = folder / "jef.toml"
        configuration.write_text(
            f'amqp_url = "{self._url}"\nprefix = "{prefix}"\ndata_dir = "{folder / "data"}"\nroles = {roles}\n'
            f'python_path = ["{HERE}"]\n[slots]\ntotal = 200\n[logging]\nformat = "json"\n'
            '[actions.nothing]\nexecutor = "bench_actions:Nothing"\n'
        )
        try:
            async with _process([sys.executable, "-m", "jef_daemon", "run", "--config", str(configuration)]):
                yield prefix
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.asynccontextmanager
async def _process(command: Sequence[str]) -> AsyncIterator[None]:
    """A process that has said that it is ready; killed afterwards: what it leaves is thrown away anyway."""
    pipe = asyncio.subprocess.PIPE
    child = await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=asyncio.subprocess.STDOUT)
    stream = cast("asyncio.StreamReader", child.stdout)
    said = [line async for line in _up_to(stream, b"ready")]
    if b"ready" not in said[-1]:
        raise SystemExit("it ended before it was ready:\n" + b"".join(said).decode())
    draining = asyncio.create_task(_drain(stream))
    try:
        yield
    finally:
        child.kill()
        await child.wait()
        draining.cancel()


async def _up_to(stream: asyncio.StreamReader, word: bytes) -> AsyncIterator[bytes]:
    while line := await stream.readline():
        yield line
        if word in line:
            return


async def _drain(stream: asyncio.StreamReader) -> None:
    while await stream.readline():
        pass


def _p(values: Sequence[float], percent: int) -> float:
    return sorted(values)[min(len(values) * percent // 100, len(values) - 1)]


async def measure(url: str, options: argparse.Namespace) -> None:
    """Connect and measure."""
    connection = await aio_pika.connect(url)
    await Bench(url, connection, options).run()
    await connection.close()


_PARTS = ("service", "held", "jobs", "waiting")


def main() -> None:
    """Read the options, find a broker, measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a tenth of everything, to see that it works")
    parser.add_argument("--only", nargs="+", choices=_PARTS, default=_PARTS, help="parts to measure")
    parser.add_argument("--turns", type=int, default=5, help="turns of each side (default %(default)s)")
    parser.add_argument("--singles", type=int, default=100, help="single operations per turn")
    parser.add_argument("--operations", type=int, default=2000, help="pipelined operations per turn")
    parser.add_argument("--window", type=int, default=100, help="pipelined operations at once")
    parser.add_argument("--jobs", type=int, default=5000, help="jobs per turn")
    parser.add_argument("--held", type=int, default=100_000, help="resources held in the last row")
    parser.add_argument("--waiting", type=int, default=100_000, help="jobs that wait for one resource")
    options = parser.parse_args()
    if options.quick:
        options.turns = 2
        for name in ("singles", "operations", "jobs", "held", "waiting"):
            setattr(options, name, getattr(options, name) // 10)
    with own_broker() as (broker, _):
        uvloop.run(measure(broker.url, options))


if __name__ == "__main__":
    main()
