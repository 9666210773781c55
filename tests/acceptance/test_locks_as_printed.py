"""The documentation's examples of locks, as printed: an executor with its store, a client that holds a lock."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import aio_pika
import pytest
from broker import URL_VARIABLE, PrivateBroker

from tests.acceptance.test_readme import README, ROOT, block
from tests.support.amqp import Client
from tests.support.process import DaemonProcess

REQUEST = block("json", "retitle-42-1")
WIRE = (ROOT / "docs/wire-protocol.md").read_text()
HOLD = block("python", "import pika", WIRE)
LEASE_S = 6.0
"""Instead of the page's 60, so that renewals and their absence are seen in seconds."""


@pytest.fixture(scope="module")
def jef_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateBroker]:
    """A broker whose names are those of the pages; never one of the outside."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(URL_VARIABLE, raising=False)
        private = PrivateBroker(tmp_path_factory.mktemp("jef-broker"))
        private.start()
        yield private
        private.remove()


@pytest.fixture
def environment(jef_broker: PrivateBroker, tmp_path: Path) -> dict[str, str]:
    data = str(tmp_path / "data")
    return {"JEF_AMQP_URL": jef_broker.url, "JEF_DATA_DIR": data, "JEF_LOGGING__FORMAT": "json"}


@pytest.fixture
def locking_daemon(
    jef_broker: PrivateBroker, environment: dict[str, str], tmp_path: Path
) -> Iterator[DaemonProcess]:
    """A daemon with the README's executor, in the folder of its store."""
    daemon = DaemonProcess(jef_broker.url, "jef", tmp_path / "daemon")
    (daemon.folder / "retitle.py").write_text(block("python", "class Retitle"))
    assert '`[actions.retitle] executor = "retitle:Retitle"`' in README
    daemon.configuration.write_text('python_path = ["."]\n[actions.retitle]\nexecutor = "retitle:Retitle"\n')
    with sqlite3.connect(daemon.folder / "assets.db") as store:
        store.execute("CREATE TABLE assets (id INTEGER PRIMARY KEY, title TEXT, fence INTEGER)")
        store.execute("INSERT INTO assets VALUES (42, '', 0)")
    daemon.cwd = daemon.folder
    daemon.start(ready=True, **environment, PYTHONPATH=str(ROOT))
    yield daemon
    daemon.kill()
    asyncio.run(delete(jef_broker.url, names(jef_broker, "exchanges"), names(jef_broker, "queues")))


def names(broker: PrivateBroker, kind: str) -> list[str]:
    """The exchanges or queues that are there, of the daemons' prefix."""
    listed = json.loads(broker.ctl(f"list_{kind}", "name", "--formatter=json", "--quiet"))
    return sorted(each["name"] for each in listed if each["name"].startswith("jef."))


async def delete(url: str, exchanges: Sequence[str], queues: Sequence[str] = ()) -> None:
    async with await aio_pika.connect(url) as connection:
        channel = await connection.channel()
        for name in exchanges:
            await channel.exchange_delete(name)
        for name in queues:
            await channel.queue_delete(name)


def asset(daemon: DaemonProcess) -> tuple[str, int]:
    with sqlite3.connect(daemon.folder / "assets.db") as store:
        found: tuple[str, int] = store.execute("SELECT title, fence FROM assets WHERE id = 42").fetchone()
        return found


async def test_the_store_refuses_an_older_number(
    locking_daemon: DaemonProcess, environment: dict[str, str], jef_broker: PrivateBroker
) -> None:
    """The README's two requests, then one after a write that knows of a later lock."""
    async with Client(jef_broker.url, "jef") as client:
        await client.publish("retitle", REQUEST.encode())
        assert (await client.end_of("retitle-42-1"))["status"] == "COMPLETED"
        assert asset(locking_daemon) == ("Take one", 1)
        done = locking_daemon.jef(*shlex.split(block("sh", "jef submit retitle"))[1:], **environment)
        assert done.returncode == 0, done.stdout + done.stderr
        assert asset(locking_daemon) == ("Take two", 2)
        with sqlite3.connect(locking_daemon.folder / "assets.db") as store:
            store.execute("UPDATE assets SET fence = 34")
        await client.publish("retitle", REQUEST.replace("42-1", "42-3").encode())
        end = await client.end_of("retitle-42-3")
        assert (end["status"], end["error"]["type"]) == ("FAILED", "PermissionError")
        assert asset(locking_daemon) == ("Take two", 34)


class Hold:
    """`hold.py` around a program that writes its fencing number to a file, and then stays for a time."""

    def __init__(self, url: str, folder: Path, stay_s: float) -> None:
        self.folder = folder
        folder.mkdir()
        (folder / "hold.py").write_text(HOLD.replace("LEASE_S = 60\n", f"LEASE_S = {LEASE_S}\n"))
        assert f"LEASE_S = {LEASE_S}" in (folder / "hold.py").read_text()
        stay = f"echo $$ $FENCING_TOKEN > there.new; mv there.new there; exec sleep {stay_s}"
        self.process = subprocess.Popen(
            [sys.executable, "hold.py", "asset/42", "sh", "-c", stay],
            cwd=folder,
            env={**os.environ, "JEF_AMQP_URL": url},
            stderr=(folder / "said").open("wb"),
        )

    @property
    def there(self) -> list[int]:
        """The program's process and number, once it runs."""
        path = self.folder / "there"
        return [int(word) for word in path.read_text().split()] if path.exists() else []

    @property
    def said(self) -> str:
        return (self.folder / "said").read_text()


def wait(is_true: Callable[[], object], within_s: float = 20) -> None:
    until = time.monotonic() + within_s
    while not is_true():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.05)


@pytest.fixture
def hold(jef_broker: PrivateBroker, tmp_path: Path) -> Iterator[Callable[[float], Hold]]:
    made: list[Hold] = []

    def make(stay_s: float) -> Hold:
        made.append(Hold(jef_broker.url, tmp_path / f"hold-{len(made)}", stay_s))
        return made[-1]

    yield make
    for each in made:
        each.process.terminate()
        each.process.wait(10)


async def test_a_client_holds_a_lock_while_its_program_runs(
    locking_daemon: DaemonProcess, jef_broker: PrivateBroker, hold: Callable[[float], Hold]
) -> None:
    """Longer than its lease; a job and a second client wait for it, in order, each with the next number."""
    first = hold(1.5 * LEASE_S)
    wait(lambda: first.there)
    async with Client(jef_broker.url, "jef") as client:
        await client.publish("retitle", REQUEST.encode())
        await client.until(lambda: "WAITING_FOR_LOCK" in client.statuses("retitle-42-1"))
        told = client.of("retitle-42-1")[1]["waitingFor"]
        assert [name.partition("-")[0] for name in told["holders"]] == ["hold"]
        second = hold(0)
        wait(lambda: "2 in line behind ['hold-" in second.said)
        assert first.process.wait(20) == 0
        assert (await client.end_of("retitle-42-1"))["status"] == "COMPLETED"
    assert second.process.wait(20) == 0
    assert [first.there[1], asset(locking_daemon)[1], second.there[1]] == [1, 2, 3]


async def test_a_client_whose_lock_is_taken_away_kills_its_program(
    locking_daemon: DaemonProcess, jef_broker: PrivateBroker, hold: Callable[[float], Hold]
) -> None:
    """By an operator who says why."""
    held = hold(600)
    wait(lambda: held.there)
    async with Client(jef_broker.url, "jef") as client:
        request = {
            "operation": "force-release",
            "locks": [{"resource": "asset/42"}],
            "reason": "lunch",
            "by": "ann",
        }
        body = json.dumps(request).encode()
        await client.channel.default_exchange.publish(aio_pika.Message(body), "jef.locks")
        assert held.process.wait(20) == 1
    assert "asset/42 is lost: released by force by ann: lunch" in held.said
    assert not Path(f"/proc/{held.there[0]}").exists()


def test_a_client_without_word_from_the_service_stops_in_time(
    locking_daemon: DaemonProcess, hold: Callable[[float], Hold]
) -> None:
    held = hold(600)
    wait(lambda: held.there)
    locking_daemon.kill()
    assert held.process.wait(LEASE_S) == 1
    assert "no word from the lock service" in held.said
    assert not Path(f"/proc/{held.there[0]}").exists()


def test_a_client_that_is_stopped_leaves_nothing(
    locking_daemon: DaemonProcess, hold: Callable[[float], Hold]
) -> None:
    """Neither its program nor the lock."""
    held = hold(600)
    wait(lambda: held.there)
    held.process.send_signal(signal.SIGTERM)
    assert held.process.wait(10) == 143
    assert not Path(f"/proc/{held.there[0]}").exists()
    assert hold(0).process.wait(LEASE_S / 2) == 0


async def test_the_lock_service_moves_to_another_ledger_as_told(
    locking_daemon: DaemonProcess, jef_broker: PrivateBroker, tmp_path: Path
) -> None:
    """A second daemon is none until the exchange is deleted; then numbers begin again."""
    other = DaemonProcess(jef_broker.url, "jef", tmp_path / "other")
    other.start()
    try:
        other.wait_for("locks_kept_elsewhere")
        assert [await fence_of(jef_broker.url, name) for name in "ab"] == [1, 2]
        locking_daemon.stop()
        await delete(jef_broker.url, ["jef.lock-keeper"])
        other.stop()
        other.start()
        assert await fence_of(jef_broker.url, "c") == 1
    finally:
        other.kill()


async def fence_of(url: str, owner: str) -> int:
    """The fencing number of a lock that is acquired and released."""
    async with await aio_pika.connect(url) as connection:
        channel = await connection.channel()
        replies = await channel.declare_queue(exclusive=True)

        async def ask(operation: str, **more: object) -> dict[str, Any]:
            body = json.dumps({"operation": operation, "owner": owner, **more}).encode()
            message = aio_pika.Message(body, reply_to=replies.name, correlation_id=operation)
            await channel.default_exchange.publish(message, "jef.locks")
            async with asyncio.timeout(20), replies.iterator(no_ack=True) as answers:
                answer: dict[str, Any] = json.loads((await anext(answers)).body)
                return answer

        granted = await ask("acquire", locks=[{"resource": "moved"}])
        assert (await ask("release"))["status"] == "RELEASED"
        return int(granted["grants"][0]["fencingToken"])


def test_the_broker_holds_what_the_page_says(
    locking_daemon: DaemonProcess, jef_broker: PrivateBroker
) -> None:
    """Every exchange and queue of the prefix, and nothing else."""
    with sqlite3.connect(locking_daemon.folder.parent / "data/ledger.db") as ledger:
        identity = ledger.execute("SELECT id FROM identity").fetchone()[0]
    declared = WIRE.partition("<!-- generated: topology -->")[2].partition("<!-- end of generated -->")[0]
    rows = re.findall(r"^\| `(jef\.[^`]+)` \| (?:\w+ )?(exchange|queue)", declared, re.MULTILINE)
    actions = ("checksum", "copy", "http", "retitle")
    for kind in ("exchange", "queue"):
        said = {
            name.replace("<ledger>", identity).replace("<action>", action)
            for name, found in rows
            for action in actions
            if found == kind
        }
        # The watcher's own queue comes and goes with its connection.
        found_there = [name for name in names(jef_broker, f"{kind}s") if not name.startswith("jef.watched.")]
        assert found_there == sorted(said)
