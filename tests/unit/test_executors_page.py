"""The examples of docs/executors.md, as printed: executors, their configuration, their unit tests."""

from __future__ import annotations

import importlib
import inspect
import json
import re
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from jef_daemon import config
from jef_daemon.actions.output import Output, Patterns
from jef_daemon.retry import RetryPolicy
from jef_daemon.run.boundary import JobInput, hooks_of, is_blocking, perform_blocking
from jef_daemon.run.catalogue import Action, load, specs
from jef_daemon.run.probe import _override
from jef_daemon.settings import Settings
from jef_daemon.testing import run

PAGE = (Path(__file__).resolve().parents[2] / "docs/executors.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
MODULES = {
    re.findall(r"`(\w+)\.py`", PAGE[: found.start()])[-1]: found[2]
    for found in BLOCK.finditer(PAGE)
    if found[1] == "python" and "def test_" not in found[2]
}
"""Each is printed behind its name."""
TESTS = next(text for language, text in BLOCK.findall(PAGE) if language == "python" and "def test_" in text)
TOML = "\n".join(text for language, text in BLOCK.findall(PAGE) if language == "toml")


@pytest.fixture
def printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Imports a module of the page."""
    folder = tmp_path / "printed"
    folder.mkdir()
    for name, text in MODULES.items():
        (folder / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(folder)
    return importlib.import_module


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """The page's configuration, in one file."""
    path = tmp_path / "jef.toml"
    path.write_text(TOML)
    return config.load(path, {}, {})


def test_each_example_has_a_name() -> None:
    """And there is no other block than those that are tested here, or with a broker (farm, worker)."""
    assert sorted(MODULES) == ["arrive", "farm", "load", "pack", "watchfolder", "worker"]
    assert {language for language, _ in BLOCK.findall(PAGE)} == {"python", "toml"}
    assert max(len(line) for text in [*MODULES.values(), TESTS] for line in text.splitlines()) <= 110


@pytest.mark.parametrize("name", re.findall(r"^def (test_\w+)", TESTS, re.MULTILINE))
def test_the_pages_own_tests_pass(name: str, printed: Callable[[str], ModuleType], tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    found: dict[str, Any] = {}
    exec(TESTS, found)
    test = found[name]
    test(**dict.fromkeys(inspect.signature(test).parameters, folder))


def test_the_executors_are_what_the_page_calls_them(
    printed: Callable[[str], ModuleType], settings: Settings
) -> None:
    """Coroutine, blocking, async with which methods; those that the configuration names can be loaded."""
    blocks = {
        name: is_blocking(getattr(printed(module), name)())
        for module, name in (("arrive", "Arrive"), ("pack", "Pack"), ("load", "Load"), ("farm", "Render"))
    }
    assert blocks == {"Arrive": False, "Pack": True, "Load": True, "Render": True}
    found = specs(settings)
    assert load(found["arrive"]).Configuration is printed("arrive").Arrive.Configuration
    assert hooks_of(load(found["transcode"])) == {"poll": True, "cancel": True}


def test_a_file_that_grows_has_not_arrived(
    printed: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor one that is not there; it is told how far it is."""
    path, sizes = tmp_path / "a.mov", iter((1, 4, 9))

    async def grow(seconds: float) -> None:
        assert seconds == 5
        path.write_bytes(b"x" * next(sizes, 9))

    monkeypatch.setattr(printed("arrive").asyncio, "sleep", grow)
    job = run(printed("arrive").Arrive, {"path": path})
    assert (job.status, job.variables) == ("COMPLETED", {"size": 9})
    assert [told["message"] for told in job.notifications[2:-1]] == [
        f"{size} bytes so far" for size in (0, 1, 4, 9)
    ]


def test_a_folder_is_packed_whole_or_not_at_all(
    printed: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the middle, by whatever, it leaves nothing; what was there stays."""
    pack, target = printed("pack"), tmp_path / "out.tar"
    (tmp_path / "in/deep").mkdir(parents=True)
    for name in ("a", "b", "deep/c"):
        (tmp_path / "in" / name).write_text(name)
    configuration = {"folder": tmp_path / "in", "target": target}
    job = run(pack.Pack, configuration)
    assert (job.result, [told["message"] for told in job.notifications[2:-1]]) == ("3 files", ["a", "b", "c"])
    with pack.tarfile.open(target) as archive:
        assert archive.getnames() == ["a", "b", "deep/c"]
    before = target.read_bytes()

    class Stopped(BaseException):
        """As the signal's handler raises it."""

    def add(archive: Any, path: Path, name: Path) -> None:
        if path.name == "b":
            raise Stopped

    monkeypatch.setattr(pack.tarfile.TarFile, "add", add)
    assert run(pack.Pack, configuration).status == "FAILED"
    assert (target.read_bytes(), sorted(tmp_path.glob("out*"))) == (before, [target])


def test_lines_are_loaded_once_whatever_came_between(
    printed: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    """The second attempt goes on where the first one stopped, the step before it repeated or not."""
    executor, path = printed("load").Load, tmp_path / "lines.db"
    (tmp_path / "lines").write_text("".join(f"line {number}\n" for number in range(250)))
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE lines (number INTEGER PRIMARY KEY, text TEXT NOT NULL)")
        database.execute(
            "CREATE TRIGGER full BEFORE INSERT ON lines WHEN NEW.number = 150 BEGIN SELECT RAISE(ABORT, 'full'); END"
        )
    configuration = {"source": tmp_path / "lines", "database": path}
    first = run(executor, configuration)
    assert (first.status, first.checkpoint) == ("FAILED", 100)
    with sqlite3.connect(path) as database:
        assert database.execute("SELECT count(*) FROM lines").fetchone() == (100,)
        database.execute("DROP TRIGGER full")
        database.execute("UPDATE lines SET text = 'old' WHERE number = 7")
    second = run(executor, configuration, attempt=2, saved=first.checkpoint)
    assert (second.status, second.checkpoint) == ("COMPLETED", 300)
    with sqlite3.connect(path) as database:
        assert database.execute("SELECT count(*) FROM lines").fetchone() == (250,)
        assert database.execute("SELECT text FROM lines WHERE number = 7").fetchone() == ("old",)
    assert run(executor, configuration, attempt=3, saved=200).status == "COMPLETED"


def test_the_transcoder_is_asked_until_it_is_done(
    printed: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    """No report yet, half, done; or an error, which is the work's."""
    for folder in ("orders", "reports"):
        (tmp_path / folder).mkdir()
    transcode = printed("watchfolder").Transcode(printed("watchfolder").Transcode.Settings(folder=tmp_path))
    told: list[Any] = []

    def poll() -> Any:
        job = JobInput("7", "transcode", {"source": "a"}, "s", call="poll", external_id="7-1")
        return perform_blocking(transcode, job, lambda percent, message: told.append(percent))

    assert poll() is None
    report = tmp_path / "reports/7-1.json"
    report.write_text(json.dumps({"percent": 50}))
    assert poll() is None
    report.write_text(json.dumps({"percent": 100, "target": "b"}))
    assert poll().job_context_variables == {"target": "b"}
    assert told == [50, 100]
    report.write_text(json.dumps({"error": "no video"}))
    assert (poll().error_type, poll().error_message) == ("ExternalFailure", "no video")
    job = run(transcode, {"source": "a"}, execution_id="7")
    assert (job.status, job.error and job.error["message"]) == ("FAILED", "no video")
    assert [told["status"] for told in job.notifications] == ["QUEUED", "RUNNING", "RUNNING", "FAILED"]


def test_the_command_packs(settings: Settings, tmp_path: Path) -> None:
    """And says what it packs just now, by its own output."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a").write_text("a")
    spec = specs(settings)["tar"]
    job = run(load(spec), {"folder": str(tmp_path / "in"), "target": str(tmp_path / "out.tar")})
    assert job.status == "COMPLETED", job.error
    assert (tmp_path / "out.tar").stat().st_size > 0
    told: list[Any] = []
    output = Output(
        Patterns.of(None, None, settings.actions["tar"].executor_settings["message_pattern"]),
        0,
        lambda *words: told.append(words),
    )
    output.feed(b"./\n./a\n")
    assert told == [(None, "./a")]


def test_the_delays_are_those_that_the_comments_say(settings: Settings) -> None:
    """And all keys but two have the defaults."""
    action = Action(specs(settings)["arrive"])
    _override(action, settings.actions["load"])
    policy = action.retry
    assert [policy.delay_s(attempt, 0) for attempt in (1, 2, 3)] == [2, 4, 8]
    assert policy.delay_s(20, 0) == 300
    assert policy.delay_s(1, 1) == pytest.approx(1.6)
    assert RetryPolicy(attempts=5, first_s=2.0, not_on=policy.not_on) == policy
