"""Supervision: what systemd is told, and when the watchdog is fed. Clocks are moved by hand."""

from __future__ import annotations

import asyncio
import functools
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from jef_daemon.ledger import SqlLedger
from jef_daemon.ledger.writer import Writer
from jef_daemon.names import Names
from jef_daemon.rabbitmq import RabbitBus, bus
from jef_daemon.sections import Bus as BusSettings
from jef_daemon.supervision import Supervision
from tests.support.clock import ManualClock

HOUR_S = 3600.0


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[socket.socket]:
    """The socket that systemd would listen on."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard:
        heard.bind(str(tmp_path / "notify"))
        heard.setblocking(False)
        yield heard


def supervision(systemd: socket.socket, watchdog_s: float = 60.0) -> Supervision:
    return Supervision({"NOTIFY_SOCKET": systemd.getsockname(), "WATCHDOG_USEC": str(int(watchdog_s * 1e6))})


def heard(systemd: socket.socket) -> list[str]:
    """What was told since the last look."""
    found = []
    while True:
        try:
            found.append(systemd.recv(4096).decode())
        except BlockingIOError:
            return found


async def works(patience_s: float) -> bool:
    return True


async def hangs(patience_s: float) -> bool:
    await asyncio.Event().wait()
    return True


async def says_that_it_hangs(patience_s: float) -> bool:
    return False


# --- what is told ----------------------------------------------------------------------------------------


async def test_the_watchdog_is_fed_when_all_answer(systemd: socket.socket) -> None:
    assert await supervision(systemd).feed({"ledger": works, "bus": works})
    assert heard(systemd) == ["WATCHDOG=1"]


@pytest.mark.parametrize("broken", [hangs, says_that_it_hangs])
async def test_it_is_not_fed_while_one_does_not_answer(systemd: socket.socket, broken: Any) -> None:
    """Whichever it is; and is again when it does."""
    line = supervision(systemd, 0.1)
    assert not await line.feed({"ledger": works, "bus": broken})
    assert not await line.feed({"ledger": broken, "bus": works})
    assert heard(systemd) == []
    assert await line.feed({"ledger": works, "bus": works})
    assert heard(systemd) == ["WATCHDOG=1"]


async def test_parts_are_given_a_share_of_the_time(systemd: socket.socket) -> None:
    """One that is waited for until its patience is over leaves time to feed before systemd's is."""
    given: list[float] = []

    async def part(patience_s: float) -> bool:
        given.append(patience_s)
        return True

    for watchdog_s in (8.0, 600.0):
        await supervision(systemd, watchdog_s).feed({"part": part})
    assert given == [2.0, 15.0]


async def test_a_status_is_told_once_and_in_one_line(systemd: socket.socket) -> None:
    line = supervision(systemd)
    for text in ("1 running", "1 running", "2 running, disk\nfull"):
        line.status(text)
    assert heard(systemd) == ["STATUS=1 running", "STATUS=2 running, disk; full"]


async def test_time_is_asked_for_while_it_is_not_steady(systemd: socket.socket) -> None:
    """At its start, and while it reloads."""
    line = supervision(systemd)
    for steady in (True, False):
        is_steady: Callable[[], bool] = functools.partial(bool, steady)
        task = asyncio.create_task(line.run(lambda: "x", {"part": works}, is_steady))
        told: list[str] = []
        async with asyncio.timeout(10):
            while "WATCHDOG=1" not in told:
                told.append((await asyncio.get_running_loop().sock_recv(systemd, 4096)).decode())
        task.cancel()
        assert ("EXTEND_TIMEOUT_USEC=60000000" in told) is not steady


# --- the bus ---------------------------------------------------------------------------------------------


class StubSession:
    """A connection that answers, is silent, or is blocked by the broker."""

    def __init__(self) -> None:
        self.number = 1
        self.is_silent = False
        self.blocked = False
        self.unconfirmed = 0
        self._end: asyncio.Future[BaseException | None] = asyncio.get_running_loop().create_future()

    async def answers(self) -> None:
        if self.is_silent:
            await asyncio.Event().wait()

    async def is_blocked(self) -> bool:
        return self.blocked

    @property
    def is_broken(self) -> bool:
        return self._end.done()

    async def wait_broken(self) -> BaseException | None:
        return await asyncio.shield(self._end)

    def give_up(self, why: str) -> None:
        self._end.set_result(ConnectionError(why))

    async def discard(self) -> None:
        return

    async def set_up(self, topology: object) -> None:
        return

    async def cancel(self, source: str) -> None:
        return


class Bench:
    """A real bus on stub connections."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock = ManualClock()
        self.sessions: list[StubSession] = []
        self.tries = 0
        self.hangs = False
        """Whether trying to connect never ends: our own fault, as it has its limits."""
        self.is_there = True
        self.step_s = 0.0
        """What a try takes."""
        monkeypatch.setattr(bus, "connect", self._connect)
        monkeypatch.setattr(bus, "Session", self._session)
        settings = BusSettings(reconnect_max_s=0.001)
        self.bus = RabbitBus("amqp://h/", Names("t"), [], settings, lambda _: None, clock=self.clock)

    async def _connect(self, *_: object) -> None:
        self.tries += 1
        self.clock.time += self.step_s
        if self.hangs:
            await asyncio.Event().wait()
        if not self.is_there:
            raise ConnectionError("refused")

    def _session(self, *_: object) -> StubSession:
        self.sessions.append(StubSession())
        return self.sessions[-1]

    async def until_tried(self, more: int) -> None:
        goal = self.tries + more
        async with asyncio.timeout(10):
            while self.tries < goal:
                await asyncio.sleep(0)


@pytest.fixture
async def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(monkeypatch)


async def running(bench: Bench) -> asyncio.Task[None]:
    task = asyncio.create_task(bench.bus.run())
    async with asyncio.timeout(10):
        await bench.bus.connected.wait()
    return task


async def test_a_broker_that_is_away_for_an_hour_is_waited_for(bench: Bench) -> None:
    """Try after try, each of which may take its time: that is no hang, at the start and later."""
    bench.is_there, bench.step_s = False, 30.0
    task = asyncio.create_task(bench.bus.run())
    for _ in range(int(HOUR_S / bench.step_s)):
        await bench.until_tried(1)
        assert await bench.bus.answers(0.01)
    task.cancel()


async def test_a_bus_that_does_not_try_any_more_hangs(bench: Bench) -> None:
    """The broker is away, and nothing is tried: a restart mends that."""
    bench.is_there, bench.hangs = False, True
    task = asyncio.create_task(bench.bus.run())
    await bench.until_tried(1)
    bench.clock.time += 30
    assert await bench.bus.answers(0.01)
    bench.clock.time += 60
    assert not await bench.bus.answers(0.01)
    task.cancel()


async def test_a_quiet_connection_works_as_long_as_the_broker_answers(bench: Bench) -> None:
    """Nothing is sent for hours."""
    task = await running(bench)
    for _ in range(3):
        bench.clock.time += HOUR_S
        assert await bench.bus.answers(0.01)
    assert bench.tries == 1
    task.cancel()


async def test_a_broker_that_is_silent_is_left_and_tried_again(bench: Bench) -> None:
    """The connection is open and nothing comes: the next one is tried, and that is no hang however long it takes."""
    task = await running(bench)
    bench.sessions[0].is_silent = True
    bench.is_there, bench.step_s = False, 30.0
    assert await bench.bus.answers(0.01)
    assert bench.sessions[0].is_broken
    for _ in range(int(HOUR_S / bench.step_s)):
        await bench.until_tried(1)
        assert await bench.bus.answers(0.01)
    bench.is_there = True
    async with asyncio.timeout(10):
        await bench.bus.connected.wait()
    assert len(bench.sessions) == 2
    assert await bench.bus.answers(0.01)
    task.cancel()


async def test_a_bus_whose_task_is_dead_hangs_though_the_socket_is_open(bench: Bench) -> None:
    """No answer comes, and nobody is there to try another connection."""
    task = await running(bench)
    session = bench.sessions[0]
    bench.bus._connected = asyncio.Event()  # as a task leaves it that stands still: connected, for ever
    bench.bus._connected.set()
    task.cancel()
    await asyncio.wait({task})
    session.is_silent = True
    assert await bench.bus.answers(0.01)
    bench.clock.time += 90
    assert not await bench.bus.answers(0.01)


async def test_a_broker_that_takes_no_messages_is_waited_for(bench: Bench) -> None:
    """It is short of memory or disk, has said so, and answers nothing until it is not: its connection is kept."""
    task = await running(bench)
    session = bench.sessions[0]
    session.is_silent = session.blocked = True
    for _ in range(3):
        bench.clock.time += HOUR_S
        assert await bench.bus.answers(0.01)
    assert bench.bus.is_blocked
    assert not session.is_broken
    session.is_silent = session.blocked = False
    assert await bench.bus.answers(0.01)
    assert not bench.bus.is_blocked
    task.cancel()


# --- the ledger ------------------------------------------------------------------------------------------


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
async def ledger(tmp_path: Path, clock: ManualClock) -> AsyncIterator[SqlLedger]:
    async with SqlLedger(f"sqlite:///{tmp_path / 'ledger.db'}", clock=clock) as opened:
        yield opened


async def test_a_ledger_whose_writer_hangs(ledger: SqlLedger) -> None:
    """Its thread stands in the middle of a transaction; and goes on."""
    assert await ledger.is_alive(5)
    goes_on = threading.Event()
    stands = ledger._other(lambda _: goes_on.wait(60))
    try:
        assert not await ledger.is_alive(0.05)
    finally:
        goes_on.set()
    await stands
    assert await ledger.is_alive(5)


async def test_a_ledger_that_takes_no_writes_is_waited_for_while_it_is_tried(
    ledger: SqlLedger, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk: each try fails, which is no hang; a try that never ends is one."""
    is_full, stands, goes_on = True, threading.Event(), threading.Event()
    attempt = Writer._attempt

    def try_to(self: Writer, batch: Any) -> Any:
        if is_full:
            raise OperationalError("INSERT", {}, Exception("database or disk is full"))
        stands.set()
        goes_on.wait(60)
        return attempt(self, batch)

    monkeypatch.setattr(Writer, "_attempt", try_to)
    monkeypatch.setattr("jef_daemon.ledger.writer._RETRY_FIRST_S", 0.001)
    monkeypatch.setattr("jef_daemon.ledger.writer._RETRY_MOST_S", 0.001)
    writing = asyncio.ensure_future(ledger.answers())
    tries = ledger._running
    async with asyncio.timeout(10):
        for _ in range(int(HOUR_S / 30)):
            clock.time += 30
            while tries.tried_at < clock.time:
                await asyncio.sleep(0)
            assert await ledger.is_alive(0.01)
    assert "full" in str(ledger.stalled)
    is_full = False
    await asyncio.to_thread(stands.wait)
    try:
        clock.time += 30
        assert await ledger.is_alive(0.01)
        clock.time += 60
        assert not await ledger.is_alive(0.01)
    finally:
        goes_on.set()
    await writing
    assert await ledger.is_alive(5)
