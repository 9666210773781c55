"""The daemon as a whole, in this process: what becomes of it when a part of it fails."""

from __future__ import annotations

import asyncio
import gc
from pathlib import Path
from typing import Any

import pytest

from jef_daemon.daemon import Daemon
from jef_daemon.ledger import Reader
from jef_daemon.notify import Notifier
from jef_daemon.settings import Settings
from tests.support.amqp import Client


async def test_a_role_that_fails_ends_the_daemon(
    amqp_url: str, prefix: str, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, with its own error, what ran recorded as interrupted: never a daemon that is half alive."""
    fails = asyncio.Event()

    async def run(self: Notifier) -> None:
        await fails.wait()
        raise RuntimeError("on purpose")

    monkeypatch.setattr(Notifier, "run", run)
    actions: dict[str, Any] = {
        "slow": {"executor": "tests.support.executors:Slow"},
        "blocking": {"executor": "tests.support.executors:Blocking"},
    }
    settings = Settings.model_validate(
        {"amqp_url": amqp_url, "prefix": prefix, "data_dir": str(tmp_path), "actions": actions}
    )
    daemon = Daemon(settings)
    running = asyncio.create_task(daemon.run())
    await asyncio.wait({running, asyncio.create_task(daemon.ready.wait())}, return_when="FIRST_COMPLETED")
    for action in actions:
        await client.submit(action, action, {"seconds": 600})
    reader = Reader(settings.ledger)
    async with asyncio.timeout(30):
        while reader.count().get("RUNNING", 0) < len(actions):
            await asyncio.sleep(0.05)
    fails.set()
    async with asyncio.timeout(60):
        with pytest.raises(ExceptionGroup, match="unhandled") as raised:
            await running
    assert raised.group_contains(RuntimeError, match="on purpose")
    assert reader.count() == {"FAILED": len(actions)}
    reader.close()


async def test_what_a_daemon_is_made_of_is_not_looked_through_for_garbage(
    amqp_url: str, prefix: str, client: Client, tmp_path: Path
) -> None:
    """Once it is ready: each look would keep all that waits waiting, for nothing."""
    daemon = Daemon(
        Settings.model_validate({"amqp_url": amqp_url, "prefix": prefix, "data_dir": str(tmp_path)})
    )
    gc.unfreeze()
    running = asyncio.create_task(daemon.run())
    try:
        await asyncio.wait_for(daemon.ready.wait(), 30)
        async with asyncio.timeout(10):
            while not gc.get_freeze_count():
                await asyncio.sleep(0)
        assert len(gc.get_objects()) < gc.get_freeze_count() / 10
    finally:
        daemon.stop()
        await running
        gc.unfreeze()
