"""The render farm of docs/executors.md, as printed: an async executor, and a worker with nothing of ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import aio_pika
import pytest
from broker import PrivateBroker

from tests.acceptance.test_readme import ROOT, block
from tests.support.amqp import Client
from tests.support.process import DaemonProcess

PAGE = (ROOT / "docs/executors.md").read_text()
WORKER = block("python", "def tell(", PAGE)


@pytest.fixture
def farm_daemon(own_broker: PrivateBroker, tmp_path: Path) -> Iterator[DaemonProcess]:
    """A daemon with the page's executor, which finds its broker where the daemon does."""
    daemon = DaemonProcess(own_broker.url, "jef", tmp_path / "daemon")
    (daemon.folder / "farm.py").write_text(block("python", "class Render", PAGE))
    daemon.configuration.write_text('python_path = ["."]\n[actions.render]\nexecutor = "farm:Render"\n')
    start(daemon)
    yield daemon
    daemon.kill()


def start(daemon: DaemonProcess) -> None:
    data = str(daemon.folder / "data")
    daemon.start(JEF_AMQP_URL=daemon.url, JEF_DATA_DIR=data, JEF_LOGGING__FORMAT="json")


@pytest.fixture
def worker(own_broker: PrivateBroker, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The other side, in a folder of its own."""
    folder = tmp_path / "worker"
    folder.mkdir()
    (folder / "worker.py").write_text(WORKER)
    assert "jef_daemon" not in WORKER
    environment = os.environ | {"JEF_AMQP_URL": own_broker.url}
    process = subprocess.Popen([sys.executable, "worker.py"], cwd=folder, env=environment)
    yield process
    process.kill()
    process.wait()


async def test_the_farm_renders(
    farm_daemon: DaemonProcess, worker: subprocess.Popen[bytes], own_broker: PrivateBroker
) -> None:
    """To the end; not what has no scene; and no longer than somebody wants it."""
    async with Client(own_broker.url, "jef") as client:
        await client.submit("render", "r-1", {"scene": "moon", "frames": 5})
        end = await client.end_of("r-1")
        assert (end["status"], end["result"], end["jobContextVariables"]) == (
            "COMPLETED",
            "moon",
            {"frames": 5},
        )
        assert end["externalId"] == "r-1-1"
        assert "frame 3" in [told["message"] for told in client.of("r-1")]
        await client.submit("render", "r-2", {"scene": ""})
        failed = await client.end_of("r-2")
        assert failed["error"] == {"type": "ValueError", "message": "no scene"}
        await client.submit("render", "r-3", {"scene": "sun", "frames": 10_000})
        await client.until(lambda: any(told["message"] == "frame 2" for told in client.of("r-3")))
        cancel = {"command": "cancel", "executionId": "r-3", "reason": "too long", "by": "ann"}
        await client.channel.default_exchange.publish(
            aio_pika.Message(json.dumps(cancel).encode()), "jef.control"
        )
        cancelled = await client.end_of("r-3")
        assert cancelled["status"] == "CANCELLED"
        assert cancelled["message"].startswith("stopped before frame ")
        await client.submit("render", "r-4", {"scene": "star", "frames": 1})
        assert (await client.end_of("r-4"))["status"] == "COMPLETED"
    assert worker.poll() is None


async def test_the_farm_goes_on_without_the_daemon(
    farm_daemon: DaemonProcess, worker: subprocess.Popen[bytes], own_broker: PrivateBroker
) -> None:
    """Killed while the farm renders, it hears the rest when it is back; the attempt is the same."""
    async with Client(own_broker.url, "jef") as client:
        await client.submit("render", "r-1", {"scene": "moon", "frames": 30})
        await client.until(lambda: any(told["message"] == "frame 2" for told in client.of("r-1")))
        farm_daemon.kill()
        start(farm_daemon)
        end = await client.end_of("r-1", 60)
        assert (end["status"], end["attempt"], end["jobContextVariables"]) == ("COMPLETED", 1, {"frames": 30})
        assert client.statuses("r-1").count("QUEUED") == 1
