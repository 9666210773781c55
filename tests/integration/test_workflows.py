"""Workflows on a real broker: a daemon in all roles, a client that knows only the wire protocol."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from tests.support.amqp import Client, delete_all
from tests.support.process import DaemonProcess

LINE = """
name: line
variables: {asset: null, seen: 0}
stages:
  - name: first
    action: staged
    configuration:
      result: "{{ workflow.asset }}"
      job: {size: 3}
      workflow: {seen: 7}
  - name: second
    action: staged
    configuration:
      result: "{{ job.size + workflow.seen }} of {{ stages.first.result }}"
      job: {more: true}
  - name: clean
    action: staged
    always: true
"""
FAN = """
name: fan
required: [points]
stages:
  - name: each
    action: staged
    forEach: workflow.points
    limit: 2
    retry: {attempts: 2}
    configuration: {result: "{{ index }}:{{ item }}", fails: "{{ 1 if item == 'b' else 0 }}"}
  - name: all
    action: staged
    configuration: {result: "{{ stages.each.result | join(' ') }}"}
"""
BROKEN = """
name: broken
stages:
  - {name: first, action: staged}
  - {name: second, action: staged, configuration: {fails: 1}}
  - {name: third, action: staged, configuration: {result: "{{ stages.second.result }}"}}
  - {name: clean, action: quick, always: true}
"""
SLOW = """
name: slow
concurrency: 2
stages:
  - {name: first, action: slow, configuration: {seconds: 60}}
  - {name: second, action: staged}
  - {name: clean, action: quick, always: true}
"""
OUTER = """
name: outer
variables: {asset: 1}
stages:
  - name: inner
    workflow: line
    variables: {asset: "a{{ workflow.asset }}"}
  - name: behind
    action: staged
    configuration: {result: "{{ job.seen }} {{ stages.inner.variables.asset }}"}
"""
SILENT = """
name: silent
stages:
  - name: render
    action: farm
    timeouts: {update: 1}
    onTimeout: retry
    retry: {attempts: 2}
  - {name: after, action: staged}
"""
FOREIGN = """
name: foreign
stages:
  - {name: elsewhere, action: enterprise, elsewhere: true}
  - {name: after, action: staged, configuration: {result: "{{ job.where }}"}}
"""


@pytest.fixture(scope="module")
def module_daemon(broker: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """One daemon in all roles for all of these tests, with their definitions."""
    prefix = f"t{secrets.token_hex(4)}"
    process = DaemonProcess(broker.url, prefix, tmp_path_factory.mktemp("daemon"))
    folder = process.folder / "data" / "workflows"
    folder.mkdir(parents=True)
    for text in (LINE, FAN, BROKEN, SLOW, OUTER, SILENT, FOREIGN):
        name = text.split()[1]
        (folder / f"{name}.yaml").write_text(text)
    process.start()
    yield process
    process.kill()
    import asyncio

    asyncio.run(delete_all(broker.url, prefix))


@pytest.fixture
async def listener(module_daemon: DaemonProcess) -> AsyncIterator[Client]:
    async with Client(module_daemon.url, module_daemon.prefix) as connected:
        yield connected


def stages(told: dict[str, Any]) -> dict[str, str]:
    return {stage["name"]: stage["status"] for stage in told["stages"]}


async def test_variables_are_passed_along(listener: Client) -> None:
    """Job variables to the next stage, workflow variables over the context, as the seed says."""
    await listener.start_workflow("line", "w-1", variables={"asset": "a/42"})
    end = await listener.end_of_workflow("w-1")
    assert end["status"] == "COMPLETED", end
    assert end["variables"] == {"asset": "a/42", "seen": 7}
    assert stages(end) == {"first": "COMPLETED", "second": "COMPLETED", "clean": "COMPLETED"}
    second = await listener.end_of("w-1:second:1")
    assert second["workflowId"] == "w-1"
    assert second["result"] == "10 of a/42"
    assert second["jobContextVariables"]["saw"]["job"]["size"] == 3
    statuses = [told["status"] for told in listener.of_workflow("w-1")]
    assert statuses == ["QUEUED", "RUNNING", "RUNNING", "RUNNING", "COMPLETED"]


async def test_a_list_fans_out_within_its_limit_and_is_collected_in_order(listener: Client) -> None:
    """And the item whose first job fails has another."""
    await listener.start_workflow("fan", "w-2", variables={"points": ["a", "b", "c", "d"]})
    end = await listener.end_of_workflow("w-2")
    assert end["status"] == "COMPLETED", end
    assert (await listener.end_of("w-2:all:1"))["result"] == "0:a 1:b 2:c 3:d"
    assert (await listener.end_of("w-2:each.1:1"))["status"] == "FAILED"
    assert (await listener.end_of("w-2:each.1:2"))["status"] == "COMPLETED"
    assert not listener.of("w-2:each.0:2")
    running, most = set(), 0
    for told in listener.told:
        if str(told["executionId"]).startswith("w-2:each."):
            if told["status"] == "RUNNING":
                running.add(told["executionId"])
            elif told["status"] in {"COMPLETED", "FAILED"}:
                running.discard(told["executionId"])
            most = max(most, len(running))
    assert most <= 2


async def test_a_failure_is_the_workflows_and_a_retry_goes_on_from_there(
    module_daemon: DaemonProcess, listener: Client
) -> None:
    """With what was done, and with the configuration that a person changed."""
    await listener.start_workflow("broken", "w-3")
    end = await listener.end_of_workflow("w-3")
    assert end["status"] == "FAILED"
    assert end["error"]["stage"] == "second"
    assert stages(end) == {"first": "COMPLETED", "second": "FAILED", "third": "NOT_RUN", "clean": "COMPLETED"}
    refused = module_daemon.jef("workflows", "retry", "w-3", "secnd.fails:=0")
    assert refused.returncode == 1
    assert "there is no stage 'secnd'" in refused.stdout
    retried = module_daemon.jef("workflows", "retry", "w-3", "second.fails:=0", "second.result=mended")
    assert retried.returncode == 0, retried.stdout + retried.stderr
    await listener.until(lambda: listener.of_workflow("w-3")[-1]["status"] == "COMPLETED")
    assert (await listener.end_of("w-3:third:1"))["result"] == "mended"
    started = [name for name, _ in module_daemon.starts() if name.startswith("w-3:")]
    assert sorted(started) == [
        *("w-3:clean:1", "w-3:clean:2", "w-3:first:1"),
        *("w-3:second:1", "w-3:second:2", "w-3:third:1"),
    ]


async def test_a_cancel_reaches_what_runs_waits_and_is_queued(
    module_daemon: DaemonProcess, listener: Client
) -> None:
    """Two run, as the definition allows; the third is QUEUED. All are cancelled, and what began is cleaned up."""
    for name in ("w-4", "w-5", "w-6"):
        await listener.start_workflow("slow", name)
    await listener.until(
        lambda: all("RUNNING" in listener.statuses(f"{each}:first:1") for each in ("w-4", "w-5"))
    )
    assert listener.of_workflow("w-6")[-1]["status"] == "QUEUED"
    assert not listener.of("w-6:first:1")
    done = module_daemon.jef("workflows", "cancel", "w-6", "w-4", "--reason", "wrong file")
    assert done.returncode == 0, done.stdout + done.stderr
    end = await listener.end_of_workflow("w-4")
    assert (end["status"], end["message"]) == ("CANCELLED", "wrong file")
    assert stages(end) == {"first": "CANCELLED", "second": "NOT_RUN", "clean": "COMPLETED"}
    assert (await listener.end_of("w-4:first:1"))["by"].startswith("operator:workflow w-4")
    never = await listener.end_of_workflow("w-6")
    assert stages(never) == {"first": "NOT_RUN", "second": "NOT_RUN", "clean": "NOT_RUN"}
    # By the wire, as any client does; the place is the next one's.
    await listener.start_workflow("slow", "w-7")
    await listener.until(lambda: "RUNNING" in listener.statuses("w-7:first:1"))
    for name in ("w-5", "w-7"):
        await listener.send("control", {"command": "cancel", "workflowId": name})
        assert (await listener.end_of_workflow(name))["status"] == "CANCELLED"
        assert (await listener.end_of(f"{name}:clean:1"))["status"] == "COMPLETED"


async def test_a_cancel_that_comes_before_its_workflow_is_remembered(listener: Client) -> None:
    queue = await listener.channel.declare_queue(exclusive=True)
    await listener.send(
        "control",
        {"command": "cancel", "workflowId": "w-8", "reason": "not wanted"},
        reply_to=queue.name,
        correlation_id="1",
    )
    await listener.until_answered(queue)
    await listener.start_workflow("line", "w-8")
    end = await listener.end_of_workflow("w-8")
    assert (end["status"], end["message"]) == ("CANCELLED", "not wanted")
    assert not listener.of("w-8:first:1")


async def test_a_workflow_within_a_workflow(listener: Client) -> None:
    """Its context at the end is what the stage passes on."""
    await listener.start_workflow("outer", "w-9")
    end = await listener.end_of_workflow("w-9")
    assert end["status"] == "COMPLETED", end
    assert (await listener.end_of("w-9:behind:1"))["result"] == "7 a1"
    inner = await listener.end_of_workflow("w-9:inner:1")
    assert (inner["workflow"], inner["status"]) == ("line", "COMPLETED")


async def test_the_same_request_again_starts_nothing(listener: Client, module_daemon: DaemonProcess) -> None:
    """Of a finished one, the end is told again."""
    for _ in range(3):
        await listener.start_workflow("line", "w-10")
    await listener.end_of_workflow("w-10")
    before = len(listener.told_of_workflows)
    await listener.start_workflow("line", "w-10")
    await listener.until(lambda: len(listener.told_of_workflows) > before)
    assert listener.told_of_workflows[-1] == (await listener.end_of_workflow("w-10"))
    started = [name for name, _ in module_daemon.starts() if name.startswith("w-10:")]
    assert sorted(started) == ["w-10:clean:1", "w-10:first:1", "w-10:second:1"]


async def test_what_is_no_workflow_is_a_dead_letter_and_told(listener: Client) -> None:
    await listener.start_workflow("lin", "w-11")
    await listener.start_workflow("fan", "w-12")
    assert "there is no workflow 'lin'" in (await listener.end_of_workflow("w-11"))["message"]
    missing = await listener.end_of_workflow("w-12")
    assert missing["status"] == "FAILED"
    assert missing["error"]["message"] == "field-invalid: variables: points required by the workflow 'fan'"
    reasons = {str(letter.headers["x-jef-reason"]) for letter in await listener.dead_letters(2)}
    assert reasons == {"workflow-invalid", "field-invalid"}


async def test_a_job_that_another_executor_completes(listener: Client) -> None:
    """Enterprise's own: it takes the request from its queue and tells the end itself."""
    prefix = listener.prefix
    queue = await listener.channel.declare_queue(f"{prefix}.jobs.enterprise", durable=True)
    await queue.bind(f"{prefix}.jobs", "enterprise")
    await listener.start_workflow("foreign", "w-13")
    found: list[dict[str, Any]] = []

    async def take(message: Any) -> None:
        found.append(json.loads(message.body))
        await message.ack()

    await queue.consume(take)
    await listener.until(lambda: bool(found))
    assert (found[0]["executionId"], found[0]["stage"]) == ("w-13:elsewhere:1", "elsewhere")
    told = {
        "executionId": "w-13:elsewhere:1",
        "workflowId": "w-13",
        "progress": 100,
        "message": "",
        "status": "COMPLETED",
        "jobContextVariables": {"where": "Enterprise"},
        "sequence": 1,
    }
    await listener.tell("enterprise.completed", told)
    assert (await listener.end_of_workflow("w-13"))["status"] == "COMPLETED"
    assert (await listener.end_of("w-13:after:1"))["result"] == "Enterprise"
    await queue.delete(if_unused=False, if_empty=False)


async def test_a_timed_out_job_is_cancelled_and_another_started(listener: Client) -> None:
    """onTimeout: retry, twice; then it has failed, and the workflow goes the way of any failure."""
    await listener.start_workflow("silent", "w-14")
    end = await listener.end_of_workflow("w-14", 60)
    assert (end["status"], end["error"]["type"]) == ("FAILED", "TimedOut")
    for attempt in (1, 2):
        assert listener.statuses(f"w-14:render:{attempt}")[-2:] == ["TIMED_OUT", "CANCELLED"]
    assert not listener.of("w-14:render:3")


async def test_people_see_stages_variables_and_history(
    module_daemon: DaemonProcess, listener: Client
) -> None:
    waited = module_daemon.jef("workflows", "start", "line", "asset=7", "--id", "w-15", "--wait")
    assert waited.returncode == 0, waited.stderr
    assert waited.stdout.splitlines()[-1].split()[1:4] == ["w-15", "COMPLETED", "100%"]
    shown = module_daemon.jef("workflows", "show", "w-15").stdout
    assert [line.split() for line in shown.partition("Variables\n")[2].splitlines()] == [
        ["asset", "7", "request"],
        ["seen", "7", "first"],
    ]
    document = json.loads(module_daemon.jef("workflows", "show", "w-15", "--json").stdout)
    assert [stage["jobs"][0]["executionId"] for stage in document["stages"]] == [
        *("w-15:first:1", "w-15:second:1", "w-15:clean:1")
    ]
    listed = module_daemon.jef(
        "workflows", "list", "--workflow", "line", "--status", "completed", "--json"
    ).stdout
    assert "w-15" in {json.loads(line)["workflowId"] for line in listed.splitlines()}
    history = module_daemon.jef("workflows", "history", "w-15").stdout
    words = [line.split()[3] for line in history.splitlines()]
    assert words == ["Accepted", "Begun", *["Started", "Completed"] * 3, "Completed"]
    purged = module_daemon.jef("purge", "--older-than", "0s", "--yes")
    assert re.search(r"\d+ executions and \d+ workflows deleted", purged.stdout), purged
    assert module_daemon.jef("workflows", "show", "w-15").returncode == 6
    unknown = module_daemon.jef("workflows", "show", "nobody")
    assert unknown.returncode == 6
    assert module_daemon.jef("workflows", "cancel", "nobody").returncode == 6
