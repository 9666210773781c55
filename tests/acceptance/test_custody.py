"""Custody under violence: processes killed with -9, the broker killed and restarted, SIGTERM under load.

Each ends the same way: every job in a final status exactly as told, and nothing run twice.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from broker import PrivateBroker

from jef_daemon.ledger import Filter
from tests.support.amqp import ENDS, Client, delete_all
from tests.support.process import DaemonProcess

pytestmark = pytest.mark.timeout(300)
SEED = int(os.environ.get("JEF_TEST_SEED", "0")) or random.randrange(1, 10**6)


def check_ends(daemon: DaemonProcess, client: Client, names: list[str]) -> Counter[str]:
    """Every job ended as told, the ledger says the same, nothing was run twice. Returns how they ended."""
    ledger = {
        execution.execution_id: execution
        for execution in daemon.reader().page(Filter(), most=len(names) + 100).executions
    }
    ends: Counter[str] = Counter()
    for name in names:
        told = client.of(name)
        kept = ledger[name]
        assert told[-1]["status"] in ENDS, f"seed {SEED}: {name} ended as {told[-1]}"
        assert (kept.status.value, kept.sequence) == (told[-1]["status"], told[-1]["sequence"]), (
            f"seed {SEED}: {name}"
        )
        assert [each["sequence"] for each in told] == list(range(1, len(told) + 1)), f"seed {SEED}: {told}"
        assert [each["status"] for each in told[:1]] == ["QUEUED"]
        ends[told[-1]["error"]["type"] if "error" in told[-1] else told[-1]["status"]] += 1
    twice = [start for start, count in Counter(daemon.starts()).items() if count > 1]
    assert not twice, f"seed {SEED}: run twice: {twice}"
    once = [name for name, attempt in daemon.starts() if attempt > 1 and not name.startswith("again")]
    assert not once, f"seed {SEED}: run again without leave: {once}"
    return ends


def leftovers(daemon: DaemonProcess) -> list[str]:
    """Processes that carry the mark of this daemon's jobs or run its commands."""
    found = []
    for process in psutil.process_iter(["pid", "cmdline"]):
        try:
            environment = process.environ()
        except psutil.Error:
            continue
        if environment.get("JEF_TEST_TRACE") == str(daemon.trace) and "JEF_CUSTODY" in environment:
            found.append(" ".join(process.info["cmdline"] or []))
    return found


async def submit_many(client: Client, count: int) -> list[str]:
    """A mixture of quick, slow, blocking, and repeatable jobs."""
    kinds = ["quick", "quick", "quick", "slow", "again", "again", "blocking", "nap"]
    names = []
    for number in range(count):
        action = kinds[number % len(kinds)]
        name = f"{action}-{number}"
        seconds = random.choice([0.01, 0.05, 0.3]) if action != "quick" else 0
        await client.submit(action, name, {"seconds": seconds} if action != "quick" else {})
        names.append(name)
    return names


async def test_thirty_kills_under_load(daemon: DaemonProcess, client: Client) -> None:
    """`kill -9` of the daemon, thirty times, while it works on 1,000 jobs."""
    random.seed(SEED)
    daemon.configure(slots={"total": 8, "backlog": 200})
    daemon.start()
    submitting = asyncio.create_task(submit_many(client, 1000))
    kills = 0
    for _ in range(30):
        await asyncio.sleep(random.uniform(0.05, 0.8))
        daemon.kill()
        kills += 1
        # The last one is waited for: all jobs may have ended by then, and it would be stopped while it starts.
        is_waited_for = random.random() < 0.7 or kills == 30
        await asyncio.to_thread(daemon.start, ready=is_waited_for)
    names = await submitting
    for name in names:
        await client.end_of(name, 90)
    ends = check_ends(daemon, client, names)
    assert kills == 30
    assert ends["COMPLETED"] > 800, ends
    assert set(ends) <= {"COMPLETED", "Interrupted"}, ends
    for name in names:
        if name.startswith("again"):
            assert client.of(name)[-1]["status"] == "COMPLETED", "it may run again, so it comes to its end"
    assert await asyncio.to_thread(daemon.stop) == 0
    assert leftovers(daemon) == []


async def test_a_killed_daemon_leaves_no_process(daemon: DaemonProcess, client: Client) -> None:
    """Commands, blocking executors, and what they started, die with a daemon that is killed with -9."""
    daemon.start()
    await client.submit("nap", "nap", {"seconds": 600})
    await client.submit("blocking", "blocking", {"seconds": 600})
    await client.submit("broken", "fork", {"how": "fork"})
    await client.until(
        lambda: all(client.statuses(name)[-1:] == ["RUNNING"] for name in ("nap", "blocking", "fork"))
    )
    until = time.monotonic() + 20
    while not Path(f"{daemon.trace}.forked").exists() and time.monotonic() < until:
        await asyncio.sleep(0.05)
    assert len(leftovers(daemon)) >= 4
    daemon.kill()
    until = time.monotonic() + 15
    while leftovers(daemon) and time.monotonic() < until:
        await asyncio.sleep(0.1)
    assert leftovers(daemon) == []


@pytest.fixture
def own_daemon(own_broker: PrivateBroker, tmp_path: Path) -> Iterator[DaemonProcess]:
    """A daemon on a broker that may be killed."""
    process = DaemonProcess(own_broker.url, "own", tmp_path / "daemon")
    yield process
    process.kill()


async def test_the_broker_is_killed_and_restarted_under_load(
    own_broker: PrivateBroker, own_daemon: DaemonProcess, queue_type: str
) -> None:
    """Consumers, topology and unconfirmed notifications come back by themselves; nothing is lost."""
    random.seed(SEED)
    own_daemon.configure(
        slots={"total": 8, "backlog": 100}, bus={"reconnect_max_s": 0.5, "queue_type": queue_type}
    )
    own_daemon.start()
    names: list[str] = []
    async with Client(own_broker.url, "own", queue_type) as first:
        names = await submit_many(first, 300)
    for _ in range(3):
        await asyncio.sleep(random.uniform(0.2, 1.0))
        await asyncio.to_thread(own_broker.kill)
        position = own_daemon.log.stat().st_size
        await asyncio.sleep(random.uniform(0, 1.0))
        await asyncio.to_thread(own_broker.start)
        await asyncio.to_thread(own_daemon.wait_for, "broker_connected", position, 60)
    async with Client(own_broker.url, "own", queue_type) as client:
        await client.submit("quick", "afterwards")
        assert (await client.end_of("afterwards", 60))["status"] == "COMPLETED"
        reader = own_daemon.reader()
        async with asyncio.timeout(90):
            while (
                len(reader.page(Filter(), most=400).executions) < 301
                or reader.count().get("COMPLETED", 0) < 301
            ):
                await asyncio.sleep(0.2)
        for name in names:
            # The first client took some of them before the broker died; the ledger has them all.
            assert reader.find(name).status.value == "COMPLETED", f"seed {SEED}"
    assert Counter(own_daemon.starts()).most_common(1)[0][1] == 1
    lost = [event for event in own_daemon.events() if event["event"] == "broker_lost"]
    assert len(lost) == 3, "the broker's death was not seen"


async def test_every_notification_survives_the_brokers_death(
    own_broker: PrivateBroker, own_daemon: DaemonProcess, queue_type: str, tmp_path: Path
) -> None:
    """Jobs that end while the broker is away are told, in order, once it is back."""
    gone = tmp_path / "gone"
    own_daemon.configure(slots={"total": 50}, bus={"queue_type": queue_type})
    own_daemon.start()
    async with Client(own_broker.url, "own", queue_type) as client:
        for number in range(50):
            await client.submit("slow", str(number), {"seconds": 2.0, "steps": 4, "until": str(gone)})
        await client.until(
            lambda: all(client.statuses(str(number))[-1:] == ["RUNNING"] for number in range(50))
        )
    await asyncio.to_thread(own_broker.kill)
    gone.touch()
    async with asyncio.timeout(60):
        while own_daemon.reader().count() != {"COMPLETED": 50}:
            await asyncio.sleep(0.1)
    await asyncio.to_thread(own_broker.start)
    async with Client(own_broker.url, "own", queue_type) as after:
        for number in range(50):
            end = await after.end_of(str(number), 60)
            assert end["status"] == "COMPLETED"
            sequences = [told["sequence"] for told in after.told if told["executionId"] == str(number)]
            assert sequences == sorted(sequences)
    await delete_all(own_broker.url, "own")


async def test_sigterm_under_load_hands_back_and_tells(
    daemon: DaemonProcess, client: Client, tmp_path: Path
) -> None:
    """Running jobs finish or are told interrupted; unstarted ones run on another daemon, with their numbers."""
    random.seed(SEED)
    daemon.configure(slots={"total": 4, "backlog": 500}, shutdown={"drain_s": 2.0, "flush_s": 10.0})
    daemon.start()
    names = await submit_many(client, 200)
    await client.submit("slow", "long", {"seconds": 60})
    await client.submit("again", "again-long", {"seconds": 6})
    await client.until(lambda: sum(told["status"] == "COMPLETED" for told in client.told) > 20)
    begin = time.monotonic()
    assert await asyncio.to_thread(daemon.stop) == 0
    assert time.monotonic() - begin < 15
    assert leftovers(daemon) == []
    second = DaemonProcess(daemon.url, daemon.prefix, tmp_path / "second")
    second.trace = daemon.trace
    try:
        second.start()
        for name in [*names, "again-long"]:
            await client.end_of(name, 60)
        assert set(Counter(daemon.starts()).values()) == {1}
        for name in names:
            told = client.of(name)
            assert told[-1]["status"] in ENDS
            assert [each["sequence"] for each in told] == list(range(1, len(told) + 1)), told
        handed_back = daemon.reader().page(Filter(), most=500).executions
        assert any(execution.handed_back for execution in handed_back)
    finally:
        await asyncio.to_thread(second.stop)


async def test_a_second_signal_makes_haste(daemon: DaemonProcess, client: Client) -> None:
    """It does not wait for what runs; what runs is recorded and told as interrupted."""
    daemon.configure(shutdown={"drain_s": 600.0})
    daemon.start()
    await client.submit("slow", "1", {"seconds": 600})
    await client.until(lambda: client.statuses("1")[-1:] == ["RUNNING"])
    daemon.signal(signal.SIGTERM)
    await asyncio.to_thread(daemon.wait_for, "draining")
    daemon.signal(signal.SIGTERM)
    assert await asyncio.to_thread(daemon.wait, 15) == 0
    end = await client.end_of("1")
    assert end["error"]["type"] == "Interrupted"
