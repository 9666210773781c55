"""The main job on a real broker with a real daemon process: requests in, statuses out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.amqp import Client
from tests.support.process import DaemonProcess


async def test_a_job_goes_through_its_life_cycle(daemon: DaemonProcess, client: Client) -> None:
    """QUEUED, RUNNING, COMPLETED, with rising numbers and the seed's five keys first."""
    daemon.start()
    await client.submit(
        "quick", "624", {"result": "fine"}, jobContextVariables={"a": 1}, workflowContextVariables={"w": 2}
    )
    end = await client.end_of("624")
    assert client.statuses("624") == ["QUEUED", "RUNNING", "COMPLETED"]
    assert [told["sequence"] for told in client.of("624")] == [1, 2, 3]
    assert list(end)[:5] == ["executionId", "workflowId", "progress", "message", "status"]
    assert (end["result"], end["progress"], end["attempt"]) == ("fine", 100, 1)
    assert end["jobContextVariables"] == {"attempt": 1, "a": 1}
    assert end["workflowContextVariables"] == {"w": 2}


async def test_progress_is_coalesced_and_the_last_is_told(daemon: DaemonProcess, client: Client) -> None:
    """Many reports, few notifications, none of them lost at the end; from a coroutine and from a process."""
    daemon.start()
    for action in ("slow", "blocking"):
        await client.submit(action, action, {"seconds": 1.0, "steps": 50})
        await client.end_of(action)
        running = [told for told in client.of(action) if told["status"] == "RUNNING"]
        assert 3 <= len(running) <= 9, running
        assert running[-1]["message"] == "step 49"


async def test_a_command_runs_and_its_output_is_kept(daemon: DaemonProcess, client: Client) -> None:
    """A configured program; a missing placeholder is refused with its name."""
    daemon.configure('[actions.held]\ncommand = ["echo", "hello", "{configuration.name}"]\n')
    daemon.start()
    await client.submit("held", "1", {"name": "world; rm -rf /"})
    assert (await client.end_of("1"))["jobContextVariables"] == {
        "exitCode": 0,
        "output": "hello world; rm -rf /\n",
    }
    await client.submit("held", "2", {})
    assert "name" in (await client.end_of("2"))["message"]


async def test_files_only_below_the_roots(daemon: DaemonProcess, client: Client, tmp_path: Path) -> None:
    """Whoever may publish a request cannot read the machine; the daemon's own folder is the default root."""
    daemon.start()
    (daemon.folder / "data" / "files" / "a").write_bytes(b"abc")
    await client.submit("checksum", "in", {"path": "a"})
    assert (await client.end_of("in"))["jobContextVariables"]["digest"].startswith("ba7816bf")
    (daemon.folder / "data" / "files" / "link").symlink_to("/etc/passwd")
    for number, path in enumerate(["/etc/passwd", "../../../../../etc/passwd", "link"]):
        await client.submit("checksum", f"out{number}", {"path": path})
        end = await client.end_of(f"out{number}")
        assert end["error"]["type"] == "ConfigurationRefused"
        assert "outside the roots" in end["message"]


async def test_duplicates_run_once_and_hear_the_end_again(daemon: DaemonProcess, client: Client) -> None:
    """Submitted three times: one run; the late copy is told the stored end."""
    daemon.start()
    await client.submit("quick", "1")
    await client.submit("quick", "1")
    end = await client.end_of("1")
    before = len(client.told)
    await client.submit("quick", "1")
    await client.until(lambda: len(client.told) > before)
    assert client.told[-1] == end
    assert daemon.starts() == [("1", 1)]


async def test_the_final_notification_goes_to_reply_to(daemon: DaemonProcess, client: Client) -> None:
    """With the request's correlation id; a reply address that is gone harms nobody."""
    daemon.start()
    answers = await client.channel.declare_queue(exclusive=True)
    body = json.dumps({"executionId": "1"}).encode()
    await client.publish("quick", body, reply_to=answers.name, correlation_id="c-9")
    answer = None
    await client.end_of("1")
    async for message in answers.iterator(no_ack=True, timeout=10):
        answer = message
        break
    assert answer is not None
    assert (answer.correlation_id, json.loads(answer.body)["status"]) == ("c-9", "COMPLETED")
    await client.publish("quick", body.replace(b'"1"', b'"2"'), reply_to="nobody-at-all")
    await client.submit("quick", "3")
    assert (await client.end_of("3"))["status"] == "COMPLETED"


async def test_an_external_id_finds_the_job(daemon: DaemonProcess, client: Client) -> None:
    """It is kept as externalId, told, and found by the command line."""
    daemon.start()
    await client.submit("quick", "1", {"external_id": "render-77"})
    assert (await client.end_of("1"))["externalId"] == "render-77"
    shown = daemon.jef("show", "render-77", "--json")
    assert json.loads(shown.stdout)["executionId"] == "1"


async def test_traceparent_is_carried_through(daemon: DaemonProcess, client: Client) -> None:
    """From the request's header to each notification's."""
    daemon.start()
    seen = await client.channel.declare_queue(exclusive=True)
    await seen.bind(f"{client.prefix}.status", "#")
    header = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    await client.publish("quick", b'{"executionId": "1"}', headers={"traceparent": header})
    await client.end_of("1")
    headers = []
    async for message in seen.iterator(no_ack=True, timeout=10):
        headers.append(message.headers.get("traceparent"))
        if len(headers) == 3:
            break
    assert headers == [header] * 3


async def test_priorities_and_concurrency_rule_the_order(daemon: DaemonProcess, client: Client) -> None:
    """One place: the waiting ones start by priority, then by age."""
    daemon.configure("concurrency = 1\n".join(["", ""]), slots={"total": 1})
    daemon.start()
    await client.submit("slow", "first", {"seconds": 1.0})
    await client.until(lambda: "RUNNING" in client.statuses("first"))
    for name, priority in (("low", 0), ("low2", 0), ("high", 5)):
        await client.submit("slow", name, {"seconds": 0.01}, priority=priority)
    for name in ("low", "low2", "high"):
        await client.end_of(name)
    assert [name for name, _ in daemon.starts()] == ["first", "high", "low", "low2"]


async def test_not_before_holds_a_job_back(daemon: DaemonProcess, client: Client) -> None:
    """It is told QUEUED at once and starts no earlier than its instant."""
    from datetime import UTC, datetime, timedelta

    daemon.start()
    start = datetime.now(UTC) + timedelta(seconds=2)
    await client.submit("quick", "1", notBefore=start.isoformat())
    end = await client.end_of("1")
    assert datetime.fromisoformat(end["timestamp"]) >= start


async def test_the_scratch_folder_is_removed(daemon: DaemonProcess, client: Client) -> None:
    """Used by the executor, gone after the job."""
    daemon.start()
    await client.submit("blocking", "1")
    assert (await client.end_of("1"))["status"] == "COMPLETED"
    await client.submit("quick", "2")
    await client.end_of("2")
    assert not list((daemon.folder / "data" / "scratch").glob("*"))


async def test_an_execution_limit_ends_a_job(daemon: DaemonProcess, client: Client) -> None:
    """A coroutine, a process and a command; each is stopped and told why."""
    daemon.start()
    for action in ("slow", "blocking", "nap"):
        await client.submit(action, action, {"seconds": 60}, timeouts={"execution": 0.5})
    for action in ("slow", "blocking", "nap"):
        end = await client.end_of(action)
        assert end["error"]["type"] == "ExecutionTimeout", end
        assert "0.5 s" in end["message"]


@pytest.mark.parametrize("backlog", [1, 7])
async def test_a_small_backlog_leaves_requests_to_others(
    daemon: DaemonProcess, client: Client, backlog: int
) -> None:
    """A busy daemon takes in no more than its backlog, plus what was prefetched; the rest stays in RabbitMQ."""
    daemon.configure(slots={"total": 1, "backlog": backlog})
    daemon.start()
    await client.submit("slow", "long", {"seconds": 3.0})
    await client.until(lambda: "RUNNING" in client.statuses("long"))
    for number in range(40):
        await client.submit("slow", str(number), {"seconds": 0.01})
    await client.end_of("long")
    early = [told for told in client.told if told["status"] == "QUEUED"]
    assert len(early) <= 1 + 4 * backlog + 1
    for number in range(40):
        assert (await client.end_of(str(number)))["status"] == "COMPLETED"
