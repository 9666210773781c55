"""What systemd hears, and the units that it reads: sd_notify with a real socket, systemd's own analysis."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.amqp import Client
from tests.support.process import ROOT, DaemonProcess

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
    await asyncio.to_thread(systemd.hear, "STOPPING=1")
    assert await asyncio.to_thread(daemon.wait, 60) == 0


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
