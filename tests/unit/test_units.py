"""What systemd reads: one source for all units, the time to stop that the settings ask for, what `install` writes."""

from __future__ import annotations

import difflib
import inspect
import os
import re
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from docs import generate
from jef_daemon import units
from jef_daemon.cli.app import app
from jef_daemon.daemon import Daemon
from jef_daemon.errors import SettingsError
from jef_daemon.run.worker import Worker
from jef_daemon.settings import Settings

SYSTEMD = generate.ROOT / "systemd"
PLACE = units.Place(("/opt/jef-daemon/bin/jef",), stop_s=190)


@pytest.mark.parametrize("path", generate.FILES, ids=lambda path: path.name)
def test_the_packaged_files_are_up_to_date(path: Path) -> None:
    """`make docs` writes them from the source that `jef systemd install` has too."""
    assert path.read_text() == generate.FILES[path]()


def test_the_template_differs_in_its_role_and_nothing_else() -> None:
    one, many = (
        (SYSTEMD / name).read_text().splitlines() for name in ("jef-daemon.service", "jef-daemon@.service")
    )
    changed = [line for line in difflib.ndiff(one, many) if line.startswith("+ ")]
    said = [re.split(r"[=:]", line.removeprefix("+ "))[0] for line in changed]
    assert said == [
        "# One role of the job daemon",
        "Description",
        "ExecStart",
        "# /var/lib/jef-daemon-%i",
        "StateDirectory",
    ]


# --- the time to stop ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["jef-daemon.service", "jef-daemon@.service"])
def test_the_default_settings_fit_into_the_time_to_stop(name: str) -> None:
    found = re.search(r"^TimeoutStopSec=(\d+)$", (SYSTEMD / name).read_text(), re.MULTILINE)
    assert found
    assert int(found[1]) == units.stop_within_s(Settings())


def test_every_step_of_the_way_down_is_counted() -> None:
    """Each may take its whole time when broker and disk hang; after a role failed, the worker is drained twice."""
    steps = inspect.getsource(Daemon._end).count("), shutdown.flush_s)")
    steps += 2 * inspect.getsource(Worker.drain).count("flush_s, haste)")
    plain = {"drain_s": 30.0, "flush_s": 0.0}
    without = units.stop_within_s(Settings.model_validate({"shutdown": plain}))
    with_flush = units.stop_within_s(Settings.model_validate({"shutdown": plain | {"flush_s": 1.0}}))
    assert steps >= 10
    assert with_flush - without >= steps


def test_a_longer_drain_gets_its_time() -> None:
    longer = Settings.model_validate({"shutdown": {"drain_s": 3600}, "jobs": {"kill_grace_s": 60}})
    assert units.stop_within_s(longer) > 3600 + 60


# --- what is written -------------------------------------------------------------------------------------


def test_systemd_takes_odd_paths_as_they_are() -> None:
    """No space, quote, specifier or variable in a path means anything."""
    place = units.Place(('/opt/a "b" %i/jef',), config="/etc/$HOME.toml")
    unit = units.service(place)
    assert r'ExecStart="/opt/a \"b\" %%i/jef" run --config "/etc/$$HOME.toml"' in unit


def test_a_users_unit_asks_for_nothing_that_only_root_may_do() -> None:
    unit = units.user_service(PLACE)
    keys = set(re.findall(r"^(\w+)=", unit, re.MULTILINE))
    machine = set(re.findall(r"^(\w+)=", units.service(PLACE), re.MULTILINE))
    assert {"Type", "WatchdogSec", "TimeoutStopSec", "WantedBy"} <= keys
    assert not keys & {
        "User",
        "LoadCredential",
        "CapabilityBoundingSet",
        "ProtectSystem",
        "PrivateTmp",
        "After",
    }
    assert "WantedBy=default.target" in unit
    assert keys <= machine


def install(*words: str) -> Result:
    return CliRunner().invoke(app, ["systemd", "install", *words])


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine where nothing is set."""
    generate.command_tree()
    monkeypatch.setattr("jef_daemon.cli.app.common.config", None)
    monkeypatch.setattr("jef_daemon.cli.app.common.overrides", {})
    for name in [name for name in os.environ if name.startswith("JEF_")]:
        monkeypatch.delenv(name)


def test_install_writes_the_files_below_a_root(tmp_path: Path) -> None:
    """With this `jef`, the configuration that was named, and the time to stop that it asks for."""
    config = tmp_path / "some jef.toml"
    config.write_text("[shutdown]\ndrain_s = 3600\n")
    done = install("--root", str(tmp_path / "image"), "--config", str(config))
    assert done.exit_code == 0, done.output
    written = {
        path.relative_to(tmp_path / "image") for path in (tmp_path / "image").rglob("*.*") if path.is_file()
    }
    assert {str(path) for path in written} == {
        "etc/systemd/system/jef-daemon.service",
        "etc/sysusers.d/jef-daemon.conf",
        "etc/tmpfiles.d/jef-daemon.conf",
    }
    assert all(str(path) in done.output for path in written)
    unit = (tmp_path / "image/etc/systemd/system/jef-daemon.service").read_text()
    assert f'ExecStart={Path(sys.executable).parent / "jef"} run --config "{config}"\n' in unit
    assert "TimeoutStopSec=3780\n" in unit
    assert "jef.toml" not in (tmp_path / "image/etc/tmpfiles.d/jef-daemon.conf").read_text()


def test_install_shows_and_writes_nothing(tmp_path: Path) -> None:
    done = install("--print", "--root", str(tmp_path), "--role", "locks", "--account", "jobs")
    assert done.exit_code == 0, done.output
    assert list(tmp_path.iterdir()) == []
    assert f"# {tmp_path}/etc/systemd/system/jef-daemon@.service\n" in done.output
    assert "run --role %i --config /etc/jef-daemon/jef.toml\n" in done.output
    assert "\nUser=jobs\nGroup=jobs\n" in done.output
    assert "\nu jobs - " in done.output
    # A configuration that needs nothing more: who has no package has none yet.
    assert (
        '\nf /etc/jef-daemon/jef.toml 0640 root jobs - amqp_url_file = "/etc/jef-daemon/amqp-url"\n'
        in done.output
    )


def test_a_user_installs_without_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And is told what comes next; a second time nothing changes."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    first, second = install("--user"), install("--user")
    unit = tmp_path / "systemd/user/jef-daemon.service"
    assert f"written: {unit}" in first.output
    assert "systemctl --user enable --now jef-daemon" in first.output
    assert f"is there: {unit}" in second.output
    assert re.search(r"^ExecStart=\S+ run$", unit.read_text(), re.MULTILINE)


def test_install_needs_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    done = install()
    assert isinstance(done.exception, SettingsError)
    assert "as root: use sudo, or --user" in str(done.exception)


@pytest.mark.parametrize("folder", ["/home/ada/venv", "/root/.venv"])
def test_install_refuses_a_place_that_the_unit_hides(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """ProtectHome would make of it a unit that cannot find its program."""
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(sys, "prefix", folder)
    done = install()
    assert isinstance(done.exception, SettingsError)
    assert f"this jef is in {folder}" in str(done.exception)
