"""The page "Start in five minutes": its executor, its configuration and its commands, as printed."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from broker import PrivateBroker

from jef_daemon.errors import NotFound
from tests.acceptance.test_readme import block
from tests.support.process import ROOT, DaemonProcess

PAGE = (ROOT / "docs/start.md").read_text()


@pytest.fixture(scope="module")
def started(broker: PrivateBroker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """A daemon in a folder with just what the page tells to write."""
    folder = tmp_path_factory.mktemp("start")
    (folder / "greet.py").write_text(block("python", '@action("greet")', PAGE))
    daemon = DaemonProcess(broker.url, "start", folder)
    daemon.configuration.write_text(block("toml", "[actions.greet]", PAGE))
    yield daemon
    daemon.kill()


def environment(daemon: DaemonProcess) -> dict[str, str]:
    """What the page exports, and a folder and names of our own."""
    return {
        "JEF_AMQP_URL": daemon.url,
        "JEF_DATA_DIR": str(daemon.folder / "data"),
        "JEF_PREFIX": daemon.prefix,
        "JEF_LOGGING__FORMAT": "json",
    }


def start(daemon: DaemonProcess) -> None:
    """As the page does."""
    daemon.start(ready=True, **environment(daemon))


def jef(daemon: DaemonProcess, *words: str) -> str:
    """Run a command of the page's."""
    done = subprocess.run(
        [sys.executable, "-m", "jef_daemon", *words],
        check=False,
        cwd=daemon.folder,
        env=os.environ | environment(daemon),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_page_runs_as_printed(started: DaemonProcess) -> None:
    """Its jobs are done, and seen."""
    start(started)
    lines = block("sh", "jef submit greet name=Ada", PAGE).splitlines()
    told = "".join(jef(started, *shlex.split(line)[1:]) for line in lines)
    assert "Hello Ada" in told
    assert jef(started, "list", "--status", "COMPLETED", "--json").count('"COMPLETED"') == len(lines)


def test_a_kill_does_what_the_page_says(started: DaemonProcess) -> None:
    """FAILED as Interrupted; or run again, where the page's line says so."""
    line = "may_run_again = true"
    assert f"`{line}` under `[actions.nap]`" in re.sub(r"\s+", " ", PAGE)
    interrupt(started, "once")
    until(started, "once", "FAILED", 1)
    assert "Interrupted" in jef(started, "show", "once")
    started.configuration.write_text(block("toml", "[actions.greet]", PAGE) + f"{line}\n")
    interrupt(started, "again")
    until(started, "again", "RUNNING", 2)


def interrupt(daemon: DaemonProcess, name: str) -> None:
    """Kill the daemon while a job runs, and start it again."""
    jef(daemon, "submit", "nap", "seconds=60", "--id", name)
    until(daemon, name, "RUNNING", 1)
    daemon.kill()
    start(daemon)


def until(daemon: DaemonProcess, name: str, status: str, attempt: int) -> None:
    """Wait until a job has a status in an attempt."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        with contextlib.suppress(NotFound):
            found = daemon.reader().find(name)
            if (found.status, found.attempt) == (status, attempt):
                return
        time.sleep(0.05)
    raise AssertionError(f"{name} is not {status} in attempt {attempt}: {jef(daemon, 'show', name)}")
