"""Work outside, by a real worker that knows only AMQP: killed, stopped, continued; the daemon killed, stopped."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import aio_pika
import pytest

from jef_daemon.ledger import Filter
from tests.support.amqp import Client
from tests.support.process import ROOT, DaemonProcess

pytestmark = pytest.mark.timeout(300)


class Worker:
    """`examples/external_worker.py`, in a process of its own."""

    def __init__(self, daemon: DaemonProcess, log: Path) -> None:
        self.log = log
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "examples/external_worker.py", "--url", daemon.url),
                    *("--queue", f"{daemon.prefix}.farm", "--updates", f"{daemon.prefix}.updates"),
                ],
                stdin=subprocess.DEVNULL,
                stdout=output,
                cwd=ROOT,
            )

    def answers(self, execution_id: str) -> list[dict[str, Any]]:
        """What it was answered, in order."""
        told = [json.loads(line) for line in self.log.read_text().splitlines()]
        return [each for each in told if each["executionId"] == execution_id]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def farm(daemon: DaemonProcess, tmp_path: Path) -> Iterator[Worker]:
    """A worker at work, for the action `render`."""
    worker = Worker(daemon, tmp_path / "worker.log")
    yield worker
    worker.kill()

    async def clean() -> None:
        connection = await aio_pika.connect(daemon.url)
        async with connection:
            channel = await connection.channel()
            for queue in ("farm", "jobs.render"):
                await channel.queue_delete(f"{daemon.prefix}.{queue}")

    asyncio.run(clean())


def configure(daemon: DaemonProcess, *, update_s: float, grace_s: float, more: str = "") -> None:
    daemon.configure(
        f'[actions.render]\nexecutor = "examples.render_farm:RenderFarm"\nurl = "{daemon.url}"\n'
        f'queue = "{daemon.prefix}.farm"\nupdate_timeout_s = {update_s}\ntimeout_grace_s = {grace_s}\n{more}'
    )


def at(told: dict[str, Any], key: str = "timestamp") -> float:
    return datetime.fromisoformat(told[key]).timestamp()


async def silent(client: Client, name: str, times: int = 1) -> dict[str, Any]:
    await client.until(lambda: client.statuses(name).count("TIMED_OUT") == times)
    return next(told for told in reversed(client.of(name)) if told["status"] == "TIMED_OUT")


async def at_work(client: Client, name: str) -> None:
    await client.until(lambda: any(told["message"] == "frame 1" for told in client.of(name)))


async def test_a_worker_that_is_killed_is_noticed_and_replaced(
    daemon: DaemonProcess, client: Client, farm: Worker, tmp_path: Path
) -> None:
    """TIMED_OUT at the deadline; the next attempt, with a new token, is done by another worker."""
    retry = "[actions.render.retry]\nattempts = 2\nfirst_s = 0.1\non_timeout = true\n"
    configure(daemon, update_s=1.5, grace_s=0.5, more=retry)
    daemon.start()
    await client.submit("render", "1", {"steps": 8, "step_s": 0.25})
    await at_work(client, "1")
    farm.kill()
    told = await silent(client, "1")
    deadline = at([each for each in client.of("1") if each["status"] == "RUNNING"][-1], "updateDeadline")
    assert -0.002 <= at(told) - deadline < 3.0
    other = Worker(daemon, tmp_path / "other.log")
    try:
        await client.until(lambda: client.statuses("1")[-1] == "COMPLETED")
    finally:
        other.kill()
    end = client.of("1")[-1]
    assert (end["attempt"], end["jobContextVariables"], end["externalId"]) == (2, {"frames": 8}, "1/2")


async def test_a_worker_that_stood_still_for_too_long_counts_no_more(
    daemon: DaemonProcess, client: Client, farm: Worker
) -> None:
    """Its late updates are refused, and nothing of them is applied."""
    configure(daemon, update_s=1.0, grace_s=1.0)
    daemon.start()
    await client.submit("render", "1", {"steps": 8, "step_s": 0.2})
    await at_work(client, "1")
    farm.process.send_signal(signal.SIGSTOP)
    await silent(client, "1")
    await asyncio.sleep(2.0)
    farm.process.send_signal(signal.SIGCONT)
    async with asyncio.timeout(20):
        while farm.answers("1")[-1]["accepted"]:
            await asyncio.sleep(0.1)
    assert "grace" in farm.answers("1")[-1]["reason"]
    assert client.statuses("1")[-1] == "TIMED_OUT"
    kept = daemon.reader()
    assert (kept.find("1").status.value, kept.find("1").fenced) == ("TIMED_OUT", True)
    assert kept.history("1")[-1].event == "Progressed refused"


async def test_a_worker_that_stood_still_within_the_grace_goes_on(
    daemon: DaemonProcess, client: Client, farm: Worker
) -> None:
    """The job completes, and it is told that it was late."""
    configure(daemon, update_s=1.0, grace_s=60)
    daemon.start()
    await client.submit("render", "1", {"steps": 8, "step_s": 0.2})
    await at_work(client, "1")
    farm.process.send_signal(signal.SIGSTOP)
    await silent(client, "1")
    farm.process.send_signal(signal.SIGCONT)
    await client.until(lambda: client.statuses("1")[-1] == "COMPLETED")
    told = client.of("1")
    revived = told[client.statuses("1").index("TIMED_OUT") + 1]
    assert (revived["status"], revived["late"]) == ("RUNNING", True)
    assert (told[-1]["attempt"], told[-1]["jobContextVariables"]) == (1, {"frames": 8})
    assert all(each["accepted"] for each in farm.answers("1"))


JOBS = 500
SILENT = 50
"""Of them, handed to nobody: their work never tells anything."""


async def launch_many(daemon: DaemonProcess, client: Client, step_s: float) -> list[str]:
    """So many jobs run outside; some of them silently."""
    names = [f"{'silent' if number < SILENT else 'works'}-{number}" for number in range(JOBS)]
    for name in names:
        action = "farm" if name.startswith("silent") else "render"
        await client.submit(action, name, {"steps": 4, "step_s": step_s} if action == "render" else {})
    await client.until(
        lambda: all(any(told.get("externalId") for told in client.of(name)) for name in names), 120
    )
    return names


async def check_ends(daemon: DaemonProcess, client: Client, farm: Worker, names: list[str]) -> None:
    """None is lost, each ends as told, none was started or done twice."""

    def ended(name: str) -> bool:
        return client.statuses(name)[-1] == ("TIMED_OUT" if name.startswith("silent") else "COMPLETED")

    try:
        await client.until(lambda: all(map(ended, names)), 120)
    except TimeoutError:
        wrong = {name: client.of(name)[-3:] for name in names if not ended(name)}
        raise AssertionError(f"{len(wrong)} did not end well: {list(wrong.items())[:3]}") from None
    kept = {each.execution_id: each for each in daemon.reader().page(Filter(), most=JOBS + 10).executions}
    for name in names:
        told = client.of(name)
        assert (kept[name].status.value, kept[name].sequence) == (told[-1]["status"], told[-1]["sequence"])
        assert [each["sequence"] for each in told] == list(range(1, len(told) + 1))
        assert {each["attempt"] for each in told} == {1}
        if name.startswith("works"):
            answers = farm.answers(name)
            assert [each["status"] for each in answers] == ["RUNNING"] * 4 + ["COMPLETED"]
            assert all(each["accepted"] for each in answers)
    starts = Counter(daemon.starts())
    assert all(count == 1 for count in starts.values())


async def test_a_killed_daemon_loses_none_of_what_runs_outside(
    daemon: DaemonProcess, client: Client, farm: Worker
) -> None:
    """After the restart each completes, or is TIMED_OUT; the work outside notices nothing but a late answer."""
    configure(daemon, update_s=8.0, grace_s=120)
    text = daemon.configuration.read_text()
    daemon.configuration.write_text(
        text.replace("[actions.farm]\n", "[actions.farm]\nupdate_timeout_s = 12\n")
    )
    daemon.start()
    names = await launch_many(daemon, client, 1.5)
    daemon.kill()
    await asyncio.sleep(3)
    daemon.start()
    await check_ends(daemon, client, farm, names)


async def test_a_daemon_that_is_stopped_lets_the_work_outside_go_on(
    daemon: DaemonProcess, client: Client, farm: Worker
) -> None:
    """It does not wait for it, interrupts and hands back nothing of it; its successor hears the end."""
    configure(daemon, update_s=30.0, grace_s=120)
    daemon.start()
    names = [f"works-{number}" for number in range(20)]
    for name in names:
        await client.submit("render", name, {"steps": 4, "step_s": 1.0})
    for name in names:
        await at_work(client, name)
    begin = time.monotonic()
    assert await asyncio.to_thread(daemon.stop) == 0
    assert time.monotonic() - begin < 4
    assert {client.statuses(name)[-1] for name in names} == {"RUNNING"}
    await asyncio.sleep(3)
    daemon.start()
    await check_ends(daemon, client, farm, names)
