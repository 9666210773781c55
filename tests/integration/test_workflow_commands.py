"""`jef workflows` as people type it, on a real broker: what is refused, who is asked, what is shown."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.amqp import delete_all
from tests.support.process import ROOT, DaemonProcess

DEFINITIONS = {
    "line": "required: [asset]\nstages:\n- {name: first, action: staged}\n"
    "- {name: many, action: staged, forEach: [x, y], configuration: {result: 'r{{ item }}'}}",
    "noisy": 'stages: [{name: first, action: staged, configuration: {result: "a\\nb\\e[2J"}}]',
    "other": "stages: [{name: first, action: staged}]",
    "slow": "stages: [{name: first, action: slow, configuration: {seconds: 60}}]",
}


@pytest.fixture(scope="module")
def coordinator(broker: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """A daemon in all roles."""
    prefix = f"t{secrets.token_hex(4)}"
    process = DaemonProcess(broker.url, prefix, tmp_path_factory.mktemp("daemon"))
    folder = process.folder / "data" / "workflows"
    folder.mkdir(parents=True)
    for name, text in DEFINITIONS.items():
        (folder / f"{name}.yaml").write_text(f"name: {name}\n{text}")
    process.start()
    yield process
    process.kill()
    asyncio.run(delete_all(broker.url, prefix))


def test_a_start_that_is_refused_says_so(coordinator: DaemonProcess) -> None:
    """Though nobody waits for its end: an id alone would be taken for a workflow that runs."""
    unknown = coordinator.jef("workflows", "start", "lime", "asset=1")
    assert (unknown.returncode, unknown.stdout) == (1, "")
    assert "refused: workflow-invalid: " in unknown.stderr
    assert "there is no workflow 'lime'; do you mean 'line'?" in unknown.stderr
    lacking = coordinator.jef("workflows", "start", "line", "--id", "lacking")
    assert (lacking.returncode, lacking.stdout) == (1, "")
    assert "asset required by the workflow 'line'" in lacking.stderr
    begun = coordinator.jef("workflows", "start", "line", "asset=1", "--id", "begun")
    assert (begun.returncode, begun.stdout, begun.stderr) == (0, "begun\n", "")
    assert coordinator.jef("workflows", "start", "line", "asset=1", "--id", "").returncode == 3


def test_an_id_that_is_taken_by_another_workflow_keeps_nobody_waiting(coordinator: DaemonProcess) -> None:
    first = coordinator.jef("workflows", "start", "line", "asset=1", "--id", "taken", "--wait")
    assert first.returncode == 0, first
    for words in (("--wait",), ()):
        again = coordinator.jef("workflows", "start", "other", "--id", "taken", *words)
        assert (again.returncode, again.stdout) == (1, "")
        assert "not started: taken is the id of a 'line', which is COMPLETED" in again.stderr


def test_columns_stay_apart_whatever_stands_in_them(coordinator: DaemonProcess) -> None:
    """Jobs of a workflow with a long id have names longer than most."""
    identifier = "w" * 100
    done = coordinator.jef("workflows", "start", "line", "asset=1", "--id", identifier, "--wait")
    assert done.returncode == 0, done
    shown = coordinator.jef("workflows", "show", identifier).stdout
    jobs = [line.split() for line in shown.splitlines() if line.startswith("    ")]
    assert [words[1:] for words in jobs] == [
        ["COMPLETED"],
        ["COMPLETED", "item", '"x"'],
        ["COMPLETED", "item", '"y"'],
    ]
    listed = coordinator.jef("workflows", "list", COLUMNS="60").stdout.splitlines()
    assert listed[0].split() == ["id", "workflow", "status", "%", "began", "took", "message"]
    assert listed[1].split()[:4] == [identifier, "line", "COMPLETED", "100"]


def test_what_comes_from_outside_moves_no_cursor(coordinator: DaemonProcess) -> None:
    """Nor does it make a line of its own, where each line is a row."""
    identifier = "no\nisy\x1b[2J"
    done = coordinator.jef("workflows", "start", "noisy", "--id", identifier, "--wait")
    assert done.returncode == 0, done
    for words in (("show", identifier), ("history", identifier), ("list", "--workflow", "noisy")):
        shown = coordinator.jef("workflows", *words).stdout
        assert "\x1b" not in shown
        assert not [line for line in shown.splitlines() if line.startswith(("isy", "b"))]
    assert "\x1b" not in done.stdout
    assert all(line.startswith("20") for line in done.stdout.splitlines())


def test_a_status_that_is_none_is_told(coordinator: DaemonProcess) -> None:
    done = coordinator.jef("workflows", "list", "--status", "FAILD")
    assert (done.returncode, done.stdout) == (3, "")
    assert "FAILD is no status; one of QUEUED" in done.stderr


def test_who_stops_waiting_is_told_what_goes_on(coordinator: DaemonProcess) -> None:
    words = [
        "--config",
        str(coordinator.configuration),
        "workflows",
        "start",
        "slow",
        "--id",
        "slow-1",
        "--wait",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "jef_daemon", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    assert "slow-1 QUEUED" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=30)
    assert process.returncode == 130
    assert told == "jef: slow-1 is not stopped by this; see: jef workflows show slow-1\n"
    assert coordinator.jef("workflows", "cancel", "slow-1").returncode == 0


def test_what_was_refused_is_sent_again_once_it_is_mended(coordinator: DaemonProcess) -> None:
    """As a request for a workflow, which the exchange that takes those asks for no routing key."""
    assert coordinator.jef("workflows", "start", "missing", "--id", "mended").returncode == 1
    letters = coordinator.jef("dead-letters", "list", "--json").stdout.splitlines()
    (letter,) = [found for found in map(json.loads, letters) if found["workflowId"] == "mended"]
    assert letter["routingKey"] == f"{coordinator.prefix}.workflows"
    folder = coordinator.folder / "data" / "workflows"
    (folder / "missing.yaml").write_text(f"name: missing\n{DEFINITIONS['other']}")
    replayed = coordinator.jef("dead-letters", "replay", "mended")
    assert replayed.stdout == "1 sent again\n", replayed
    waited = coordinator.jef("workflows", "start", "other", "--id", "mended", "--wait")
    assert "mended is the id of a 'missing', which is COMPLETED" in waited.stderr


def test_without_a_coordinator_it_is_said_that_one_is_missing(coordinator: DaemonProcess) -> None:
    """Another daemon answers, but knows no workflow: that is no reason to say that there is none."""
    worker = DaemonProcess(coordinator.url, coordinator.prefix, coordinator.folder / "worker")
    worker.configuration.write_text('roles = ["worker"]\n' + worker.configuration.read_text())
    worker.start()
    try:
        coordinator.stop()
        started = coordinator.jef("workflows", "start", "other", "--id", "later")
        assert (started.returncode, started.stdout) == (0, "later\n")
        assert "no coordinator runs on this broker: later begins when one does" in started.stderr
        cancelled = coordinator.jef("workflows", "cancel", "nobody")
        assert cancelled.returncode == 4
        assert "no coordinator runs that could know nobody; the command waits for one" in cancelled.stderr
        coordinator.start()
        waited = coordinator.jef("workflows", "start", "other", "--id", "later", "--wait")
        assert waited.returncode == 0
        unknown = coordinator.jef("workflows", "cancel", "nobody")
        assert (unknown.returncode, "no coordinator knows nobody" in unknown.stderr) == (6, True)
    finally:
        worker.kill()
