"""The watcher's timers, and when it asks the ledger: clocks moved by hand, no broker, no database."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jef_daemon.lifecycle import Execution
from jef_daemon.messages import timestamp
from jef_daemon.ports import Consequences, Delivery, Silence, Stop
from jef_daemon.watch import TICK_S, Deadlines, Watcher

# --- the timer structure ---------------------------------------------------------------------------------


def test_they_come_up_in_order_when_their_time_has_come() -> None:
    deadlines = Deadlines()
    for key, at in (("c", 3.0), ("a", 1.0), ("b", 2.0)):
        deadlines.put(key, at)
    assert deadlines.next() == 1.0
    assert deadlines.due(0.999, 10) == []
    assert deadlines.due(2.0, 10) == ["a", "b"]
    assert (deadlines.due(2.0, 10), len(deadlines)) == ([], 1)


def test_an_update_moves_a_deadline_and_costs_no_entry() -> None:
    """A hundred thousand updates leave one entry in the heap."""
    deadlines = Deadlines()
    for number in range(100_000):
        deadlines.put("a", 1.0 + number)
    assert len(deadlines._heap) == 1
    assert deadlines.due(99_999.0, 10) == []
    assert deadlines.due(100_000.0, 10) == ["a"]


def test_a_deadline_may_come_earlier() -> None:
    """The wall clock was set back: the later entry is left over, and means nothing."""
    deadlines = Deadlines()
    assert deadlines.put("a", 10.0)
    assert not deadlines.put("b", 20.0)
    assert deadlines.put("b", 5.0)
    assert deadlines.due(5.0, 10) == ["b"]
    assert deadlines.due(30.0, 10) == ["a"]


def test_what_is_dropped_does_not_come_up_nor_stay() -> None:
    """Jobs that end long before their deadlines do not fill the memory."""
    deadlines = Deadlines()
    for number in range(10_000):
        deadlines.put(str(number), 1e9)
        deadlines.drop(str(number))
        deadlines.drop("unknown")
    assert len(deadlines) == 0
    assert len(deadlines._heap) < 100
    assert len(deadlines._heaped) < 100
    assert deadlines.due(1e10, 10) == []


def test_no_more_than_wanted_come_up_at_once() -> None:
    deadlines = Deadlines()
    for number in range(5):
        deadlines.put(str(number), float(number))
    assert deadlines.due(9, 2) == ["0", "1"]
    assert deadlines.due(9, 9) == ["2", "3", "4"]


@given(
    st.lists(
        st.tuples(st.sampled_from("abcd"), st.sampled_from(["put", "drop", "due"]), st.integers(0, 50)),
        max_size=200,
    )
)
def test_they_are_a_dictionary_that_knows_its_least(steps: list[tuple[str, str, int]]) -> None:
    """Whatever is done in whatever order; time only rises."""
    deadlines, model, now = Deadlines(), dict[str, int](), 0
    for key, what, number in steps:
        if what == "put":
            model[key] = number
            assert deadlines.put(key, number) == (number <= (deadlines.next() or 0))
        elif what == "drop":
            model.pop(key, None)
            deadlines.drop(key)
        else:
            now = max(now, number)
            expected = {each for each, at in model.items() if at <= now}
            assert set(deadlines.due(now, 100)) == expected
            model = {each: at for each, at in model.items() if each not in expected}
        assert len(deadlines) == len(model)
        first = deadlines.next()
        assert not model or (first is not None and first <= min(model.values()))


# --- the watcher -----------------------------------------------------------------------------------------


class ManualClock:
    """Two clocks that are moved by hand."""

    def __init__(self) -> None:
        self.wall = 1_000_000.0
        self.mono = 50.0

    def now(self) -> float:
        return self.wall

    def monotonic(self) -> float:
        return self.mono

    def sleep(self, seconds: float) -> None:
        self.wall += seconds
        self.mono += seconds


class Ledger:
    """Deadlines, and what the watcher asked."""

    def __init__(self) -> None:
        self.deadlines: dict[str, float] = {}
        self.silent: list[str] = []
        self.asked: list[list[str]] = []
        self.reads = 0
        self.shifts: list[float] = []
        self.consequences = [Consequences()]

    async def watched(self, after: tuple[float, str], most: int) -> list[tuple[str, float]]:
        self.reads += after == (0.0, "")
        found = sorted((at, name) for name, at in self.deadlines.items() if (at, name) > after)
        return [(name, at) for at, name in found[:most]]

    async def overdue(self, until: float, most: int) -> list[str]:
        return [name for name, at in self.deadlines.items() if at <= until][:most]

    async def fall_silent(self, ids: Sequence[str], now: float) -> Silence:
        self.asked.append(list(ids))
        silence = Silence()
        for name in ids:
            at = self.deadlines.get(name)
            if at is not None and at > now:
                silence.later[name] = at
            elif at is not None:
                del self.deadlines[name]
                self.silent.append(name)
                silence.lateness_s.append(now - at)
        return silence

    async def run_out(self, now: float, most: int) -> Consequences:
        return self.consequences.pop(0) if len(self.consequences) > 1 else self.consequences[0]

    async def shift_clocks(self, by_s: float) -> int:
        self.shifts.append(by_s)
        self.deadlines = {name: at + by_s for name, at in self.deadlines.items()}
        return len(self.deadlines)


class Bus:
    session = 1


class Bench:
    """A watcher with everything by hand."""

    def __init__(self) -> None:
        self.clock, self.ledger, self.bus = ManualClock(), Ledger(), Bus()
        self.followed: list[Consequences] = []
        self.watcher = Watcher(self.ledger, self.bus, self.followed.append, self.clock)

    def tell(self, name: str, status: str = "RUNNING", deadline: float | None = None) -> None:
        told = {"executionId": name, "status": status}
        if deadline is not None:
            told["updateDeadline"] = timestamp(deadline)
        self.watcher.deliver(Delivery(":watched", json.dumps(told).encode(), 1, 1))

    async def after(self, seconds: float) -> list[str]:
        """Let time pass, and the watcher do what is due; returns who was flagged."""
        self.clock.sleep(seconds)
        flagged = len(self.ledger.silent)
        await self.watcher.turn()
        return self.ledger.silent[flagged:]


@pytest.fixture
async def bench() -> Bench:
    made = Bench()
    await made.watcher.turn()
    return made


async def test_one_that_was_told_is_flagged_at_its_deadline(bench: Bench) -> None:
    """Neither before, nor twice."""
    bench.ledger.deadlines["1"] = bench.clock.wall + 10
    bench.tell("1", deadline=bench.clock.wall + 10)
    assert await bench.after(9.9) == []
    assert bench.ledger.asked == []
    assert await bench.after(0.102) == ["1"]
    assert await bench.after(10) == []
    assert (bench.watcher.watched, bench.watcher.flagged) == (0, 1)


async def test_how_late_a_flag_was_on_disk_is_told(bench: Bench) -> None:
    """From the deadline on, the time included that the ledger took; found by a timer or by a look at the ledger."""
    told: list[float] = []
    bench.watcher.on_flagged = told.extend
    take = bench.ledger.fall_silent

    async def slowly(ids: Sequence[str], now: float) -> Silence:
        bench.clock.sleep(2)
        return await take(ids, now)

    bench.ledger.fall_silent = slowly  # type: ignore[method-assign]
    bench.ledger.deadlines = {"1": bench.clock.wall + 10, "missed": bench.clock.wall + 10}
    bench.tell("1", deadline=bench.clock.wall + 10)
    assert sorted(await bench.after(10.5)) == ["1", "missed"]
    assert sorted(told) == [pytest.approx(2.5), pytest.approx(4.5)]


async def test_a_watcher_that_stands_still_is_behind(bench: Bench) -> None:
    """As long as it does not look; 0 when nothing is overdue."""
    assert bench.watcher.lag_s == 0
    bench.clock.sleep(TICK_S)
    assert bench.watcher.lag_s == 0
    bench.clock.sleep(7)
    assert bench.watcher.lag_s == pytest.approx(7)
    bench.ledger.deadlines["1"] = bench.clock.wall - 20
    bench.tell("1", deadline=bench.clock.wall - 20)
    assert bench.watcher.lag_s == pytest.approx(20, abs=0.1)
    await bench.watcher.turn()
    assert bench.watcher.lag_s == 0


async def test_the_ledger_has_the_last_word(bench: Bench) -> None:
    """An update that it knows of and we do not yet: nobody is flagged, and the true deadline is waited for."""
    bench.ledger.deadlines["1"] = bench.clock.wall + 30
    bench.tell("1", deadline=bench.clock.wall + 10)
    assert await bench.after(11) == []
    assert bench.ledger.asked == [["1"]]
    assert await bench.after(18.9) == []
    assert await bench.after(0.2) == ["1"]


async def test_what_is_over_is_not_asked_for(bench: Bench) -> None:
    """COMPLETED, TIMED_OUT: a notification without a deadline."""
    bench.tell("1", deadline=bench.clock.wall + 10)
    bench.tell("1", "COMPLETED")
    assert await bench.after(11) == []
    assert bench.ledger.asked == []


async def test_what_no_notification_told_is_found(bench: Bench) -> None:
    """A broker that lags or is away keeps nobody from being flagged."""
    bench.bus.session = 0
    bench.ledger.deadlines["1"] = bench.clock.wall + 10
    await bench.after(9)
    bench.watcher._deadlines.drop("1")
    assert await bench.after(1 + TICK_S) == ["1"]


async def test_a_new_connection_reads_all_again(bench: Bench) -> None:
    """Notifications may have been missed; otherwise nothing is read twice."""
    assert bench.ledger.reads == 1
    await bench.after(1)
    assert bench.ledger.reads == 1
    bench.ledger.deadlines["1"] = bench.clock.wall + 10
    bench.bus.session = 2
    await bench.after(1)
    assert (bench.ledger.reads, bench.watcher.watched) == (2, 1)


async def test_a_restart_flags_the_overdue_and_watches_the_others() -> None:
    """Pages and all."""
    bench = Bench()
    bench.ledger.deadlines = {
        f"{number:05}": bench.clock.wall + (number - 2500) / 4 for number in range(5000)
    }
    await bench.watcher.turn()
    assert len(bench.ledger.silent) == 2501
    assert bench.watcher.watched == 2499
    assert await bench.after(0.25) == ["02501"]


@pytest.mark.parametrize("step", [3600.0, -3600.0])
async def test_a_clock_that_is_set_flags_nobody(bench: Bench, step: float) -> None:
    """What is to come is put off by as much, in the ledger too: the silence that is allowed is not changed by it."""
    bench.ledger.deadlines["1"] = bench.clock.wall + 10
    bench.tell("1", deadline=bench.clock.wall + 10)
    await bench.after(4)
    bench.clock.wall += step
    assert await bench.after(1) == []
    assert bench.ledger.shifts == [pytest.approx(step)]
    assert bench.ledger.reads == 2  # what was told since then was taken by the old time
    assert await bench.after(4.9) == []
    assert await bench.after(0.2) == ["1"]
    assert len(bench.ledger.shifts) == 1


async def test_small_corrections_of_the_clock_are_no_step(bench: Bench) -> None:
    for _ in range(10):
        bench.clock.wall += 4
        await bench.after(1)
    assert bench.ledger.shifts == []


async def test_what_follows_is_done_until_nothing_is_left(bench: Bench) -> None:
    """Page after page of the clocks that ran out."""
    stop = Stop(Execution("1", "a"), "watcher", "")
    bench.ledger.consequences = [Consequences(again=True), Consequences(stops=[stop]), Consequences()]
    await bench.after(TICK_S)
    assert [found.stops for found in bench.followed[-2:]] == [[], [stop]]


async def test_a_watcher_that_stands_or_lags_is_seen(bench: Bench) -> None:
    """By its deadlines, and by not looking."""
    assert bench.watcher.lag_s == 0
    bench.clock.sleep(TICK_S + 2)
    assert bench.watcher.lag_s == pytest.approx(2)
    await bench.watcher.turn()
    assert bench.watcher.lag_s == 0
    bench.tell("1", deadline=bench.clock.wall + 0.1)
    bench.clock.sleep(3)
    assert bench.watcher.lag_s == pytest.approx(2.9, abs=0.01)


@pytest.mark.parametrize("body", [b"", b"[]", b"3", b"{}", b'{"executionId": "1", "updateDeadline": "soon"}'])
async def test_a_notification_that_is_none_is_passed_over(bench: Bench, body: bytes) -> None:
    """Anybody may publish there."""
    bench.watcher.deliver(Delivery(":watched", body, 1, 1))
    assert bench.watcher.watched == 0


async def test_it_wakes_for_an_earlier_deadline(bench: Bench) -> None:
    """It does not sleep through one that came to be known while it rested."""
    running = asyncio.create_task(bench.watcher.run())
    await asyncio.sleep(0)
    bench.clock.sleep(0.3)
    bench.ledger.deadlines["1"] = bench.clock.wall - 0.1
    bench.tell("1", deadline=bench.clock.wall - 0.1)
    for _ in range(20):
        await asyncio.sleep(0)
    assert bench.ledger.silent == ["1"]
    running.cancel()
