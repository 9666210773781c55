"""What runs beside the daemon's own process: the probe of executors, the pool of blocking ones."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from jef_daemon.events import Completed, Event, Failed
from jef_daemon.run import probe
from jef_daemon.run.boundary import JobInput
from jef_daemon.run.catalogue import ActionSpec
from jef_daemon.run.isolation import ProcessPool
from jef_daemon.settings import Settings
from tests.support.process import ROOT

LEAVES = """
import gc, multiprocessing
from jef_daemon.run.guardian import Guardian
guardian = Guardian("sqlite:////none")
guardian.start()
kept = multiprocessing.get_context("forkserver").Semaphore()
guardian.stop()
del kept
gc.collect()
"""
CULPRITS = {
    "hangs": ("import time; time.sleep(600)", "took longer than"),
    "leaves": ("import os; os._exit(0)", "ended the interpreter"),
    "crashes": ("import ctypes; ctypes.string_at(0)", "ended the interpreter"),
    "exits": ("import sys; sys.exit(3)", "raised SystemExit: 3"),
    "misses": ("import no_such_library_x", "there is no module no_such_library_x"),
}
FINE = """
from jef_daemon import ActionExecutor
print("noise on standard output")
class C(ActionExecutor):
    action = "c"
    def execute(self, context):
        return None
"""


def test_the_end_of_all_that_is_ours_is_silent() -> None:
    """Also where something of ours is let go only behind it: who keeps account of that is there still."""
    done = subprocess.run(
        [sys.executable, "-c", LEAVES], cwd=ROOT, check=True, capture_output=True, text=True, timeout=60
    )
    assert (done.stdout, done.stderr) == ("", "")


async def test_whatever_an_import_does_makes_only_its_own_action_unserved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each culprit is named with what it did; those before and behind it are served."""
    monkeypatch.setattr(probe, "_EACH_S", 8.0)
    texts = {name: text for name, (text, _) in CULPRITS.items()} | {"a_fine": FINE, "z_fine": FINE}
    for name, text in texts.items():
        (tmp_path / f"probed_{name}.py").write_text(text)
    actions = {name: {"executor": f"probed_{name}:C"} for name in sorted(texts)}
    settings = Settings.model_validate(
        {"data_dir": tmp_path, "python_path": [tmp_path, ROOT], "actions": actions}
    )
    catalogue = await probe.examine(settings)
    for name, (_, said) in CULPRITS.items():
        assert said in catalogue.all[name].problem
        assert f"actions.{name}" in catalogue.all[name].problem
    assert {"a_fine", "z_fine", "checksum", "copy"} <= set(catalogue.served)
    assert not CULPRITS.keys() & catalogue.served.keys()


def spec(folder: Path, name: str, text: str) -> ActionSpec:
    (folder / f"{name}.py").write_text(text)
    return ActionSpec("c", f"{name}:C")


async def test_an_import_that_exits_in_the_pool_fails_its_job_alone(tmp_path: Path) -> None:
    """It was fine when it was probed, and is not any more: the event loop must not hear of SystemExit."""
    pool = ProcessPool(2, 1, 1.0, [tmp_path, ROOT])
    await pool.start()
    try:
        exits = spec(tmp_path, "pooled_exits", "import sys; sys.exit('no licence')")
        job = JobInput(execution_id="1", action="c", configuration={}, scratch=str(tmp_path / "s"))
        with pytest.raises(Exception, match="no licence"):
            await pool.perform(exits, job, lambda percent, message: None)
        fine = spec(tmp_path, "pooled_fine", FINE)
        assert await pool.perform(fine, job, lambda percent, message: None) == Completed()
    finally:
        await pool.close()


async def test_a_job_that_is_cancelled_before_its_process_is_there_leaves_none(tmp_path: Path) -> None:
    """Neither a process nor a place for its reports: a limit of milliseconds must not fill the machine."""
    pool = ProcessPool(2, 0, 1.0, [tmp_path, ROOT])
    await pool.start()
    fine = spec(tmp_path, "pooled_cancelled", FINE)
    job = JobInput(execution_id="1", action="c", configuration={}, scratch=str(tmp_path / "s"))
    try:
        assert not isinstance(await pool.perform(fine, job, lambda percent, message: None), Failed)
        before = _processes()
        taken = [pool._idle.pop() for _ in range(len(pool._idle))]
        for _ in range(5):
            task = asyncio.create_task(pool.perform(fine, job, lambda percent, message: None))
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait({task})
            assert task.cancelled()
        assert pool._all == set(taken)
        assert not pool._reports
        async with asyncio.timeout(20):
            while _processes() > before:
                await asyncio.sleep(0.05)
    finally:
        await pool.close()


async def test_processes_that_are_replaced_are_counted_by_why(tmp_path: Path) -> None:
    """One that crashed, one that was stopped; those that did their job go on."""
    pool = ProcessPool(1, 0, 1.0, [tmp_path, ROOT])
    await pool.start()
    text = f"""
import os, pathlib, time
from jef_daemon import ActionExecutor
class C(ActionExecutor):
    def execute(self, context):
        if context.execution_id == "crashes":
            os._exit(1)
        if context.execution_id == "hangs":
            pathlib.Path({str(tmp_path)!r}, "begun").touch()
            time.sleep(600)
"""
    one = spec(tmp_path, "pooled_ended", text)

    async def perform(name: str) -> Event | None:
        job = JobInput(execution_id=name, action="c", configuration={}, scratch=str(tmp_path / "scratch"))
        return await pool.perform(one, job, lambda percent, message: None)

    try:
        assert await perform("works") == await perform("again") == Completed()
        assert pool.restarts == {}
        assert isinstance(await perform("crashes"), Failed)
        assert pool.restarts == {"crashed": 1}
        hangs = asyncio.create_task(perform("hangs"))
        while not (tmp_path / "begun").exists():
            await asyncio.sleep(0.02)
        hangs.cancel()
        await asyncio.wait({hangs})
        assert pool.restarts == {"crashed": 1, "stopped": 1}
        assert await perform("works") == Completed()
    finally:
        await pool.close()


def _processes() -> int:
    return len(psutil.Process().children(recursive=True))


async def test_renewed_processes_import_anew(tmp_path: Path) -> None:
    """Idle ones are gone at once, one that works when it is done; what is started then sees the file as it is."""
    pool = ProcessPool(2, 2, 1.0, [tmp_path, ROOT])
    await pool.start()
    text = f"""
import pathlib, time
from jef_daemon import ActionExecutor, ActionExecutorResponse
class C(ActionExecutor):
    def execute(self, context):
        pathlib.Path({str(tmp_path)!r}, context.execution_id).touch()
        while not pathlib.Path({str(tmp_path)!r}, "open").exists():
            time.sleep(0.02)
        return ActionExecutorResponse(result="old")
"""
    one = spec(tmp_path, "pooled_renewed", text)

    async def perform(name: str) -> str:
        job = JobInput(execution_id=name, action="c", configuration={}, scratch=str(tmp_path / "scratch"))
        event = await pool.perform(one, job, lambda percent, message: None)
        assert isinstance(event, Completed)
        return event.result

    try:
        works = asyncio.create_task(perform("works"))
        while not (tmp_path / "works").exists():
            await asyncio.sleep(0.02)
        [idle] = pool._idle
        spec(tmp_path, "pooled_renewed", text.replace("old", "as it is now"))
        await pool.renew(2, 1, 1.0, [tmp_path, ROOT])
        [fresh] = pool._idle
        assert fresh is not idle
        assert not idle.is_alive
        assert pool.restarts == {"renewed": 2}
        (tmp_path / "open").touch()
        assert await works == "old"
        assert pool._idle == [fresh], "the one that worked is not used again"
        assert await perform("comes") == "as it is now"
    finally:
        await pool.close()
