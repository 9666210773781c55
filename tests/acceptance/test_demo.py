"""The first of the two commands, as people call it: `make demo`, `make run`, `make stop`."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from demo import Job
from playground import Playground

ROOT = Path(__file__).resolve().parents[2]
DEMO = [sys.executable, "deploy/local/demo.py"]


def left_behind() -> list[str]:
    """Processes that run from the demo's or a playground's folder, their command lines."""
    found = []
    for process in psutil.process_iter(["cmdline", "status", "environ"]):
        with contextlib.suppress(psutil.Error):
            words = " ".join(process.info["cmdline"] or ())
            ours = ".jef/demo" in words or ".jef/demo" in str((process.info["environ"] or {}).values())
            if ours and "demo.py" not in words and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(words)
    return found


@pytest.fixture
def undisturbed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without a broker of the environment's; nothing of it stays behind."""
    monkeypatch.delenv("JEF_AMQP_URL", raising=False)
    yield
    until = time.monotonic() + 15
    while left_behind() and time.monotonic() < until:  # those that were killed may take a moment to go
        time.sleep(0.2)
    assert left_behind() == []


@pytest.mark.timeout(200)
def test_the_demo_shows_what_it_says_and_leaves_nothing_running(undisturbed: None) -> None:
    """Within a minute, exit code 0."""
    began = time.monotonic()
    done = subprocess.run(DEMO, check=False, cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all as it should be" in done.stdout
    assert "What to try next" in done.stdout
    for words in (
        "twice greet COMPLETED",
        "differ compare FAILED",
        "not-json, unroutable",
        "tour:both:1 greet COMPLETED 100% Hello you, after Hello Ann and Hello Bob",
        "film:proxy:1 proxy FAILED",
        "film:store:1 copy COMPLETED",
        "cut:proxy:1 proxy CANCELLED",
    ):
        assert words in done.stdout
    assert re.search(r"checksum RUNNING [1-9]\d%", done.stdout), done.stdout
    assert time.monotonic() - began < 90
    assert done.stderr == ""


@pytest.mark.timeout(200)
def test_control_c_ends_the_demo_in_good_order(undisturbed: None) -> None:
    """130, no traceback, nothing left."""
    with subprocess.Popen(
        DEMO, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as demo:
        assert demo.stdout is not None
        for line in demo.stdout:
            if "RUNNING" in line:
                break
        demo.send_signal(signal.SIGINT)
        rest = demo.stdout.read()
    assert demo.returncode == 130
    assert "interrupted" in rest
    assert "Traceback" not in rest


def test_what_goes_otherwise_is_seen() -> None:
    """The demo's own judgement can fail."""
    job = Job("1", "greet", {}, says="Hello")
    assert "never told" in (job.problem() or "")
    running = {"status": "RUNNING", "sequence": 1, "message": ""}
    job.told = [running]
    assert "not ended" in (job.problem() or "")
    job.told = [running, {"status": "FAILED", "sequence": 2, "message": "Hello"}]
    assert "is FAILED" in (job.problem() or "")
    good = {"status": "COMPLETED", "sequence": 2, "message": "Hello"}
    job.told = [running, good | {"message": "Bye"}]
    assert "does not say" in (job.problem() or "")
    job.told = [running, good | {"sequence": 1}]
    assert "wrong order" in (job.problem() or "")
    job.told = [running, good, good | {"sequence": 3}]
    assert "more than once" in (job.problem() or "")
    job.told = [running, good]
    assert job.problem() is None


@pytest.mark.timeout(200)
def test_the_playground_runs_until_it_is_stopped(
    undisturbed: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a folder that is not there yet; started twice it is one; its commands work; stopped, nothing is left."""
    folder = tmp_path / ".jef" / "demo"
    playground = Playground(folder)
    pid, url = playground.start()
    try:
        assert playground.start() == (pid, url)
        environment = os.environ | {"JEF_CONFIG": str(folder / "jef.toml")}
        for words in (
            ["check"],
            ["submit", "greet", "name=you", "--wait"],
            ["submit", "nap", "seconds=0", "--wait"],
        ):
            jef = [sys.executable, "-m", "jef_daemon", *words]
            done = subprocess.run(
                jef, check=False, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
            )
            assert done.returncode == 0, done.stdout + done.stderr
    finally:
        playground.remove()
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
