"""Locks that a workflow holds across its stages, on a real broker: one after the other, kept, lost, within."""

from __future__ import annotations

import asyncio
import json
import secrets
import signal
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from tests.support.amqp import Client, delete_all
from tests.support.process import DaemonProcess

ALONE = """
name: alone
variables: {asset: 42, seconds: 0.1}
locks: [{resource: "asset/{{ workflow.asset }}"}]
stages:
  - {name: first, action: staged, configuration: {seconds: "{{ workflow.seconds }}"}}
  - {name: second, action: staged, configuration: {seconds: "{{ workflow.seconds }}"}}
  - {name: clean, action: staged, always: true}
"""
HASTY = """
name: hasty
locks: [{resource: asset/hasty}]
lockTimeout: 1
stages:
  - {name: first, action: staged, configuration: {seconds: 3}}
"""
WITHIN = """
name: within
variables: {asset: 43}
locks: [{resource: "asset/{{ workflow.asset }}"}]
stages:
  - {name: inner, workflow: alone, variables: {asset: "{{ workflow.asset }}", seconds: 0}}
  - name: each
    action: staged
    forEach: [1, 2, 3]
    locks: [{resource: "asset/{{ workflow.asset }}"}]
    configuration: {seconds: 0.1}
  - name: write
    action: locked
    configuration: {seconds: 0}
"""
LOCKED = """
[actions.locked]
executor = "tests.support.executors:Locked"
"""
FOLDED = (ALONE, HASTY, WITHIN)


@pytest.fixture(scope="module")
def module_daemon(broker: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """One daemon in all roles for these tests, with their definitions."""
    prefix = f"t{secrets.token_hex(4)}"
    process = DaemonProcess(broker.url, prefix, tmp_path_factory.mktemp("daemon"))
    process.configure(LOCKED, locks={"tell_places_every_s": 0.2})
    put(process)
    process.start()
    yield process
    process.kill()
    asyncio.run(delete_all(broker.url, prefix))


@pytest.fixture
async def listener(module_daemon: DaemonProcess) -> AsyncIterator[Client]:
    async with Client(module_daemon.url, module_daemon.prefix) as connected:
        yield connected


def put(process: DaemonProcess) -> None:
    folder = process.folder / "data" / "workflows"
    folder.mkdir(parents=True)
    for text in FOLDED:
        (folder / f"{text.split()[1]}.yaml").write_text(text)


def statuses(client: Client, workflow_id: str) -> list[str]:
    return [told["status"] for told in client.of_workflow(workflow_id)]


def held(process: DaemonProcess) -> dict[str, tuple[list[str], list[str]]]:
    """Holders and waiters, by resource, as `jef locks` has them."""
    done = process.jef("locks", "--json")
    assert done.returncode == 0, done.stderr
    told = [json.loads(line) for line in done.stdout.splitlines()]
    return {
        each["resource"]: (
            [holder["owner"] for holder in each["holders"]],
            [waiter["owner"] for waiter in each["waiters"]],
        )
        for each in told
    }


async def test_workflows_over_one_lock_never_overlap(listener: Client) -> None:
    """Not only their stages: nothing of another runs between the first stage of one and its cleaning up."""
    names = [f"alone-{number}" for number in range(5)]
    for name in names:
        await listener.start_workflow("alone", name)
    for name in names:
        assert (await listener.end_of_workflow(name, 60))["status"] == "COMPLETED"
    order = []
    for told in listener.told:
        owner = str(told["executionId"]).partition(":")[0]
        if owner in names and told["status"] in {"RUNNING", "COMPLETED"}:
            order.append(owner)
    turns = [owner for place, owner in enumerate(order) if place == 0 or order[place - 1] != owner]
    assert sorted(turns) == names, f"one after the other: {turns}"
    assert turns == names, "in the order in which they came"


async def test_whoever_waits_says_for_whom(module_daemon: DaemonProcess, listener: Client) -> None:
    await listener.start_workflow("alone", "holds", variables={"asset": "seen", "seconds": 60})
    await listener.until(lambda: "RUNNING" in listener.statuses("holds:first:1"))
    for name in ("waits-1", "waits-2"):
        await listener.start_workflow("alone", name, variables={"asset": "seen"})
        await listener.until(lambda name=name: bool(waiting(listener, name)))  # type: ignore[misc]  # bound now
    assert waiting(listener, "waits-1")[-1] == {
        "resource": "asset/seen",
        "mode": "EXCLUSIVE",
        "position": 1,
        "holders": ["workflow/holds"],
    }
    assert waiting(listener, "waits-2")[-1]["position"] == 2
    assert held(module_daemon)["asset/seen"] == (
        ["workflow/holds"],
        ["workflow/waits-1", "workflow/waits-2"],
    )
    shown = module_daemon.jef("workflows", "show", "waits-1").stdout
    assert "waits for asset/seen, held by workflow/holds, number 1 in the queue" in shown
    assert "asset/seen  EXCLUSIVE  not held" in shown
    assert "EXCLUSIVE  held, number 1" in module_daemon.jef("workflows", "show", "holds").stdout
    listed = module_daemon.jef("workflows", "list", "--status", "waiting_for_lock").stdout
    assert sorted(line.split()[0] for line in listed.splitlines()[1:]) == ["waits-1", "waits-2"]
    # One that waits is cancelled at once and moves nobody but those behind it; then the holder, and the next begins.
    await listener.send("control", {"command": "cancel", "workflowId": "waits-1", "reason": "not now"})
    assert (await listener.end_of_workflow("waits-1"))["status"] == "CANCELLED"
    await listener.until(lambda: waiting(listener, "waits-2")[-1]["position"] == 1)
    await listener.send("control", {"command": "cancel", "workflowId": "holds"})
    assert (await listener.end_of_workflow("holds"))["status"] == "CANCELLED"
    assert (await listener.end_of_workflow("waits-2"))["status"] == "COMPLETED"
    assert statuses(listener, "waits-2")[:2] == ["QUEUED", "WAITING_FOR_LOCK"]
    history = module_daemon.jef("workflows", "history", "waits-2").stdout
    assert "LocksGranted by locks: asset/seen EXCLUSIVE, number 2" in history
    await free(module_daemon, "asset/seen")


def waiting(client: Client, workflow_id: str) -> list[dict[str, Any]]:
    return [told["waitingFor"] for told in client.of_workflow(workflow_id) if "waitingFor" in told]


async def free(process: DaemonProcess, resource: str) -> None:
    async with asyncio.timeout(30):
        while resource in await asyncio.to_thread(held, process):
            await asyncio.sleep(0.1)


async def test_a_lock_that_is_taken_away_stops_what_runs_and_a_retry_goes_on(
    module_daemon: DaemonProcess, listener: Client
) -> None:
    await listener.start_workflow("alone", "robbed", variables={"asset": "x", "seconds": 60})
    await listener.until(lambda: "RUNNING" in listener.statuses("robbed:first:1"))
    done = module_daemon.jef("locks", "release", "--force", "asset/x", "--reason", "the asset is deleted")
    assert done.returncode == 0, done.stderr
    end = await listener.end_of_workflow("robbed")
    assert (end["status"], end["error"]["type"], end["error"]["stage"]) == ("FAILED", "LockLost", None)
    assert "the asset is deleted" in end["message"]
    assert {stage["name"]: stage["status"] for stage in end["stages"]} == {
        "first": "CANCELLED",
        "second": "NOT_RUN",
        "clean": "COMPLETED",
    }
    assert listener.statuses("robbed:first:1")[-1] == "CANCELLED"
    module_daemon.jef("workflows", "retry", "robbed", "first.seconds:=0", "second.seconds:=0")
    await listener.until(lambda: statuses(listener, "robbed")[-1] == "COMPLETED")
    assert (await listener.end_of("robbed:first:2"))["status"] == "COMPLETED"
    await free(module_daemon, "asset/x")


async def test_a_wait_for_locks_has_an_end(module_daemon: DaemonProcess, listener: Client) -> None:
    """And what has waited too long holds no place in the queue."""
    for name in ("hasty-1", "hasty-2"):
        await listener.start_workflow("hasty", name)
    end = await listener.end_of_workflow("hasty-2")
    assert end["message"] == "LockTimeout: waited for its locks longer than 1 s"
    assert (end["status"], end["error"]["type"]) == ("FAILED", "LockTimeout")
    assert (await listener.end_of_workflow("hasty-1"))["status"] == "COMPLETED"
    await free(module_daemon, "asset/hasty")


async def test_what_is_within_a_workflow_does_not_wait_for_it(listener: Client) -> None:
    """A workflow and stages that name what it holds: they run, and keep one another out."""
    await listener.start_workflow("within", "w")
    assert (await listener.end_of_workflow("w", 60))["status"] == "COMPLETED"
    assert statuses(listener, "w:inner:1")[-1] == "COMPLETED"
    running: set[str] = set()
    for told in listener.told:
        name = str(told["executionId"])
        if name.startswith("w:each."):
            (running.add if told["status"] == "RUNNING" else running.discard)(name)
            assert len(running) <= 1, "each alone"
    # Whoever writes to a store that refuses older numbers has the workflow's.
    written = await listener.end_of("w:write:1")
    assert written["jobContextVariables"]["tokens"] == {"asset/43": ["EXCLUSIVE", 1]}


async def test_a_killed_coordinator_keeps_its_locks(
    daemon: DaemonProcess, client: Client, amqp_url: str, prefix: str, tmp_path: Any
) -> None:
    """Killed while it holds one and another waits: both go on where they were, and all is free in the end."""
    coordinator = DaemonProcess(amqp_url, prefix, tmp_path / "coordinator")
    coordinator.arguments = ("--role", "workflows")
    put(coordinator)
    daemon.arguments = ("--role", "worker", "--role", "locks", "--role", "watcher")
    try:
        for process in (daemon, coordinator):
            await asyncio.to_thread(process.start)
        for name in ("first", "second"):
            await client.start_workflow("alone", name, variables={"seconds": 2})
            await client.until(lambda name=name: "WAITING_FOR_LOCK" in statuses(client, name))  # type: ignore[misc]
        await client.until(lambda: "RUNNING" in client.statuses("first:first:1"))
        await client.until(lambda: bool(waiting(client, "second")))
        coordinator.signal(signal.SIGKILL)
        coordinator.kill()
        # The stage ends while nobody hears of it; the lock stays whose it is.
        assert (await client.end_of("first:first:1"))["status"] == "COMPLETED"
        assert held(daemon)["asset/42"] == (["workflow/first"], ["workflow/second"])
        await asyncio.to_thread(coordinator.start)
        assert (await client.end_of_workflow("first"))["status"] == "COMPLETED"
        assert (await client.end_of_workflow("second"))["status"] == "COMPLETED"
        order = [name.partition(":")[0] for name, _ in daemon.starts()]
        assert order == ["first"] * 3 + ["second"] * 3
        await free(daemon, "asset/42")
    finally:
        coordinator.kill()
