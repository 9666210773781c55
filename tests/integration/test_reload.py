"""SIGHUP: a running daemon takes another configuration and loses no job over it."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.amqp import Client
from tests.support.process import ROOT, DaemonProcess

EDITED = """
from jef_daemon import ActionExecutor, ActionExecutorResponse
class InProcess(ActionExecutor):
    def execute(self, context):
        return ActionExecutorResponse(result="VERSION")
class InLoop(ActionExecutor):
    async def execute(self, context):
        return ActionExecutorResponse(result="VERSION")
"""


async def reload(daemon: DaemonProcess, told: str = "reloaded") -> dict[str, Any]:
    """SIGHUP, and what the log says of it."""
    begin = daemon.log.stat().st_size
    daemon.signal(signal.SIGHUP)
    return await asyncio.to_thread(daemon.wait_for, told, begin)


def rewrite(daemon: DaemonProcess, *changes: tuple[str, str], more: str = "") -> None:
    """Change the configuration as it stands."""
    text = daemon.configuration.read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    daemon.configuration.write_text(text + more)


async def messages(client: Client, queue: str, count: int, within_s: float = 30) -> None:
    """Wait until so many are ready in a queue of the daemon's; a quorum queue counts with delay."""
    channel = await client.channel.get_underlay_channel()
    async with asyncio.timeout(within_s):
        while True:
            found = await channel.queue_declare(f"{client.prefix}.{queue}", passive=True)
            if found.message_count == count:
                return
            await asyncio.sleep(0.05)


async def test_more_slots_and_another_log_level(daemon: DaemonProcess, client: Client) -> None:
    """What waits for a slot starts at once; what runs goes on; the log says more or less from then on."""
    daemon.configure(slots={"total": 1})
    daemon.start()
    for name in ("1", "2"):
        await client.submit("slow", name, {"seconds": 600})
    await client.until(lambda: "RUNNING" in client.statuses("1") and "QUEUED" in client.statuses("2"))
    daemon.configure(slots={"total": 3}, logging={"level": "warning"})
    daemon.signal(signal.SIGHUP)
    await client.until(lambda: "RUNNING" in client.statuses("2"))
    assert client.statuses("1")[-1] == "RUNNING"
    await client.submit("nap", "quiet", {"seconds": 0})
    await client.end_of("quiet")
    daemon.configure(slots={"total": 3}, logging={"level": "info"})
    assert (await reload(daemon))["keys"] == ["logging.level"]
    await client.submit("nap", "told", {"seconds": 0})
    first = await asyncio.to_thread(daemon.wait_for, "finished")
    assert first["execution_id"] == "told"


async def test_fewer_slots_of_an_action_end_nothing(daemon: DaemonProcess, client: Client) -> None:
    """Three run, two may from now on: none is stopped, and the next starts when there are fewer than two."""
    daemon.start()
    for name in ("1", "2", "3"):
        await client.submit("slow", name, {"seconds": 2.0})
    await client.until(lambda: all("RUNNING" in client.statuses(name) for name in ("1", "2", "3")))
    rewrite(daemon, ('executors:Slow"', 'executors:Slow"\nconcurrency = 1'))
    assert (await reload(daemon))["actions_changed"] == ["slow"]
    for name in ("4", "5"):
        await client.submit("slow", name, {"seconds": 0.2})
    for name in ("1", "2", "3", "4", "5"):
        assert (await client.end_of(name))["status"] == "COMPLETED"
    order = [(told["executionId"], told["status"]) for told in client.told]
    assert order.index(("4", "RUNNING")) > max(order.index((name, "COMPLETED")) for name in ("1", "2", "3"))
    assert order.index(("5", "RUNNING")) > order.index(("4", "COMPLETED"))


async def test_a_new_action_is_served_at_once(daemon: DaemonProcess, client: Client) -> None:
    """Its queue is declared, consumed, its jobs run; the first of a kind that blocks and one that is polled, too."""
    rewrite(daemon, ("[actions.polled]", "[actions.fixed.retry]\n[actions.held]"))
    rewrite(daemon, ("[actions.blocking]", "[actions.watchful]"))
    daemon.start()
    await client.submit("blocking", "early", {"seconds": 0})
    [letter] = await client.dead_letters(1)
    assert letter.headers["x-jef-reason"] == "unroutable"
    rewrite(daemon, ("[actions.held]", "[actions.polled]"), ("[actions.watchful]", "[actions.blocking]"))
    told = await reload(daemon)
    assert (told["actions_added"], told["actions_removed"]) == (["blocking", "polled"], ["held", "watchful"])
    await client.submit("blocking", "1", {"seconds": 0})
    await client.submit("polled", "2")
    assert (await client.end_of("1"))["status"] == "COMPLETED"
    assert (await client.end_of("2"))["result"] == "3 polls"


async def test_an_action_that_is_taken_out(daemon: DaemonProcess, client: Client) -> None:
    """What runs ends as it would have, work outside too; what waits is on the broker, for others, and comes back."""
    rewrite(daemon, ('executors:Slow"', 'executors:Slow"\nconcurrency = 1'))
    daemon.start()
    await client.submit("slow", "runs", {"seconds": 3})
    await client.submit("polled", "outside")
    await client.until(lambda: all("RUNNING" in client.statuses(name) for name in ("runs", "outside")))
    for name in ("waits-1", "waits-2"):
        await client.submit("slow", name, {"seconds": 0})
    await client.submit("slow", "later", {"seconds": 0}, notBefore="2100-01-01T00:00:00Z")
    await client.until(lambda: all(client.statuses(name) for name in ("waits-1", "waits-2", "later")))
    rewrite(daemon, ("[actions.slow]", "[actions.slow]\nenabled = false"))
    rewrite(daemon, ("[actions.polled]", "[actions.polled]\nenabled = false"))
    assert (await reload(daemon))["actions_removed"] == ["polled", "slow"]

    await messages(client, "jobs.slow", 3)
    await client.submit("slow", "comes", {"seconds": 0})
    assert (await client.end_of("runs"))["status"] == "COMPLETED"
    assert (await client.end_of("outside"))["result"] == "3 polls"
    await messages(client, "jobs.slow", 4)
    assert client.statuses("waits-1") == client.statuses("later") == ["QUEUED"]
    rewrite(daemon, ("[actions.slow]\nenabled = false", "[actions.slow]"))
    assert (await reload(daemon))["actions_added"] == ["slow"]
    for name in ("waits-1", "waits-2", "comes"):
        assert (await client.end_of(name))["status"] == "COMPLETED"
    assert sorted(name for name, _ in daemon.starts()) == ["comes", "outside", "runs", "waits-1", "waits-2"]


async def test_a_retry_of_an_action_that_is_taken_out(daemon: DaemonProcess, client: Client) -> None:
    """It fails after the reload, is to be tried again, and that is for others to do."""
    daemon.configure("[actions.broken.retry]\nattempts = 3\nfirst_s = 0.1\n")
    gate = daemon.folder / "gate.py"
    gate.write_text(
        "import sys, time, pathlib\n"
        "while not pathlib.Path(sys.argv[1]).exists(): time.sleep(0.05)\n"
        "sys.exit(1)\n"
    )
    command = f'command = ["{daemon.python}", "{gate}", "{daemon.folder}/open"]'
    action = f"[actions.held]\n{command}\n[actions.held.retry]\nattempts = 3\nfirst_s = 0.1\n"
    daemon.configure(action)
    daemon.start()
    await client.submit("held", "1")
    await client.until(lambda: "RUNNING" in client.statuses("1"))
    daemon.configure()
    await reload(daemon)
    (daemon.folder / "open").touch()
    await client.until(lambda: client.statuses("1")[-2:] == ["FAILED", "QUEUED"])
    await messages(client, "jobs.held", 1)


async def test_an_action_that_is_changed(daemon: DaemonProcess, client: Client) -> None:
    """What runs ends as it began; what waits and what comes runs as it is now."""
    more = '[actions.held]\nconcurrency = 1\ncommand = ["sh", "-c", "{} echo {}"]\n'
    daemon.configure(more.format(f"while ! [ -e {daemon.folder}/open ]; do sleep 0.05; done;", "old"))
    daemon.start()
    await client.submit("held", "runs")
    await client.until(lambda: "RUNNING" in client.statuses("runs"))
    await client.submit("held", "waits")
    await client.until(lambda: "QUEUED" in client.statuses("waits"))
    daemon.configure(more.format("", "new"))
    assert (await reload(daemon))["actions_changed"] == ["held"]
    (daemon.folder / "open").touch()
    for name, said in (("runs", "old"), ("waits", "new")):
        assert (await client.end_of(name))["jobContextVariables"]["output"].split() == [said]


MISTAKES = {
    "unknown key": "[actions.held.retry]\nattempt = 1\n",
    "no TOML": "[actions.held\n",
    "no such module": '[actions.held]\nexecutor = "no_such_module_x:X"\n',
    "import ends the interpreter": '[actions.held]\nexecutor = "leaves_at_once:X"\n',
}


async def test_a_mistake_changes_nothing(daemon: DaemonProcess, client: Client) -> None:
    """It is said as `jef check` says it; what is right beside it is not taken either; the next reload is a new one."""
    (daemon.folder / "leaves_at_once.py").write_text("import os; os._exit(0)")
    folders = ("python_path = [", f'python_path = ["{daemon.folder}", ')
    daemon.configure(slots={"total": 1})
    rewrite(daemon, folders)
    daemon.start()
    await client.submit("slow", "1", {"seconds": 600})
    await client.until(lambda: "RUNNING" in client.statuses("1"))
    await client.submit("slow", "2", {"seconds": 600})
    for mistake in MISTAKES.values():
        daemon.configure(mistake, slots={"total": 2})
        rewrite(daemon, folders, ("[actions.nap]", "[actions.watchful]"))
        told = await reload(daemon, "reload_refused")
        assert told["problem"] in re.sub(r"\n +", "\n", daemon.jef("check").stdout)
    await client.submit("nap", "3", {"seconds": 0})
    await client.until(lambda: bool(client.statuses("3")))
    assert client.statuses("2") == ["QUEUED"], "the slots were changed all the same"
    daemon.configure(slots={"total": 3})
    rewrite(daemon, folders)
    await reload(daemon)
    assert (await client.end_of("3"))["status"] == "COMPLETED"


async def test_an_action_that_was_broken_before_does_not_stand_in_the_way(
    daemon: DaemonProcess, client: Client
) -> None:
    """It was not served, it is not served; everything else is changed."""
    broken = '[actions.held]\nexecutor = "no_such_module_x:X"\n'
    daemon.configure(broken, slots={"total": 1})
    daemon.start()
    daemon.configure(broken, slots={"total": 2})
    assert (await reload(daemon))["keys"] == ["slots.total"]


async def test_what_needs_a_restart_is_named_and_stays(daemon: DaemonProcess, client: Client) -> None:
    """One line for all of it; the rest of the same file is in force."""
    daemon.configure(slots={"total": 1}, locks={"lease_s": 120})
    daemon.start()
    daemon.configure(
        slots={"total": 2},
        locks={"lease_s": 60.0, "max_per_request": 1},
        bus={"queue_type": "classic", "max_body_bytes": 2048},
    )
    rewrite(daemon, ("amqp://", "amqp://other:secret-word@"), (daemon.prefix, "elsewhere"))
    rewrite(daemon, ("python_path = [", 'http_port = 1\nroles = ["worker"]\npython_path = ['))
    rewrite(daemon, (f'python_path = ["{daemon.cwd}"]', 'python_path = ["/"]'))
    told = await reload(daemon, "needs_restart")
    keys = ["amqp_url", "prefix", "roles", "http_port", "bus.queue_type", "locks.lease_s"]
    assert told["keys"] == [*keys, f"python_path (without {daemon.cwd})"]
    assert "secret-word" not in daemon.log.read_text()
    body = b'{"executionId": "long", "configuration": {"x": "' + b"x" * 3000 + b'"}}'
    await client.publish("quick", body)
    [letter] = await client.dead_letters(1)
    assert letter.headers["x-jef-reason"] == "body-too-long"
    for name in ("1", "2"):
        await client.submit("slow", name, {"seconds": 600})
    await client.until(lambda: all("RUNNING" in client.statuses(name) for name in ("1", "2")))


async def test_an_executor_whose_file_was_edited(daemon: DaemonProcess, client: Client) -> None:
    """In a process of its own it runs as it is now; in the daemon's own it cannot, and the log says so."""
    file = daemon.folder / "edited_by_hand.py"
    file.write_text(EDITED.replace("VERSION", "old"))
    daemon.configure(
        '[actions.held]\nexecutor = "edited_by_hand:InProcess"\n'
        '[actions.watchful]\nexecutor = "edited_by_hand:InLoop"\n'
    )
    rewrite(daemon, ("python_path = [", f'python_path = ["{daemon.folder}", '))
    daemon.start()
    await client.submit("held", "1")
    await client.submit("watchful", "2")
    assert [(await client.end_of(name))["result"] for name in "12"] == ["old", "old"]
    file.write_text(EDITED.replace("VERSION", "new version"))
    told = await reload(daemon, "needs_restart")
    assert told["keys"] == ["the code of actions.watchful (it runs in the daemon's own process)"]
    await client.submit("held", "3")
    await client.submit("watchful", "4")
    assert [(await client.end_of(name))["result"] for name in "34"] == ["new version", "old"]


async def test_a_process_that_runs_a_job_is_renewed_behind_it(daemon: DaemonProcess, client: Client) -> None:
    """The job ends in it; the next one is another process's."""
    daemon.configure(slots={"blocking_processes": 1})
    daemon.start()
    await client.submit("blocking", "1", {"seconds": 2})
    await client.until(lambda: "RUNNING" in client.statuses("1"))
    await reload(daemon)
    await client.submit("blocking", "2", {"seconds": 0})
    pids = [(await client.end_of(name))["jobContextVariables"]["pid"] for name in "12"]
    assert pids[0] != pids[1]


async def test_a_queue_that_the_broker_refuses_changes_nothing(daemon: DaemonProcess, client: Client) -> None:
    """Somebody has declared it otherwise: the sentence of `jef check`, and everything as before."""
    await client.channel.declare_queue(
        f"{client.prefix}.jobs.held", durable=True, arguments={"x-queue-type": "classic"}
    )
    daemon.configure(slots={"total": 1})
    daemon.start()
    daemon.configure('[actions.held]\ncommand = ["true"]\n', slots={"total": 2})
    told = await reload(daemon, "reload_refused")
    assert f"the queue {client.prefix}.jobs.held exists with another" in told["problem"]
    assert told["problem"] in daemon.jef("check").stdout
    for name in ("1", "2"):
        await client.submit("slow", name, {"seconds": 600})
    await client.until(lambda: bool(client.statuses("2")))
    await client.submit("nap", "3", {"seconds": 0})
    await client.until(lambda: bool(client.statuses("3")))
    assert sorted(client.statuses(name)[-1] for name in "123") == ["QUEUED", "QUEUED", "RUNNING"]


@pytest.fixture
def listening(tmp_path: Path) -> Iterator[socket.socket]:
    """The socket that systemd would listen on."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard:
        heard.bind(str(tmp_path / "notify"))
        heard.settimeout(30)
        yield heard


async def test_systemd_hears_of_a_reload(
    daemon: DaemonProcess, client: Client, listening: socket.socket
) -> None:
    """RELOADING with the time of it, then READY; also where the configuration was refused."""

    def hear(beginning: str) -> str:
        while not (message := listening.recv(4096).decode()).startswith(beginning):
            pass
        return message

    daemon.start(NOTIFY_SOCKET=listening.getsockname())
    await asyncio.to_thread(hear, "READY=1")
    for mistake in ("", "[nonsense]\n"):
        daemon.configure(mistake)
        before = _monotonic_usec()
        daemon.signal(signal.SIGHUP)
        told = await asyncio.to_thread(hear, "RELOADING=1")
        found = re.fullmatch(r"RELOADING=1\nMONOTONIC_USEC=(\d+)", told)
        assert found is not None
        assert before <= int(found[1]) <= _monotonic_usec()
        await asyncio.to_thread(hear, "READY=1")


def _monotonic_usec() -> int:
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000


async def test_reloads_under_load_lose_nothing(daemon: DaemonProcess, client: Client) -> None:
    """Jobs come all the time while actions come and go and slots change: each runs once, to its end."""
    daemon.configure(slots={"total": 4})
    daemon.start()
    total = 300

    async def submit() -> None:
        for number in range(total):
            await client.submit("quick" if number % 2 else "slow", f"{number}", {})
            await asyncio.sleep(0.01)

    submitting = asyncio.create_task(submit())
    for number in range(6):
        daemon.configure(slots={"total": 2 + number, "backlog": 20 + number})
        if number % 2:
            rewrite(daemon, ("[actions.slow]", "[actions.slow]\nenabled = false"))
        await reload(daemon)
    daemon.configure()
    await submitting
    await reload(daemon)
    for number in range(total):
        assert (await client.end_of(f"{number}", 60))["status"] == "COMPLETED"
    assert sorted(int(name) for name, _ in daemon.starts()) == list(range(total))


def test_a_closed_terminal_stops_the_daemon(daemon: DaemonProcess) -> None:
    """It says SIGHUP too, and means another thing: in good order, not by a reload."""
    ours, its = os.openpty()
    take_it = (
        "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", take_it, sys.executable, "-m", "jef_daemon", "run"],
        stdin=its,
        stdout=its,
        stderr=its,
        start_new_session=True,
        cwd=ROOT,
        env={**os.environ, "JEF_CONFIG": str(daemon.configuration)},
    )
    try:
        os.close(its)
        said = b""
        while b'"ready"' not in said:
            said += os.read(ours, 65536)
        os.close(ours)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
