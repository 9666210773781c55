"""A wall clock that is set while a daemon works. To a process, a machine that was suspended looks the same.

libfaketime moves the daemon's wall clock and leaves the monotonic one, by a file that is read at each look.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from tests.integration.test_control import ask
from tests.integration.test_locks import lock
from tests.integration.test_watch import at, configure, launch, silent, update
from tests.support.amqp import Client
from tests.support.process import DaemonProcess

LIBRARIES = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
HOUR_S = 3600


class Clock:
    """The wall clock of a daemon.

    Args:
        folder: where the file is kept that says how far it is off.
    """

    def __init__(self, folder: Path) -> None:
        assert LIBRARIES, "libfaketime is needed: apt-get install faketime"
        self._file = folder / "clock"
        self.set(0)

    def start(self, daemon: DaemonProcess) -> None:
        """Start a daemon that goes by it."""
        daemon.start(
            LD_PRELOAD=str(LIBRARIES[0]),
            FAKETIME_TIMESTAMP_FILE=str(self._file),
            FAKETIME_NO_CACHE="1",
            # Both names: the variable was renamed.
            FAKETIME_DONT_FAKE_MONOTONIC="1",
            DONT_FAKE_MONOTONIC="1",
        )

    def set(self, by_s: int) -> None:
        """Set it: so far from the true time."""
        new = self._file.with_suffix(".new")
        new.write_text(f"{by_s:+d}\n")
        new.rename(self._file)  # never seen half written


@pytest.fixture
def clock(tmp_path: Path) -> Clock:
    return Clock(tmp_path)


@pytest.mark.parametrize("by_s", [HOUR_S, -HOUR_S], ids=["ahead", "back"])
async def test_silence_is_measured_by_a_clock_that_nobody_sets(
    daemon: DaemonProcess, client: Client, clock: Clock, by_s: int
) -> None:
    """Neither flagged an hour early nor an hour late: the deadline moves with the clock, and updates go on counting."""
    configure(daemon)
    clock.start(daemon)
    began = time.monotonic()
    await launch(client, "quiet", 4.0)
    token = await launch(client, "1", 4.0)
    clock.set(by_s)
    daemon_said = await asyncio.to_thread(daemon.wait_for, "clock_set")
    assert daemon_said["by_s"] == pytest.approx(by_s, abs=2)
    assert (await ask(client, "updates", update("1", token, progress=40)))["accepted"]
    for name in ("quiet", "1"):
        assert "4 s are allowed" in (await silent(client, name))["message"]
        assert 3.5 < time.monotonic() - began < 60


async def test_a_lock_is_kept_when_the_clock_is_set_ahead(
    daemon: DaemonProcess, client: Client, clock: Clock
) -> None:
    """The lease of a running job is renewed on; the one who waits gets the lock when the job ends, not before."""
    daemon.configure(locks={"lease_s": 30.0})
    clock.start(daemon)
    await client.submit("slow", "holder", {"seconds": 5}, locks=[lock("asset/1")])
    await client.until(lambda: "RUNNING" in client.statuses("holder"))
    await client.submit("quick", "next", locks=[lock("asset/1")])
    await client.until(lambda: "WAITING_FOR_LOCK" in client.statuses("next"))
    clock.set(HOUR_S)
    await asyncio.to_thread(daemon.wait_for, "clock_set")
    assert (await client.end_of("next"))["status"] == "COMPLETED"
    assert (await client.end_of("holder"))["status"] == "COMPLETED"
    seen = [(each["executionId"], each["status"]) for each in client.told]
    assert seen.index(("holder", "COMPLETED")) < seen.index(("next", "RUNNING"))


async def test_a_lock_without_a_holder_ends_in_time_when_the_clock_is_set_back(
    daemon: DaemonProcess, client: Client, clock: Clock
) -> None:
    """Its lease has no hour more."""
    clock.start(daemon)
    asked = {"operation": "acquire", "owner": "gone", "locks": [lock("asset/1")], "leaseSeconds": 60}
    assert (await ask(client, "locks", asked))["status"] == "GRANTED"
    await client.submit("quick", "next", locks=[lock("asset/1")])
    await client.until(lambda: "WAITING_FOR_LOCK" in client.statuses("next"))
    clock.set(-HOUR_S)
    async with asyncio.timeout(60):
        while True:
            state = await ask(client, "locks", {"operation": "inspect", "locks": [lock("asset/1")]})
            [held] = state["resources"][0]["holders"]
            if at(held, "leaseUntil") <= time.time() - HOUR_S + 60:
                break
            await asyncio.sleep(0.1)
    assert held["owner"] == "gone"
