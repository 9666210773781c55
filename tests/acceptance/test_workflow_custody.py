"""Workflows under violence: coordinator and worker, two daemons, killed with -9 while they carry 300 of them out.

Each workflow comes to its end, each stage is done once, nothing is forgotten, nothing is started twice; and of those
that hold the same lock across their stages, one is over before the next begins.
"""

from __future__ import annotations

import asyncio
import os
import random
import sqlite3
from collections import Counter
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.amqp import Client
from tests.support.process import DaemonProcess

pytestmark = pytest.mark.timeout(300)
SEED = int(os.environ.get("JEF_TEST_SEED", "0")) or random.randrange(1, 10**6)
WORKFLOWS, KILLS, GROUPS = 300, 6, 20
DEFINITION = """
name: chain
variables: {seen: 0}
required: [group]
locks: [{resource: "group/{{ workflow.group }}"}]
stages:
  - {name: first, action: staged, retry: {attempts: 99}, configuration: {workflow: {seen: 1}, job: {k: 1}}}
  - name: each
    action: staged
    retry: {attempts: 99}
    forEach: [a, b]
    configuration: {result: "{{ item }}", seconds: 0.02}
  - name: last
    action: staged
    retry: {attempts: 99}
    configuration: {result: "{{ stages.each.result | join }}{{ workflow.seen }}"}
  - {name: clean, action: staged, retry: {attempts: 99}, always: true}
"""
AWAY = """
name: away
stages: [{name: a, action: away, elsewhere: true}]
"""
JOBS = ("first", "each.0", "each.1", "last", "clean")


@pytest.fixture
def coordinator(amqp_url: str, prefix: str, tmp_path: Path) -> Iterator[DaemonProcess]:
    """A daemon that only carries workflows out, with a ledger of its own."""
    process = DaemonProcess(amqp_url, prefix, tmp_path / "coordinator")
    process.arguments = ("--role", "workflows")
    folder = process.folder / "data" / "workflows"
    folder.mkdir(parents=True)
    (folder / "chain.yaml").write_text(DEFINITION)
    yield process
    process.kill()


async def test_kills_of_coordinator_and_worker(
    coordinator: DaemonProcess, daemon: DaemonProcess, client: Client
) -> None:
    random.seed(SEED)
    daemon.arguments = ("--role", "worker", "--role", "locks", "--role", "watcher")
    for process in (coordinator, daemon):
        await asyncio.to_thread(process.start)
    starting = asyncio.create_task(_start_all(client))
    for number in range(KILLS):
        await asyncio.sleep(random.uniform(0.2, 1.0))
        victim = (coordinator, daemon)[number % 2]
        victim.kill()
        await asyncio.to_thread(victim.start, ready=random.random() < 0.5)
    for name in await starting:
        assert (await client.end_of_workflow(name, 120))["status"] == "COMPLETED", f"seed {SEED}"
    _check(daemon, client)


async def test_a_coordinator_that_dies_before_its_ledger_has_it_loses_nothing(
    coordinator: DaemonProcess, client: Client
) -> None:
    """Killed while its ledger takes no writes: a request, then the end of a stage, come again to its next life."""
    (coordinator.folder / "data" / "workflows" / "away.yaml").write_text(AWAY)
    await asyncio.to_thread(coordinator.start)
    await _die_with(coordinator, client, "workflows", client.start_workflow("away", "w"))
    await client.until(lambda: bool(client.of_workflow("w")))
    assert client.of_workflow("w")[0]["status"] == "QUEUED"
    await client.until(lambda: client.of_workflow("w")[-1]["status"] == "RUNNING")
    end = {"executionId": "w:a:1", "status": "COMPLETED", "result": "done", "sequence": 1}
    await _die_with(coordinator, client, "coordinator", client.tell("away.completed", end))
    assert (await client.end_of_workflow("w"))["status"] == "COMPLETED"


async def _die_with(
    process: DaemonProcess, client: Client, queue: str, sent: Coroutine[Any, Any, None]
) -> None:
    """Let the process have a message that it cannot write down, kill it, start it again."""
    ledger = sqlite3.connect(process.folder / "data" / "ledger.db", isolation_level=None)
    ledger.execute("BEGIN IMMEDIATE")
    await sent
    name = f"{client.prefix}.{queue}"
    while (await client.channel.declare_queue(name, passive=True)).declaration_result.message_count:
        await asyncio.sleep(0.02)
    # It has the message now; this takes it longer than a word to the broker would.
    assert (await asyncio.to_thread(process.jef, "workflows", "show", "w", "--json")).returncode in {0, 6}
    process.kill()
    ledger.execute("ROLLBACK")
    ledger.close()
    await asyncio.to_thread(process.start)


async def _start_all(client: Client) -> list[str]:
    names = [f"w-{number}" for number in range(WORKFLOWS)]
    for name in names:
        await client.start_workflow("chain", name, variables={"group": group(name)})
        await asyncio.sleep(0.01)
    for name in random.sample(names, 30):  # a producer that is not sure asks again
        await client.start_workflow("chain", name, variables={"group": group(name)})
    return names


def group(name: str) -> int:
    return int(name.removeprefix("w-")) % GROUPS


def _check(daemon: DaemonProcess, client: Client) -> None:
    starts = Counter(name for name, _ in daemon.starts())
    assert not [name for name, count in starts.items() if count > 1], f"seed {SEED}: started twice"
    completed = Counter(
        str(told["executionId"]).rpartition(":")[0]
        for told in {(each["executionId"], each["sequence"]): each for each in client.told}.values()
        if told["status"] == "COMPLETED"
    )
    wanted = {f"w-{number}:{job}" for number in range(WORKFLOWS) for job in JOBS}
    assert completed == Counter(dict.fromkeys(wanted, 1)), f"seed {SEED}: each stage is done once"
    results = {told["executionId"]: told["result"] for told in client.told if told["status"] == "COMPLETED"}
    assert {result for name, result in results.items() if ":last:" in name} == {"ab1"}
    order = {name.rpartition(":")[0]: place for place, (name, _) in enumerate(daemon.starts())}
    for number in range(WORKFLOWS):
        first, *both, last, clean = (order[f"w-{number}:{job}"] for job in JOBS)
        assert first < min(both), f"seed {SEED}"
        assert max(both) < last < clean, f"seed {SEED}"
    for each in range(GROUPS):
        ours = [
            name.partition(":")[0] for name, _ in daemon.starts() if group(name.partition(":")[0]) == each
        ]
        turns = [name for place, name in enumerate(ours) if place == 0 or ours[place - 1] != name]
        assert len(turns) == len(set(turns)), f"seed {SEED}: two at once: {turns}"
