"""Two daemons on one prefix, each in all roles with a ledger of its own: the workflows are those of one."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from jef_daemon.names import Names
from tests.support.amqp import Client
from tests.support.process import DaemonProcess

LINE = """
name: line
stages:
  - {name: first, action: staged, configuration: {job: {size: 3}}}
  - {name: second, action: staged, configuration: {result: "{{ job.size }}"}}
"""
KEPT = "workflows_kept_elsewhere"


@pytest.fixture
def second(daemon: DaemonProcess, tmp_path: Path) -> Any:
    """Beside `daemon`, with the same definition."""
    process = DaemonProcess(daemon.url, daemon.prefix, tmp_path / "second")
    for each in (daemon, process):
        folder = each.folder / "data" / "workflows"
        folder.mkdir(parents=True)
        (folder / "line.yaml").write_text(LINE)
        each.configure(slots={"total": 2})
    yield process
    process.kill()


def kept(daemon: DaemonProcess) -> list[dict[str, Any]]:
    return [event for event in daemon.events() if event["event"] == KEPT]


def workflows(daemon: DaemonProcess) -> list[str]:
    listed = daemon.jef("workflows", "list", "--json")
    assert listed.returncode == 0, listed.stderr
    return sorted(line.split('"workflowId": "')[1].split('"')[0] for line in listed.stdout.splitlines())


async def test_one_coordinator_carries_out_what_both_work_on(
    daemon: DaemonProcess, second: DaemonProcess, client: Client
) -> None:
    """The second takes no request, though it serves stages of theirs; each is started once."""
    daemon.start()
    second.start()
    told = second.wait_for(KEPT)
    assert told["consequence"] == "this daemon is no coordinator; the one with that ledger is"
    assert told["remedy"].endswith(f"delete the exchange {Names(daemon.prefix).workflow_keeper}")
    names = [f"w-{number}" for number in range(12)]
    for name in names:
        await client.start_workflow("line", name)
    ends = [await client.end_of_workflow(name) for name in names]
    assert {end["status"] for end in ends} == {"COMPLETED"}
    assert workflows(daemon) == sorted(names)
    assert workflows(second) == []
    started = [name for process in (daemon, second) for name, _ in process.starts()]
    assert sorted(started) == sorted(f"{name}:{stage}:1" for name in names for stage in ("first", "second"))
    assert second.starts()
    assert kept(daemon) == []


async def test_a_coordinator_that_is_away_is_waited_for(
    daemon: DaemonProcess, second: DaemonProcess, client: Client
) -> None:
    """What another one began in its place would begin again in its ledger. Gone for good, the remedy helps."""
    daemon.start()
    assert await asyncio.to_thread(daemon.stop) == 0
    second.start()
    theirs = second.wait_for(KEPT)["ledger"]
    await client.start_workflow("line", "w-1")
    # The one that could take it wrongly works on something that was sent later.
    await client.submit("quick", "later")
    await client.end_of("later")
    assert client.of_workflow("w-1") == []
    daemon.start()
    assert (await client.end_of_workflow("w-1"))["status"] == "COMPLETED"
    assert (workflows(daemon), workflows(second)) == (["w-1"], [])
    assert kept(daemon) == []
    for process in (daemon, second):
        assert await asyncio.to_thread(process.stop) == 0
    assert {event["ledger"] for event in kept(second)} == {theirs}
    await client.channel.exchange_delete(Names(daemon.prefix).workflow_keeper)
    begin = second.log.stat().st_size
    second.start()
    await client.start_workflow("line", "w-2")
    assert (await client.end_of_workflow("w-2"))["status"] == "COMPLETED"
    assert workflows(second) == ["w-2"]
    assert KEPT not in {event["event"] for event in second.events(begin)}
