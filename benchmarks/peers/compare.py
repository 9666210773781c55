"""The daemon beside Celery, Dramatiq, taskiq and FastStream: the same jobs, on the same broker, in one run.

Speed: jobs wait in the queue, a worker begins; jobs per second from the first that is done to the last. `bare`: the job
does nothing and tells nobody. `told`: it publishes its three statuses, persistent and confirmed, which the daemon does
by itself.

Custody: a worker is killed with -9 in the middle and started again: how many jobs were begun twice, how many never
done, and of how many somebody was told. And a job that takes longer than the broker waits for an acknowledgement: how
often it is begun.

The peers are installed into an environment of their own, `.jef/peers`, from `requirements.lock` here. Their workers run
with late acknowledgement, so that nothing is lost that they can keep; else with what they come with.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import aio_pika
import psutil

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE.parent))

from own_broker import PrivateBroker, own_broker  # noqa: E402 - beside this folder

PEERS = ROOT / ".jef" / "peers"
_PATIENCE_S = 300.0
_STILL_S = 15.0
"""When nothing has happened for so long, nothing will."""


@dataclass(frozen=True)
class Side:
    """How one is run."""

    name: str
    work: tuple[str, ...]
    """The worker's command; the first word is a program of its environment."""
    module: str
    modes: tuple[str, ...] = ("bare", "told")
    processes: str = "1 process"


SIDES = (
    Side(
        "Celery",
        (
            "celery",
            "-A",
            "celery_side",
            "worker",
            "-c",
            "2",
            "-l",
            "error",
            "--without-gossip",
            "--without-mingle",
        ),
        "celery_side",
        processes="2 processes",
    ),
    Side(
        "Dramatiq",
        ("dramatiq", "dramatiq_side", "-p", "2", "-t", "8"),
        "dramatiq_side",
        processes="2 processes, 8 threads each",
    ),
    Side(
        "taskiq",
        (
            "taskiq",
            "worker",
            "taskiq_side:broker",
            "-w",
            "1",
            "--ack-type",
            "when_executed",
            "--log-level",
            "ERROR",
        ),
        "taskiq_side",
    ),
    Side("FastStream", ("faststream", "run", "faststream_side:app", "-l", "error"), "faststream_side"),
    Side("jef_daemon", ("python", "-m", "jef_daemon", "run"), "jef_side", ("told",)),
    Side("jef_daemon, an action that may run again", ("python", "-m", "jef_daemon", "run"), "jef_side", ()),
)


@dataclass
class Found:
    """What was measured of a side."""

    rates: dict[str, list[float]] = field(default_factory=lambda: {"bare": [], "told": []})
    memory_mb: float = 0.0
    killed: str = ""
    long: str = ""


class Run:
    """One side, one queue, one trace."""

    def __init__(self, side: Side, url: str, mode: str) -> None:
        self.side = side
        self.folder = Path(tempfile.mkdtemp(prefix="jef-peers-"))
        self.prefix = f"peer{self.folder.name[-8:].replace('_', 'x')}"
        self.trace = self.folder / "trace"
        self.trace.touch()
        self._url = url
        self._environment = os.environ | {
            "PEER_URL": url,
            "PEER_PREFIX": self.prefix,
            "PEER_MODE": mode,
            "PEER_TRACE": str(self.trace),
            "PEER_MAY_RUN_AGAIN": str("again" in side.name),
            "PYTHONPATH": f"{HERE}:{ROOT}",
        }
        self.told: Counter[str] = Counter()
        self.told_at: list[float] = []

    def python(self) -> str:
        """The interpreter of the side's environment."""
        return sys.executable if self.side.module == "jef_side" else str(PEERS / "bin" / "python")

    def fill(self, count: int, seconds: float) -> None:
        """Let jobs wait."""
        command = [self.python(), str(HERE / f"{self.side.module}.py"), str(count), str(seconds)]
        subprocess.run(command, env=self._environment, check=True, cwd=self.folder)

    @contextmanager
    def worker(self) -> Iterator[psutil.Process]:
        """A worker; killed with all that it started."""
        program, *arguments = self.side.work
        command = [str(Path(self.python()).parent / program), *arguments]
        if self.side.module == "jef_side":
            command = [self.python(), *arguments, "--config", str(self.folder / "jef.toml")]
        with (self.folder / "log").open("ab") as log:
            process = subprocess.Popen(
                command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd=self.folder,
            )
        try:
            yield psutil.Process(process.pid)
        finally:
            left = [
                process.pid,
                *(child.pid for child in psutil.Process(process.pid).children(recursive=True)),
            ]
            for pid in left:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            process.wait()

    def lines(self) -> list[str]:
        """What was begun and ended, in order."""
        return self.trace.read_text().split()

    async def listen(self, connection: aio_pika.abc.AbstractConnection) -> None:
        """Hear what is told, as everybody may."""
        channel = await connection.channel()
        status = await channel.declare_exchange(f"{self.prefix}.status", "topic", durable=True)
        queue = await channel.declare_queue(exclusive=True)
        for word in ("completed", "failed"):
            await queue.bind(status, f"nothing.{word}")
        await queue.consume(self._take, no_ack=True)

    async def _take(self, message: aio_pika.abc.AbstractIncomingMessage) -> None:
        self.told[(message.routing_key or "").rpartition(".")[2]] += 1
        self.told_at.append(time.perf_counter())

    def close(self) -> None:
        """Leave nothing behind."""
        shutil.rmtree(self.folder, ignore_errors=True)


async def speed(side: Side, url: str, mode: str, jobs: int, found: Found) -> None:
    """Jobs per second, from the first that is done to the last."""
    run = Run(side, url, mode)
    connection = await aio_pika.connect(url)
    try:
        await run.listen(connection)
        await asyncio.to_thread(run.fill, jobs, 0.0)
        with run.worker() as worker:
            done_at: list[tuple[float, int]] = []
            async with asyncio.timeout(_PATIENCE_S):
                while not done_at or done_at[-1][1] < jobs:
                    count = len(run.told_at) if mode == "told" else run.trace.stat().st_size // 18
                    if count and (not done_at or done_at[-1][1] != count):
                        done_at.append((time.perf_counter(), count))
                    await asyncio.sleep(0.005)
            (first, before), (last, _) = done_at[0], done_at[-1]
            found.rates[mode].append((jobs - before) / (last - first))
            found.memory_mb = max(found.memory_mb, _memory(worker))
    finally:
        await connection.close()
        run.close()


async def kill(side: Side, url: str, jobs: int, found: Found) -> None:
    """Kill -9 in the middle; what became of the jobs."""
    run = Run(side, url, "told")
    connection = await aio_pika.connect(url)
    try:
        await run.listen(connection)
        await asyncio.to_thread(run.fill, jobs, 0.2)
        with run.worker():
            while len(run.lines()) < jobs // 2:
                await asyncio.sleep(0.01)
        with run.worker():
            await _still(run, lambda: len({line for line in run.lines() if line[0] == "e"}) == jobs)
        counted = Counter(run.lines())
        again = sum(number > 1 for line, number in counted.items() if line[0] == "b")
        undone = jobs - sum(line[0] == "e" for line in counted)
        found.killed = f"{again} begun twice, {undone} not done, {run.told['failed']} told as failed"
    finally:
        await connection.close()
        run.close()


async def long(side: Side, url: str, seconds: float, found: Found) -> None:
    """One job that takes longer than the broker waits; how often it is begun."""
    run = Run(side, url, "told")
    connection = await aio_pika.connect(url)
    try:
        await run.listen(connection)
        await asyncio.to_thread(run.fill, 1, seconds)
        with run.worker() as worker:
            while not run.lines():
                await asyncio.sleep(0.05)
            await asyncio.sleep(3 * seconds)
            has_ended = worker.status() == psutil.STATUS_ZOMBIE
        counted = Counter(line[0] for line in run.lines())
        found.long = f"begun {counted['b']} times, told as completed {run.told['completed']} times"
        if has_ended:
            found.long += "; the worker has ended"
    finally:
        await connection.close()
        run.close()


async def _still(run: Run, is_done: Callable[[], bool]) -> None:
    """Wait until all is done, or nothing happens any more."""
    size, changed_at = -1, time.monotonic()
    while not is_done() and time.monotonic() - changed_at < _STILL_S:
        if (now := run.trace.stat().st_size) != size:
            size, changed_at = now, time.monotonic()
        await asyncio.sleep(0.05)


def _memory(worker: psutil.Process) -> float:
    """MB of all its processes, what they share counted by its share."""
    everyone = [worker, *worker.children(recursive=True)]
    return sum(one.memory_full_info().pss for one in everyone) / 1e6


def install() -> None:
    """Bring the peers, once."""
    lock = HERE / "requirements.lock"
    done = PEERS / "installed"
    if done.exists() and done.read_text() == lock.read_text():
        return
    print("installing the peers into .jef/peers …", flush=True)
    shutil.rmtree(PEERS, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(PEERS)], check=True)
    pip = [str(PEERS / "bin" / "python"), "-m", "pip", "install", "-q", "--no-deps", "-r", str(lock)]
    subprocess.run(pip, check=True)
    done.write_text(lock.read_text())


async def compare(broker: PrivateBroker, options: argparse.Namespace) -> None:
    """All sides in turns, then the table."""
    url, found = broker.url, {side.name: Found() for side in SIDES}
    for turn in range(options.rounds):
        for side in SIDES:
            for mode in side.modes:
                await speed(side, url, mode, options.jobs, found[side.name])
                print(
                    f"round {turn + 1}: {side.name}, {mode}: {found[side.name].rates[mode][-1]:.0f} jobs/s",
                    flush=True,
                )
    for side in SIDES:
        await kill(side, url, 400, found[side.name])
        print(f"killed: {side.name}: {found[side.name].killed}", flush=True)
    for name, value in (("consumer_timeout", 5000), ("channel_tick_interval", 1000)):
        broker.ctl("eval", f"application:set_env(rabbit, {name}, {value}).")
    for side in SIDES:
        await long(side, url, 15.0, found[side.name])
        print(f"longer than the broker waits: {side.name}: {found[side.name].long}", flush=True)
    print(table(found))


def table(found: dict[str, Found]) -> str:
    """As it stands in the README."""
    ours = statistics.median(found["jef_daemon"].rates["told"])
    rows = [
        "| | processes | bare, jobs/s | told, jobs/s | jef_daemon's to it | memory, MB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for side in SIDES:
        one = found[side.name]
        if not one.rates["told"]:
            continue
        bare, told = (
            f"{statistics.median(one.rates[mode]):,.0f}" if one.rates[mode] else ""
            for mode in ("bare", "told")
        )
        ratio = ours / statistics.median(one.rates["told"])
        rows.append(
            f"| {side.name} | {side.processes} | {bare} | {told} | {ratio:.2f} | {one.memory_mb:.0f} |"
        )
    rows += [
        "",
        "| | killed with -9 in the middle of 400 jobs | a job of 15 s, the broker waits for 5 s |",
        "| --- | --- | --- |",
    ]
    rows += [f"| {name} | {one.killed} | {one.long} |" for name, one in found.items()]
    return "\n".join(rows)


def main() -> None:
    """Read the options, install, compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=3000, help="waiting in each round (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side (default %(default)s)")
    options = parser.parse_args()
    install()
    with own_broker() as (broker, _):
        asyncio.run(compare(broker, options))


if __name__ == "__main__":
    main()
