"""One real, private RabbitMQ for the whole run; a prefix of its own for every test.

`JEF_AMQP_URL` uses a broker that is there already; `JEF_TEST_RABBITMQ_PREFIX` another version of RabbitMQ.
A broker that cannot be had is an error, never a skip.
"""

from __future__ import annotations

import asyncio
import gc
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
from broker import URL_VARIABLE, PrivateBroker
from hypothesis import HealthCheck, settings

from tests.support.amqp import Client, delete_all
from tests.support.process import ROOT, DaemonProcess

settings.register_profile("dev", deadline=None, max_examples=50)
# CI looks at the same examples each time: what it finds there was changed by the commit it checks. New ones are
# looked for in development.
settings.register_profile(
    "ci", deadline=None, max_examples=100, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))

# Run in the background of a script we are told to ignore Ctrl-C, and what we start would be told so by us.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with long tests begin first: whoever ran one last would keep the others waiting."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


def pytest_collection_finish() -> None:
    """What was imported and collected stays: looking through it for garbage took a tenth of the unit tests' time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def broker() -> Iterator[PrivateBroker]:
    """A running private broker."""
    with tempfile.TemporaryDirectory(prefix="jef-broker-", ignore_cleanup_errors=True) as folder:
        private = PrivateBroker(Path(folder))
        private.start()
        yield private
        private.remove()


@pytest.fixture
def own_broker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PrivateBroker]:
    """A broker of this test's own, to be killed and restarted: never one of the outside."""
    monkeypatch.delenv(URL_VARIABLE, raising=False)
    private = PrivateBroker(tmp_path / "broker")
    private.start()
    yield private
    private.remove()


@pytest.fixture
def queue_type(own_broker: PrivateBroker) -> str:
    """What survives a `kill -9` of this broker.

    In RabbitMQ 3.10 and 4.0 a quorum queue may come back from it without its log and without a leader, and
    is deaf for good (`rabbit_quorum_queue:consume` times out in its log); 4.3 does better.
    """
    return "classic" if own_broker.ctl("version").startswith(("3.", "4.0")) else "quorum"


@pytest.fixture
def amqp_url(broker: PrivateBroker) -> str:
    """Where the broker is."""
    return broker.url


@pytest.fixture
def prefix(amqp_url: str) -> Iterator[str]:
    """Names of this test's own; its queues and exchanges are deleted afterwards."""
    name = f"t{secrets.token_hex(4)}"
    yield name
    asyncio.run(delete_all(amqp_url, name))


@pytest.fixture
async def client(amqp_url: str, prefix: str) -> AsyncIterator[Client]:
    """A foreign client: speaks plain AMQP, knows only the wire protocol."""
    async with Client(amqp_url, prefix) as connected:
        yield connected


@pytest.fixture
def daemon(amqp_url: str, prefix: str, tmp_path: Path) -> Iterator[DaemonProcess]:
    """A daemon process, not started yet, with the test's actions."""
    process = DaemonProcess(amqp_url, prefix, tmp_path / "daemon")
    yield process
    process.kill()


@pytest.fixture
def start(daemon: DaemonProcess) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a command that goes on; what is left of it is killed."""
    started: list[subprocess.Popen[str]] = []

    def popen(*arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "jef_daemon", "--config", str(daemon.configuration), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "COLUMNS": "160"},
            start_new_session=True,
        )
        started.append(process)
        return process

    yield popen
    for process in started:
        process.kill()
        process.communicate()
