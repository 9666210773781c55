"""Commands and updates on a real broker with a real daemon: cancel, retry, jobs whose work runs outside."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import aio_pika

from jef_daemon.elsewhere import GONE
from tests.support.amqp import Client
from tests.support.process import DaemonProcess


async def ask(client: Client, queue: str, body: dict[str, Any]) -> dict[str, Any]:
    """Send a message to one of the daemon's queues; returns the answer."""
    answers = await client.channel.declare_queue(exclusive=True)
    message = aio_pika.Message(json.dumps(body).encode(), reply_to=answers.name, correlation_id="c")
    await client.channel.default_exchange.publish(message, f"{client.prefix}.{queue}")
    async with asyncio.timeout(10):
        async for answer in answers.iterator(no_ack=True):
            assert answer.correlation_id == "c"
            found: dict[str, Any] = json.loads(answer.body)
            return found
    raise AssertionError("no answer")


async def cancel(client: Client, execution_id: str, **more: Any) -> dict[str, Any]:
    body = {"command": "cancel", "executionId": execution_id, "reason": "wrong file", "by": "ann"}
    return await ask(client, "control", body | more)


async def test_whatever_runs_is_cancelled(daemon: DaemonProcess, client: Client) -> None:
    """A coroutine, a process, a command; and what waits. Who asked and why is told and kept."""
    daemon.configure(slots={"total": 3, "blocking_processes": 2})
    daemon.start()
    for action in ("slow", "blocking", "nap"):
        await client.submit(action, action, {"seconds": 60})
    await client.until(
        lambda: all("RUNNING" in client.statuses(name) for name in ("slow", "blocking", "nap"))
    )
    await client.submit("slow", "waits", {"seconds": 60})
    await client.until(lambda: "QUEUED" in client.statuses("waits"))
    assert (await cancel(client, "waits"))["status"] == "CANCELLED"
    for action in ("slow", "blocking", "nap"):
        assert await cancel(client, action) == {"accepted": True, "status": "RUNNING", "reason": None}
    for name in ("slow", "blocking", "nap", "waits"):
        end = await client.end_of(name)
        assert (end["status"], end["message"]) == ("CANCELLED", "wrong file"), end
    shown = daemon.jef("history", "slow").stdout
    assert "operator:ann" in shown


async def test_a_cancel_is_remembered_for_what_comes_later(daemon: DaemonProcess, client: Client) -> None:
    """Also across a restart; and never run."""
    daemon.start()
    answer = await cancel(client, "later")
    assert (answer["accepted"], answer["status"]) == (True, None)
    daemon.kill()
    daemon.start()
    await client.submit("quick", "later")
    assert (await client.end_of("later"))["status"] == "CANCELLED"
    assert client.statuses("later") == ["QUEUED", "CANCELLED"]
    assert daemon.starts() == []


async def test_failures_are_retried_as_the_policy_says(daemon: DaemonProcess, client: Client) -> None:
    """So often, then FAILED; each attempt told; by command once more."""
    daemon.configure("[actions.broken.retry]\nattempts = 3\nfirst_s = 0.1\n")
    daemon.start()
    await client.submit("broken", "1", {"how": "raise"})
    await client.until(lambda: client.statuses("1").count("FAILED") == 3)
    attempts = [told["attempt"] for told in client.of("1") if told["status"] == "FAILED"]
    assert attempts == [1, 2, 3]
    answer = await ask(client, "control", {"command": "retry", "executionId": "1"})
    assert (answer["accepted"], answer["status"]) == (True, "QUEUED")
    await client.until(lambda: client.statuses("1").count("FAILED") == 4)


async def test_work_that_runs_outside_is_moved_by_updates(daemon: DaemonProcess, client: Client) -> None:
    """Launched, progress, completed; a wrong token is refused and changes nothing."""
    daemon.start()
    await client.submit("farm", "1", {"how": "updates"})
    await client.until(lambda: any(told.get("externalId") for told in client.of("1")))
    token = client.of("1")[-1]["message"]
    running = {"executionId": "1", "token": token, "status": "RUNNING", "progress": 40, "message": "pass 1"}
    assert await ask(client, "updates", running) == {"accepted": True, "cancelRequested": False}
    refused = await ask(client, "updates", running | {"token": "x", "status": "COMPLETED"})
    assert refused["accepted"] is False
    gone = await ask(client, "updates", running | {"token": f"{'0' * 12}.x", "status": "COMPLETED"})
    assert gone == {"accepted": False, "reason": GONE}
    assert (await cancel(client, "1"))["status"] == "RUNNING"
    assert await ask(client, "updates", running | {"progress": 50}) == {
        "accepted": True,
        "cancelRequested": True,
    }
    done = running | {"status": "COMPLETED", "result": "fine", "jobContextVariables": {"frames": 7}}
    assert (await ask(client, "updates", done))["accepted"] is True
    end = await client.end_of("1")
    assert (end["result"], end["jobContextVariables"]) == ("fine", {"frames": 7})
    assert (await ask(client, "updates", done))["accepted"] is False
    assert (await cancel(client, "1"))["accepted"] is False


async def test_work_that_runs_outside_is_polled(daemon: DaemonProcess, client: Client) -> None:
    """Until it is done; a poll that fails by itself says nothing of the work; what was saved reaches the next."""
    daemon.start()
    for how in ("works", "hiccup", "fails"):
        await client.submit("polled", how, {"how": how})
    end = await client.end_of("works")
    assert (end["status"], end["result"], end["externalId"]) == ("COMPLETED", "3 polls", "farm-works")
    assert (await client.end_of("hiccup"))["status"] == "COMPLETED"
    failed = await client.end_of("fails")
    assert failed["error"]["message"] == "the farm is on fire"


async def test_an_executor_may_clean_up_within_the_grace(
    daemon: DaemonProcess, client: Client, tmp_path: Path
) -> None:
    """A coroutine, blocking code, a program; what it comes to meanwhile counts only where it is a completion."""
    trap = f"trap 'sleep 0.3; echo tidy > {tmp_path}/program; exit 1' TERM; sleep 600 & wait"
    daemon.configure(
        f"[actions.held]\ncommand = {json.dumps(['sh', '-c', trap])}\n", jobs={"kill_grace_s": 10.0}
    )
    daemon.start()
    expected = {
        "stops": ("tidy", "CANCELLED"),
        "breaks": ("tidy", "CANCELLED"),
        "completes": ("tidy", "COMPLETED"),
        "process": ("tidy-blocking", "CANCELLED"),
        "program": ("held", "CANCELLED"),
    }
    for name, (action, _) in expected.items():
        await client.submit(action, name, {"file": str(tmp_path / name), "how": name})
    await client.until(lambda: all("RUNNING" in client.statuses(name) for name in expected))
    for name in expected:
        assert (await cancel(client, name))["accepted"] is True
    for name, (_, status) in expected.items():
        assert (await client.end_of(name))["status"] == status, name
        assert (tmp_path / name).read_text().strip() == "tidy"


async def test_what_cannot_be_cancelled_runs_to_its_end_unless_forced(
    daemon: DaemonProcess, client: Client
) -> None:
    """The refusal says why; force stops it at once, and waiting ones are cancelled like any others."""
    daemon.configure(slots={"total": 2})
    daemon.start()
    for name, seconds in (("short", 2.0), ("long", 600.0), ("waits", 600.0)):
        await client.submit("fixed", name, {"seconds": seconds})
        await client.until(lambda name=name: bool(client.statuses(name)))  # type: ignore[misc]
    await client.until(lambda: "RUNNING" in client.statuses("long"))
    assert (await cancel(client, "waits"))["status"] == "CANCELLED"
    refused = await cancel(client, "long")
    assert (refused["accepted"], refused["status"]) == (False, "RUNNING")
    assert "cannot be cancelled" in refused["reason"]
    assert (await cancel(client, "long", force=True))["status"] == "CANCELLED"
    assert (await client.end_of("long"))["status"] == "CANCELLED"
    assert (await client.end_of("short"))["status"] == "COMPLETED"
