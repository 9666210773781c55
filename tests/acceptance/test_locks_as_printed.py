"""The documentation's examples of locks, as printed: an executor with its store, a client that holds a lock."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import aio_pika
import pytest
from broker import PrivateBroker

from tests.acceptance.test_readme import README, ROOT, block
from tests.support.amqp import Client
from tests.support.process import DaemonProcess

WIRE = (ROOT / "docs/wire-protocol.md").read_text()
LEASE_S = 6
"""Instead of the page's 60."""
HOLD = block("python", "import pika", WIRE)
REQUEST = block("json", "retitle-42-1")


@pytest.fixture
def locking_daemon(own_broker: PrivateBroker, tmp_path: Path) -> Iterator[DaemonProcess]:
    """A daemon with the README's executor, in the folder of its store."""
    daemon = DaemonProcess(own_broker.url, "jef", tmp_path / "daemon")
    (daemon.folder / "retitle.py").write_text(block("python", "class Retitle"))
    assert '[actions.retitle] executor = "retitle:Retitle"' in README
    daemon.configure(f'python_path = ["{ROOT}", "{daemon.folder}"]', where="top")
    daemon.cwd = daemon.folder
    with sqlite3.connect(daemon.folder / "assets.db") as store:
        store.execute("CREATE TABLE assets (id INTEGER PRIMARY KEY, title TEXT, fence INTEGER)")
        store.execute("INSERT INTO assets VALUES (42, '', 0)")
    daemon.start()
    yield daemon
    daemon.kill()


def asset(daemon: DaemonProcess) -> tuple[str, int]:
    with sqlite3.connect(daemon.folder / "assets.db") as store:
        found: tuple[str, int] = store.execute("SELECT title, fence FROM assets WHERE id = 42").fetchone()
        return found


async def test_the_store_refuses_an_older_number(locking_daemon: DaemonProcess, own_broker: PrivateBroker) -> None:
    """The README's two requests, then one after a write that knows of a later lock."""
    async with Client(own_broker.url, "jef") as client:
        await client.publish("retitle", REQUEST.encode())
        assert (await client.end_of("retitle-42-1"))["status"] == "COMPLETED"
        assert asset(locking_daemon) == ("Take one", 1)
        done = locking_daemon.jef(*words(block("sh", "jef submit retitle")))
        assert done.returncode == 0, done.stdout + done.stderr
        assert asset(locking_daemon) == ("Take two", 2)
        with sqlite3.connect(locking_daemon.folder / "assets.db") as store:
            store.execute("UPDATE assets SET fence = 34")
        await client.publish("retitle", REQUEST.replace("42-1", "42-3").encode())
        end = await client.end_of("retitle-42-3")
        assert (end["status"], end["error"]["type"]) == ("FAILED", "PermissionError")
        assert asset(locking_daemon) == ("Take two", 34)
