"""Measurements that are asked to end: whatever they started ends with them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from tests.support.process import ROOT


@contextmanager
def measuring(script: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """One that runs with a broker of its own, and keeps all that it has below a folder."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("JEF_AMQP")}
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "benchmarks" / script)],
        env={**environment, "TMPDIR": str(folder), "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        for one in of(folder):
            with suppress(psutil.NoSuchProcess):
                one.kill()
        process.communicate()


def of(folder: Path) -> dict[psutil.Process, str]:
    """Processes that have to do with a folder, by what they run; those of a broker have their home there."""
    found = {}
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            command = " ".join(process.cmdline())
            if str(folder) in command + process.environ().get("HOME", ""):
                found[process] = command
    return found


def until(folder: Path, word: str) -> None:
    """Wait for a process."""
    until_s = time.monotonic() + 60
    while not any(word in command for command in of(folder).values()):
        assert time.monotonic() < until_s, of(folder)
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("script", "at"),
    [("throughput.py", "beam.smp"), ("throughput.py", "jef_daemon"), ("locks.py", "jef_daemon")],
)
def test_one_that_is_asked_to_end_leaves_nothing_running(script: str, at: str, tmp_path: Path) -> None:
    """While its broker starts, and in the middle; on either event loop."""
    with measuring(script, tmp_path) as process:
        until(tmp_path, at)
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=60)
        assert "Traceback" not in said, said
        assert process.returncode == 130
        assert of(tmp_path) == {}
        assert list(tmp_path.iterdir()) == []
