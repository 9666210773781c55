"""What the coordinator costs: stages per second against the same jobs submitted singly, and the way to the next stage.

One daemon in all roles. Single jobs: all published at once. Workflows: the same number of jobs as stages, in a row, of
workflows that all begin at once. The latency is of one workflow alone: from the COMPLETED of a stage, as a listener
hears it, to the RUNNING of the next.

With `--open`, so many workflows more whose stage an executor elsewhere has not done yet: what they cost in memory,
what they change for the others, and how soon a daemon that was killed is back beside them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import aio_pika
from own_broker import own_broker

HERE = Path(__file__).resolve().parent
STAGES = 5
_PATIENCE_S = 300


class Listener:
    """Counts jobs that are done and workflows that are over, and when."""

    def __init__(self) -> None:
        self.jobs = self.workflows = self.begun = 0
        self.told: list[dict[str, Any]] = []
        self.keeps = False
        self._changed = asyncio.Event()

    async def take(self, message: aio_pika.abc.AbstractIncomingMessage) -> None:
        """Take a notification."""
        self.jobs += (message.routing_key or "").startswith("nothing.completed")
        self.workflows += (message.routing_key or "") == "row.completed"
        self.begun += (message.routing_key or "") == "open.running"
        if self.keeps:
            self.told.append(json.loads(message.body))
        self._changed.set()

    async def until(self, what: str, count: int) -> None:
        """Wait until so many are over."""
        async with asyncio.timeout(_PATIENCE_S + count / 50):
            while getattr(self, what) < count:
                self._changed.clear()
                await self._changed.wait()


async def measure(url: str, folder: Path, options: argparse.Namespace) -> None:
    """Start a daemon, measure both in turns, print the table."""
    prefix = f"bench{os.getpid()}"
    configuration = _configure(url, prefix, folder)
    child, reading, started = await _start(configuration)
    try:
        connection = await aio_pika.connect(url)
        channel = await connection.channel()
        listener = Listener()
        for exchange in ("status", "workflow-status"):
            await channel.declare_exchange(f"{prefix}.{exchange}", "topic", durable=True)
        heard = await channel.declare_queue(exclusive=True)
        for key in ("nothing.completed", "nothing.running"):
            await heard.bind(f"{prefix}.status", key)
        for key in ("row.completed", "open.running"):
            await heard.bind(f"{prefix}.workflow-status", key)
        await heard.consume(listener.take, no_ack=True)
        rates: dict[str, list[float]] = {"single": [], "stages": []}
        await _workflows(channel, prefix, listener, "warm", 20)
        for turn in range(options.rounds):
            rates["single"].append(
                await _single(channel, prefix, listener, f"s{turn}", options.workflows * STAGES)
            )
            rates["stages"].append(await _workflows(channel, prefix, listener, f"w{turn}", options.workflows))
        steps = await _steps(channel, prefix, listener, options.steps)
        held = await _open(channel, prefix, listener, child.pid, options) if options.open else []
        if options.open:
            child.kill()
            await child.wait()
            begin = time.perf_counter()
            child, reading, again = await _start(configuration)
            await _workflows(channel, prefix, listener, "back", 1)
            took = time.perf_counter() - begin
            await _quiet()
            held.append(
                f"killed and started again: ready after {again:.1f} s (with none at all: {started:.1f} s), "
                f"a new workflow of {STAGES} stages done after {took:.1f} s; {_memory(child.pid):.1f} MB"
            )
        await connection.close()
    finally:
        child.terminate()
        await child.wait()
    await reading
    single, stages = (statistics.median(rates[kind]) for kind in ("single", "stages"))
    print(f"{options.workflows} workflows of {STAGES} stages, {options.rounds} turns each, medians")
    print(f"single jobs      {single:8.0f} jobs/s    {[round(rate) for rate in rates['single']]}")
    print(f"stages in a row  {stages:8.0f} stages/s  {[round(rate) for rate in rates['stages']]}")
    print(f"ratio            {stages / single:8.2f}")
    p50, p99 = steps[len(steps) // 2], steps[int(len(steps) * 0.99)]
    print(f"COMPLETED to the next RUNNING, idle, {len(steps)} steps: p50 {p50:.1f} ms, p99 {p99:.1f} ms")
    print("\n".join(held))


async def _start(
    configuration: Path,
) -> tuple[asyncio.subprocess.Process, asyncio.Task[bytes], float]:
    """A daemon that is ready, who reads what it says, and the seconds that it took."""
    begin = time.perf_counter()
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "jef_daemon", "run", "--config", str(configuration)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    return child, await _until_ready(child), time.perf_counter() - begin


def _configure(url: str, prefix: str, folder: Path) -> Path:
    definitions = folder / "data" / "workflows"
    definitions.mkdir(parents=True)
    stages = "".join(f"  - {{name: s{number}, action: nothing}}\n" for number in range(STAGES))
    (definitions / "row.yaml").write_text(f"name: row\nstages:\n{stages}")
    (definitions / "open.yaml").write_text(
        "name: open\nstages: [{name: away, action: away, elsewhere: true}]\n"
    )
    configuration = folder / "jef.toml"
    configuration.write_text(
        f'amqp_url = "{url}"\nprefix = "{prefix}"\ndata_dir = "{folder / "data"}"\npython_path = ["{HERE}"]\n'
        '[slots]\ntotal = 200\n[logging]\nformat = "json"\n[actions.nothing]\nexecutor = "bench_actions:Nothing"\n'
    )
    return configuration


async def _publish(channel: Any, exchange: Any, key: str, bodies: list[dict[str, Any]]) -> None:
    for start in range(0, len(bodies), 500):
        some = bodies[start : start + 500]
        messages = [aio_pika.Message(json.dumps(body).encode(), delivery_mode=2) for body in some]
        await asyncio.gather(*(exchange.publish(message, key) for message in messages))


async def _single(channel: Any, prefix: str, listener: Listener, name: str, jobs: int) -> float:
    exchange = await channel.get_exchange(f"{prefix}.jobs")
    begin, wanted = time.perf_counter(), listener.jobs + jobs
    await _publish(
        channel, exchange, "nothing", [{"executionId": f"{name}-{number}"} for number in range(jobs)]
    )
    await listener.until("jobs", wanted)
    return jobs / (time.perf_counter() - begin)


async def _workflows(channel: Any, prefix: str, listener: Listener, name: str, count: int) -> float:
    begin, wanted = time.perf_counter(), listener.workflows + count
    asked = [{"workflowId": f"{name}-{number}", "workflow": "row"} for number in range(count)]
    await _publish(channel, channel.default_exchange, f"{prefix}.workflows", asked)
    await listener.until("workflows", wanted)
    return count * STAGES / (time.perf_counter() - begin)


async def _open(
    channel: Any, prefix: str, listener: Listener, daemon: int, options: argparse.Namespace
) -> list[str]:
    """Let so many workflows be open; what is to be said of it."""
    away = await channel.declare_queue(f"{prefix}.jobs.away", durable=True)
    await away.bind(f"{prefix}.jobs", "away")
    await _quiet()
    before, begin = _memory(daemon), time.perf_counter()
    asked = [{"workflowId": f"o-{number}", "workflow": "open"} for number in range(options.open)]
    for start in range(0, len(asked), 5000):
        await _publish(channel, channel.default_exchange, f"{prefix}.workflows", asked[start : start + 5000])
        await listener.until("begun", min(start + 5000, len(asked)))
    took = time.perf_counter() - begin
    await _quiet()
    after = _memory(daemon)
    beside = await _workflows(channel, prefix, listener, "beside", options.workflows)
    steps = await _steps(channel, prefix, listener, options.steps, "beside-")
    p50, p99 = steps[len(steps) // 2], steps[int(len(steps) * 0.99)]
    return [
        f"{options.open} open workflows: begun at {options.open / took:.0f}/s",
        f"memory of the daemon: {before:.1f} MB before, {after:.1f} MB with them",
        f"stages in a row beside them {beside:8.0f} stages/s",
        f"COMPLETED to the next RUNNING: p50 {p50:.1f} ms, p99 {p99:.1f} ms",
    ]


async def _quiet() -> None:
    """Let what is under way be done: memory is looked at when the daemon has nothing to do."""
    await asyncio.sleep(5)


def _memory(process: int) -> float:
    """MB of its own, what it shares with others by its share."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


async def _until_ready(child: asyncio.subprocess.Process) -> asyncio.Task[bytes]:
    """Wait until the daemon consumes; then read on what it says, so that it is not held up."""
    if child.stdout is None:
        raise AssertionError("it is a pipe")
    async with asyncio.timeout(60):
        while b'"ready"' not in await child.stdout.readline():
            if child.stdout.at_eof():
                raise SystemExit("the daemon ended before it was ready")
    return asyncio.create_task(child.stdout.read())


async def _steps(channel: Any, prefix: str, listener: Listener, count: int, name: str = "l-") -> list[float]:
    """Milliseconds between a stage's COMPLETED and the next one's RUNNING, as the daemon's clock has them."""
    taken: list[float] = []
    listener.keeps = True
    for number in range(-(-count // (STAGES - 1))):
        listener.told.clear()
        await _workflows(channel, prefix, listener, f"{name}{number}", 1)
        at = {
            (told["executionId"].split(":")[1], told["status"]): datetime.fromisoformat(
                told["timestamp"]
            ).timestamp()
            for told in listener.told
            if "executionId" in told
        }
        steps = range(STAGES - 1)
        taken += [1000 * (at[f"s{step + 1}", "RUNNING"] - at[f"s{step}", "COMPLETED"]) for step in steps]
    return sorted(taken)


def main() -> None:
    """Read the options, find a broker, measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workflows", type=int, default=1000, help="at once (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side (default %(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="steps whose latency is taken")
    parser.add_argument(
        "--open", type=int, default=0, help="workflows that are open beside them (default: none)"
    )
    options = parser.parse_args()
    with own_broker() as (broker, folder):
        asyncio.run(measure(broker.url, folder, options))


if __name__ == "__main__":
    main()
