"""The package as people install it: a wheel, outside the checkout."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.support.amqp import Client
from tests.support.process import DaemonProcess

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel in it, the locked dependencies beside it; returns its Python."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, timeout=100)
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True, timeout=60
    )
    python = folder / "venv" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", "--no-index"]
    wheel = next(folder.glob("jef_daemon-*.whl"))
    subprocess.run([*pip, str(wheel)], check=True, capture_output=True, timeout=100)
    site = next((folder / "venv").glob("lib/python*/site-packages"))
    # Found behind the wheel's own folder; its .pth files, the checkout's among them, are not read.
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return python


def test_the_wheel_is_what_runs(installed: Path, tmp_path: Path) -> None:
    """Not the checkout; with its type marker and its migrations; the console script is there."""
    script = "import jef_daemon; print(jef_daemon.__file__)"
    done = subprocess.run(
        [installed, "-c", script], check=True, cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    package = Path(done.stdout.strip()).parent
    assert package.is_relative_to(installed.parents[1])
    assert (package / "py.typed").exists()
    assert list((package / "ledger" / "migrations" / "versions").glob("0001_*.py"))
    done = subprocess.run(
        [installed.parent / "jef", "--version"], check=True, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.split()[0] == "jef_daemon"


def test_the_wheel_carries_the_units(installed: Path, tmp_path: Path) -> None:
    """There is no /usr/share for who installs with pip: `jef` writes them, and calls itself in them."""
    jef = installed.parent / "jef"
    done = subprocess.run(
        [jef, "systemd", "install", "--print"], check=True, capture_output=True, text=True, cwd=tmp_path
    )
    assert f"\nExecStart={jef} run --config /etc/jef-daemon/jef.toml\n" in done.stdout
    assert "\nProtectSystem=strict\n" in done.stdout
    assert "# /etc/tmpfiles.d/jef-daemon.conf\n" in done.stdout


async def test_the_wheel_runs_a_job(installed: Path, daemon: DaemonProcess, client: Client) -> None:
    """Ledger made by its own migrations, actions found by entry point."""
    daemon.configuration.write_text(
        f'amqp_url = "{daemon.url}"\nprefix = "{daemon.prefix}"\ndata_dir = "data"\n'
    )
    daemon.python, daemon.cwd = str(installed), daemon.folder
    daemon.start(JEF_LOGGING__FORMAT="json")
    (daemon.folder / "data" / "files" / "a").write_bytes(b"abc")
    await client.submit("checksum", "1", {"path": "a"})
    assert (await client.end_of("1"))["jobContextVariables"]["digest"].startswith("ba7816bf")
