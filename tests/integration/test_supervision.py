"""What systemd hears, and the units that it reads: sd_notify with a real socket, systemd's own analysis."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.amqp import Client
from tests.support.journal import JournalSocket
from tests.support.process import ROOT, DaemonProcess
from tests.support.proxy import Proxy

UNITS = ["jef-daemon.service", "jef-daemon@.service"]


class Systemd:
    """The socket that systemd would listen on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))

    def hear(self, beginning: str, within_s: float = 20) -> str:
        """The next message that begins so."""
        until = time.monotonic() + within_s
        while (left := until - time.monotonic()) > 0:
            self._socket.settimeout(left)
            try:
                message = self._socket.recv(4096).decode()
            except TimeoutError:
                break
            if message.startswith(beginning):
                return message
        raise AssertionError(f"no {beginning} within {within_s:g} s")

    def drop(self) -> None:
        """Forget what was not read yet."""
        self._socket.setblocking(False)
        try:
            while self._socket.recv(4096):
                pass
        except BlockingIOError:
            return

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[Systemd]:
    heard = Systemd(tmp_path / "notify")
    yield heard
    heard.close()


def start(daemon: DaemonProcess, systemd: Systemd, watchdog_s: float = 1.5) -> None:
    # WATCHDOG_PID names the main process, which only systemd knows before it runs: left out, as it may be.
    daemon.start(NOTIFY_SOCKET=str(systemd.path), WATCHDOG_USEC=str(int(watchdog_s * 1e6)))


async def test_systemd_hears_how_it_goes(daemon: DaemonProcess, client: Client, systemd: Systemd) -> None:
    """READY, a STATUS that says what it does, WATCHDOG again and again, STOPPING."""
    start(daemon, systemd)
    await asyncio.to_thread(systemd.hear, "READY=1")
    await client.submit("slow", "1", {"seconds": 20})
    await client.until(lambda: "RUNNING" in client.statuses("1"))
    await asyncio.to_thread(systemd.hear, "STATUS=1 running, 0 queued, 0 waiting for locks")
    for _ in range(3):
        await asyncio.to_thread(systemd.hear, "WATCHDOG=1")
    daemon.signal(signal.SIGTERM)
    told = await asyncio.to_thread(systemd.hear, "STOPPING=1")
    assert re.fullmatch(r"STOPPING=1\nSTATUS=stopping: 1 still running, [45] s left", told)
    assert await asyncio.to_thread(daemon.wait, 60) == 0


async def test_a_broker_that_is_silent_or_away_is_waited_for(
    daemon: DaemonProcess, systemd: Systemd, amqp_url: str
) -> None:
    """The watchdog is fed all the time, a restart would not bring the broker; the status says what is the matter."""
    async with Proxy(amqp_url) as way:
        daemon.url = way.url
        daemon.configure(bus={"reconnect_max_s": 0.5})
        await asyncio.to_thread(start, daemon, systemd, 2.0)
        await asyncio.to_thread(systemd.hear, "READY=1")
        for trouble in (way.freeze, way.cut):
            trouble()
            await asyncio.to_thread(
                systemd.hear, "STATUS=0 running, 0 queued, 0 waiting for locks, broker reconn"
            )
            systemd.drop()
            for _ in range(3):
                await asyncio.to_thread(systemd.hear, "WATCHDOG=1")
            way.mend()
            await asyncio.to_thread(systemd.hear, "STATUS=0 running, 0 queued, 0 waiting for locks")
        assert daemon.stop() == 0
    lost = [line["reason"] for line in daemon.events() if line["event"] == "broker_lost"]
    assert lost[0] == "no answer within 0.5 s"


async def test_a_ledger_that_takes_no_writes_is_waited_for(
    daemon: DaemonProcess, client: Client, systemd: Systemd
) -> None:
    """Somebody holds its lock: the status has the ledger's sentence, and the watchdog is fed."""
    start(daemon, systemd, 6.0)
    await asyncio.to_thread(systemd.hear, "READY=1")
    with contextlib.closing(sqlite3.connect(daemon.folder / "data" / "ledger.db")) as other:
        other.execute("BEGIN IMMEDIATE")
        told = await asyncio.to_thread(systemd.hear, "STATUS=0 running, 0 queued, 0 waiting for locks, ")
        assert "ledger" in told
        for _ in range(2):
            await asyncio.to_thread(systemd.hear, "WATCHDOG=1")
    await asyncio.to_thread(systemd.hear, "STATUS=0 running, 0 queued, 0 waiting for locks")


async def test_a_daemon_that_hangs_does_not_feed_the_watchdog(
    daemon: DaemonProcess, systemd: Systemd
) -> None:
    """Stopped as a whole it is silent; continued it is heard again."""
    start(daemon, systemd)
    await asyncio.to_thread(systemd.hear, "WATCHDOG=1")
    daemon.signal(signal.SIGSTOP)
    systemd.drop()
    with pytest.raises(AssertionError, match="no WATCHDOG=1"):
        await asyncio.to_thread(systemd.hear, "WATCHDOG=1", 3)
    daemon.signal(signal.SIGCONT)
    await asyncio.to_thread(systemd.hear, "WATCHDOG=1")


def test_without_a_broker_it_is_starting_and_alive(tmp_path: Path, systemd: Systemd) -> None:
    """Systemd is asked for time and told why; the watchdog is fed: a restart would not bring the broker."""
    daemon = DaemonProcess("amqp://guest:guest@127.0.0.1:1/", "none", tmp_path / "daemon")
    try:
        daemon.start(ready=False, NOTIFY_SOCKET=str(systemd.path), WATCHDOG_USEC="1500000")
        assert "no broker" in systemd.hear("STATUS=")
        systemd.hear("EXTEND_TIMEOUT_USEC=")
        systemd.hear("WATCHDOG=1")
    finally:
        daemon.kill()


@pytest.mark.parametrize("broker_is", ["away", "silent"])
def test_without_a_broker_it_ends_at_once_and_in_order(broker_is: str, tmp_path: Path) -> None:
    """Nothing is printed but its log: a warning of a library's would be the last that an operator reads of it."""
    with socket.socket() as broker:
        broker.bind(("127.0.0.1", 0))
        if broker_is == "silent":
            broker.listen()
        url = f"amqp://guest:guest@127.0.0.1:{broker.getsockname()[1]}/"
        daemon = DaemonProcess(url, "none", tmp_path / "daemon")
        try:
            daemon.start(ready=False)
            daemon.wait_for("broker_unreachable" if broker_is == "away" else "watching")
            assert daemon.stop(within_s=10) == 0
        finally:
            daemon.kill()
    assert daemon.events()[-1]["event"] == "stopped"
    assert len(daemon.events()) == len(daemon.log.read_text().splitlines()), daemon.log.read_text()


async def test_the_journal_keeps_fields_of_a_job(
    daemon: DaemonProcess, client: Client, tmp_path: Path
) -> None:
    """Standard error is the journal's: `journalctl JEF_EXECUTION_ID=624` finds the job without being asked to."""
    with JournalSocket(tmp_path / "journal") as journal:
        daemon.configure(logging={"format": "auto", "level": "info", "journal_socket": str(journal.path)})
        daemon.log.touch()
        behind = daemon.log.stat()
        await asyncio.to_thread(daemon.start, ready=False, JOURNAL_STREAM=f"{behind.st_dev}:{behind.st_ino}")
        told = await asyncio.to_thread(journal.until, "ready")
        assert told["JEF_PREFIX"] == daemon.prefix
        await client.submit("quick", "624")
        told = await asyncio.to_thread(journal.until, "finished", JEF_EXECUTION_ID="624")
        assert (told["JEF_ACTION"], told["JEF_OUTCOME"], told["PRIORITY"]) == ("quick", "completed", "6")
        assert told["CODE_FILE"].endswith("jef_daemon/run/worker.py")
        assert await asyncio.to_thread(daemon.stop) == 0
        await asyncio.to_thread(journal.until, "stopped")
    assert daemon.log.read_text() == ""


@pytest.mark.parametrize("unit", UNITS)
def test_the_units_are_right_and_hardened(unit: str, tmp_path: Path) -> None:
    """Systemd's own checks: no mistake, and an exposure of 1.5 at most."""
    name = unit.replace("@.", "@worker.")
    shutil.copy(ROOT / "systemd" / unit, tmp_path / name)
    text = (tmp_path / name).read_text().replace("/usr/bin/jef", shutil.which("true") or "/bin/true")
    (tmp_path / name).write_text(text)
    environment = {**os.environ, "SYSTEMD_LOG_LEVEL": "warning"}
    verified = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(tmp_path / name)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert (verified.returncode, verified.stderr) == (0, "")
    told = subprocess.run(
        ["systemd-analyze", "security", "--offline=yes", str(tmp_path / name)],
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    exposure = re.search(r"Overall exposure level for \S+: ([\d.]+)", told)
    assert exposure is not None, told
    assert float(exposure[1]) <= 1.5
