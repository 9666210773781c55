"""The watcher on a real broker with a real daemon: silence, grace, waits, limits, restarts. Timeouts are short."""

from __future__ import annotations

import asyncio
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from broker import PrivateBroker

from tests.integration.test_control import ask
from tests.integration.test_locks import lock
from tests.support.amqp import Client
from tests.support.process import DaemonProcess

LATE_S = 3.0
"""A flag comes within a second of its deadline (`benchmarks/watch.py`), on a machine with time to spare."""


def configure(daemon: DaemonProcess, grace_s: float = 60, more: str = "", **sections: dict[str, Any]) -> None:
    """The test's actions, with a time of grace for those that run outside."""
    daemon.configure(more, **sections)
    text = daemon.configuration.read_text()
    for action in ("farm", "slow"):
        text = text.replace(f"[actions.{action}]\n", f"[actions.{action}]\ntimeout_grace_s = {grace_s}\n")
    daemon.configuration.write_text(text)


def at(told: dict[str, Any], key: str = "timestamp") -> float:
    return datetime.fromisoformat(told[key]).timestamp()


async def launch(client: Client, name: str, update_s: float | None = 1.0, **timeouts: float) -> str:
    """Submit work that runs outside; returns the token of its attempt."""
    await client.submit("farm", name, timeouts={"update": update_s, **timeouts})
    await client.until(lambda: any(told.get("externalId") for told in client.of(name)))
    return str(client.of(name)[-1]["message"])


def update(name: str, token: str, status: str = "RUNNING", **more: Any) -> dict[str, Any]:
    return {"executionId": name, "token": token, "status": status, **more}


async def silent(client: Client, name: str) -> dict[str, Any]:
    """The notification that it fell silent."""
    await client.until(lambda: "TIMED_OUT" in client.statuses(name))
    return next(told for told in client.of(name) if told["status"] == "TIMED_OUT")


async def test_who_falls_silent_is_flagged_in_time(daemon: DaemonProcess, client: Client) -> None:
    """Within a second of the deadline that was told; not before; each update moves it."""
    configure(daemon)
    daemon.start()
    token = await launch(client, "1", 1.5)
    await asyncio.sleep(1.0)
    assert (await ask(client, "updates", update("1", token, progress=40)))["accepted"]
    told = await silent(client, "1")
    running = [each for each in client.of("1") if each["status"] == "RUNNING"]
    deadlines = [at(each, "updateDeadline") for each in running]
    assert deadlines == sorted(deadlines)
    assert at(running[-1]) + 1.5 == pytest.approx(deadlines[-1], abs=0.01)
    assert -0.002 <= at(told) - deadlines[-1] < LATE_S
    assert "no update for 1.5 s" in told["message"]
    assert "updateDeadline" not in told


async def test_a_late_update_revives_and_ends_it(daemon: DaemonProcess, client: Client) -> None:
    """Within the grace, told as late; then it is watched again."""
    configure(daemon)
    daemon.start()
    token = await launch(client, "1", 0.7)
    await silent(client, "1")
    assert (await ask(client, "updates", update("1", token, progress=50)))["accepted"]
    # The answer may overtake what is told.
    await client.until(lambda: client.statuses("1")[-1] == "RUNNING")
    revived = client.of("1")[-1]
    assert (revived["late"], revived["progress"]) == (True, 50)
    await client.until(lambda: client.statuses("1").count("TIMED_OUT") == 2)
    done = update("1", token, "COMPLETED", jobContextVariables={"frames": 7})
    assert (await ask(client, "updates", done))["accepted"]
    await client.until(lambda: client.statuses("1")[-1] == "COMPLETED")
    assert (client.of("1")[-1]["late"], client.of("1")[-1]["jobContextVariables"]) == (True, {"frames": 7})


async def test_when_the_grace_is_over_nothing_of_it_counts(daemon: DaemonProcess, client: Client) -> None:
    """Refused, and no variable applied; a retry by command has a new token."""
    configure(daemon, 0.5)
    daemon.start()
    token = await launch(client, "1", 0.5)
    await silent(client, "1")
    await asyncio.sleep(1.5)
    done = update("1", token, "COMPLETED", jobContextVariables={"frames": 7})
    refused = await ask(client, "updates", done)
    assert (refused["accepted"], "grace" in refused["reason"]) == (False, True)
    assert client.statuses("1")[-1] == "TIMED_OUT"
    assert "GraceEnded" in daemon.jef("history", "1").stdout
    assert (await ask(client, "control", {"command": "retry", "executionId": "1"}))["accepted"]
    await client.until(
        lambda: [each["attempt"] for each in client.of("1") if each.get("externalId")][-1:] == [2]
    )
    assert client.of("1")[-1]["message"] != token
    assert not (await ask(client, "updates", done))["accepted"]
    new = update("1", client.of("1")[-1]["message"], "COMPLETED")
    assert (await ask(client, "updates", new))["accepted"]
    await client.until(lambda: client.statuses("1")[-1] == "COMPLETED")
    assert client.of("1")[-1]["attempt"] == 2


async def test_the_policy_retries_who_timed_out(daemon: DaemonProcess, client: Client) -> None:
    """Once the grace is over."""
    configure(daemon, 0.3, "[actions.farm.retry]\nattempts = 2\nfirst_s = 0.1\non_timeout = true\n")
    daemon.start()
    await launch(client, "1", 0.5)
    await client.until(lambda: client.statuses("1").count("TIMED_OUT") == 2)
    attempts = [each["attempt"] for each in client.of("1") if each["status"] == "TIMED_OUT"]
    assert attempts == [1, 2]
    await asyncio.sleep(1.5)
    assert client.statuses("1")[-1] == "TIMED_OUT"


async def test_who_timed_out_is_resumed_by_command(daemon: DaemonProcess, client: Client) -> None:
    """Where its executor can, and while it is open; RUNNING and watched again. A resume that fails changes nothing."""
    daemon.start()
    for name in ("works", "gone"):
        await client.submit("resumed", name, {"how": name}, timeouts={"update": 1.0})
    for name in ("works", "gone"):
        await silent(client, name)
        assert (await ask(client, "control", {"command": "resume", "executionId": name}))["accepted"]
    await client.until(lambda: client.statuses("works").count("TIMED_OUT") == 2)
    resumed = client.of("works")[client.statuses("works").index("TIMED_OUT") + 1]
    assert (resumed["status"], "updateDeadline" in resumed, "late" in resumed) == ("RUNNING", True, False)
    assert client.statuses("gone")[-1] == "TIMED_OUT"
    assert "the farm has forgotten it" in daemon.jef("history", "gone").stdout


async def test_a_watcher_flags_while_the_broker_is_away(own_broker: PrivateBroker, tmp_path: Path) -> None:
    """By the ledger alone; it is told once the broker is back, with the time at which it was."""
    daemon = DaemonProcess(own_broker.url, "own", tmp_path / "daemon")
    daemon.configure(bus={"queue_type": "classic", "reconnect_max_s": 0.5})
    try:
        daemon.start()
        async with Client(own_broker.url, "own", "classic") as client:
            await launch(client, "1", 4.0)
            deadline = at(client.of("1")[-1], "updateDeadline")
        await asyncio.to_thread(own_broker.kill)
        async with asyncio.timeout(15):
            while daemon.reader().find("1").status != "TIMED_OUT":
                await asyncio.sleep(0.05)
        flagged_at = daemon.reader().history("1")[-1].at
        assert 0 <= flagged_at - deadline < LATE_S
        await asyncio.to_thread(own_broker.start)
        async with Client(own_broker.url, "own", "classic") as client:
            assert at(await silent(client, "1")) == pytest.approx(flagged_at, abs=0.002)
    finally:
        daemon.kill()


async def test_a_watcher_alone_watches_its_own_ledger(
    daemon: DaemonProcess, client: Client, tmp_path: Path
) -> None:
    """And hears nothing of other daemons' jobs, which are none of its business."""
    configure(daemon)
    alone = DaemonProcess(daemon.url, daemon.prefix, tmp_path / "alone")
    alone.configuration.write_text('roles = ["watcher"]\n' + alone.configuration.read_text())
    text = daemon.configuration.read_text()
    daemon.configuration.write_text('roles = ["worker", "locks"]\n' + text)
    try:
        alone.start()
        daemon.start()
        await launch(client, "1", 0.5)
        await asyncio.sleep(1.5)
        assert client.statuses("1")[-1] == "RUNNING"
        assert alone.reader().count() == {}
        await asyncio.to_thread(daemon.stop)
        daemon.configuration.write_text(text)
        daemon.start()
        await silent(client, "1")
        assert await asyncio.to_thread(alone.stop) == 0
    finally:
        alone.kill()


async def test_overdue_ones_are_flagged_after_a_restart(daemon: DaemonProcess, client: Client) -> None:
    """At once, and the others at their true deadlines; work outside is not touched."""
    configure(daemon)
    daemon.start()
    await launch(client, "overdue", 1.0)
    token = await launch(client, "watched", 9.0)
    deadline = at(client.of("watched")[-1], "updateDeadline")
    daemon.kill()
    await asyncio.sleep(1.2)
    daemon.start()
    await silent(client, "overdue")
    assert client.statuses("watched")[-1] == "RUNNING"
    told = await silent(client, "watched")
    assert 0 <= at(told) - deadline < LATE_S
    assert (await ask(client, "updates", update("watched", token, "COMPLETED")))["accepted"]
    assert daemon.starts() == [("overdue", 1), ("watched", 1)]


async def test_work_here_may_fall_silent_too(daemon: DaemonProcess, client: Client) -> None:
    """TIMED_OUT; when it ends within the grace it ends well, else it is stopped."""
    configure(daemon, 1.0)
    daemon.start()
    await client.submit("slow", "quiet", {"seconds": 1.2}, timeouts={"update": 0.6})
    await client.submit("slow", "stuck", {"seconds": 60}, timeouts={"update": 0.6})
    await client.until(lambda: client.statuses("quiet")[-1:] == ["COMPLETED"])
    assert client.statuses("quiet")[-2:] == ["TIMED_OUT", "COMPLETED"]
    assert client.of("quiet")[-1]["late"] is True
    await silent(client, "stuck")
    await asyncio.to_thread(daemon.wait_for, "finished")
    async with asyncio.timeout(10):
        while not any(line.get("execution_id") == "stuck" for line in daemon.events()):
            await asyncio.sleep(0.1)
    assert client.statuses("stuck")[-1] == "TIMED_OUT"


async def test_every_wait_and_run_has_its_own_clock(daemon: DaemonProcess, client: Client) -> None:
    """For a slot, for locks, of work outside: each FAILED in its own words; what waits for its time has no wait."""
    configure(daemon, slots={"total": 1})
    daemon.start()
    await client.submit("slow", "holder", {"seconds": 3}, locks=[lock("a")])
    await client.until(lambda: "RUNNING" in client.statuses("holder"))
    await client.submit("slow", "for-slot", {"seconds": 0.1}, timeouts={"queue": 0.5})
    await client.submit(
        "slow", "for-lock", {"seconds": 0.1}, timeouts={"lock": 0.5, "queue": 30}, locks=[lock("a")]
    )
    for name, kind, words in (
        ("for-slot", "QueueTimeout", "waited for a slot longer than 0.5 s"),
        ("for-lock", "LockTimeout", "waited for its locks longer than 0.5 s"),
    ):
        end = await client.end_of(name)
        assert (end["status"], end["error"]["type"], end["error"]["message"]) == ("FAILED", kind, words)
        assert at(end) - at(client.of(name)[0]) < 2.0
    await client.end_of("holder")
    await launch(client, "outside", None, execution=0.8)
    end = await client.end_of("outside")
    assert end["error"] == {"type": "ExecutionTimeout", "message": "ran longer than its limit of 0.8 s"}
    await asyncio.to_thread(daemon.wait_for, "farm_cancel")
    await client.submit("slow", "after", {"seconds": 0.1}, locks=[lock("a")])
    assert (await client.end_of("after"))["status"] == "COMPLETED"


async def test_the_locks_of_work_outside_are_kept(daemon: DaemonProcess, client: Client) -> None:
    """Beyond their lease, across a restart; and when they are taken away the job fails."""
    configure(daemon, locks={"lease_s": 5, "start_within_s": 2, "takeover_grace_s": 5})
    daemon.start()
    await client.submit("farm", "1", locks=[lock("a")], timeouts={"update": 100})
    await client.until(lambda: any(told.get("externalId") for told in client.of("1")))
    await client.submit("slow", "2", {"seconds": 0.1}, locks=[lock("a")])
    await client.until(lambda: "WAITING_FOR_LOCK" in client.statuses("2"))
    daemon.kill()
    await asyncio.to_thread(daemon.start)
    await asyncio.sleep(12)  # the grace after the restart, and a lease
    assert client.statuses("2")[-1] == "WAITING_FOR_LOCK"
    assert client.statuses("1")[-1] == "RUNNING"
    force = {
        "operation": "force-release",
        "owner": "1",
        "locks": [{"resource": "a"}],
        "reason": "stuck",
        "by": "ann",
    }
    await ask(client, "locks", force)
    end = await client.end_of("1")
    assert (end["status"], end["error"]["type"]) == ("FAILED", "LockLost")
    assert (await client.end_of("2"))["status"] == "COMPLETED"
    await asyncio.to_thread(daemon.wait_for, "farm_cancel")


async def test_an_attempt_that_was_given_up_has_stopped_before_the_next_begins(
    daemon: DaemonProcess, client: Client, tmp_path: Path
) -> None:
    """Timed out, fenced, retried at once, while the first is still cleaning up: two never run at the same time."""
    daemon.configure(jobs={"kill_grace_s": 10.0})
    daemon.start()
    file = tmp_path / "stubborn"
    await client.submit("stubborn", "1", {"file": str(file)})
    await client.until(lambda: client.statuses("1")[-1:] == ["COMPLETED"])
    assert file.read_text().splitlines() == ["begin 1", "end 1", "begin 2", "end 2"]
    assert [told["attempt"] for told in client.of("1") if told["status"] in {"TIMED_OUT", "COMPLETED"}] == [
        1,
        2,
    ]
