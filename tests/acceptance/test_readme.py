"""The README, as printed: its executor, its configuration, its senders."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from broker import PrivateBroker

from tests.support.amqp import Client
from tests.support.process import DaemonProcess

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def block(language: str, containing: str, page: str = README) -> str:
    """A page's block of code in a language that contains a text."""
    found: list[str] = re.findall(rf"^```{language}\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    return next(text for text in found if containing in text)


@pytest.fixture
def readme_daemon(own_broker: PrivateBroker, tmp_path: Path) -> Iterator[DaemonProcess]:
    """A daemon in a folder with just what the README tells to write, called as it says."""
    folder = tmp_path / "readme"
    folder.mkdir()
    (folder / "thumbnail.py").write_text(block("python", "class Thumbnail"))
    daemon = DaemonProcess(own_broker.url, "jef", folder)
    daemon.configuration.write_text(block("toml", "[actions.thumbnail]"))
    (tmp_path / "data" / "workflows").mkdir(parents=True)
    daemon.start(JEF_AMQP_URL=own_broker.url, JEF_DATA_DIR=str(tmp_path / "data"), JEF_LOGGING__FORMAT="json")
    yield daemon
    daemon.kill()


async def test_the_readme_runs_as_printed(
    readme_daemon: DaemonProcess, own_broker: PrivateBroker, tmp_path: Path
) -> None:
    """Executor and configuration, then requests from the shell, from pika, from amqplib."""
    environment = os.environ | {"JEF_AMQP_URL": own_broker.url, "NODE_PATH": str(amqplib(tmp_path))}

    def call(*words: str) -> str:
        done = subprocess.run(
            words, check=False, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=30
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    async with Client(own_broker.url, "jef") as client:
        shell = block("sh", "jef submit").split()
        assert "done" in call(sys.executable, "-m", "jef_daemon", *shell[1:])
        call(sys.executable, "-c", block("python", "import pika"))
        call("node", "-e", block("js", "amqplib"))
        for name in ("asset-42-thumbnail", "asset-43-thumbnail"):
            end = await client.end_of(name)
            assert (end["status"], end["result"]) == ("COMPLETED", "done")
            assert end["jobContextVariables"] == {"width": 320}
            assert "In Progress" in [told["message"] for told in client.of(name)]
        (tmp_path / "data" / "workflows" / "several.yaml").write_text(block("yaml", "name: several"))
        started = shlex.split(block("sh", "workflows start"))
        assert "COMPLETED" in call(sys.executable, "-m", "jef_daemon", *started[1:])
        await client.until(lambda: any(told["status"] == "COMPLETED" for told in client.told_of_workflows))
        ends = {told["executionId"] for told in client.told if told["status"] == "COMPLETED"}
        stages = sorted(name.partition(":")[2] for name in ends if ":" in name)
        assert stages == ["each.0:1", "each.1:1", "poster:1"]


def amqplib(folder: Path) -> Path:
    """Install what the example for Node names; returns the folder of modules."""
    (folder / "package.json").write_text((ROOT / "examples/node/package.json").read_text())
    npm = ["npm", "install", "--no-package-lock", "--no-audit", "--no-fund", "--silent"]
    subprocess.run(npm, cwd=folder, check=True, timeout=100)
    return folder / "node_modules"


def test_the_example_is_the_readmes() -> None:
    """At most 15 lines of code, and the same as in `examples/`."""
    printed = block("python", "class Thumbnail")
    assert len([line for line in printed.splitlines() if line.strip()]) <= 15
    assert printed.strip() == (ROOT / "examples/thumbnail.py").read_text().partition('"""\n\n')[2].strip()
