"""The steady clock: even until it is looked at."""

from __future__ import annotations

import pytest

from jef_daemon.clock import SteadyClock
from tests.support.clock import ManualClock


class TwoClocks(ManualClock):
    """A wall clock that can be set."""

    set_by_s = 0.0

    def now(self) -> float:
        return self.time + self.set_by_s


def test_it_goes_on_evenly_until_it_is_looked_at() -> None:
    """A clock that was set counts from the look on, which says by how much."""
    clock = TwoClocks()
    steady = SteadyClock(clock)
    began = steady.now()
    clock.time += 10
    clock.set_by_s = 3600.0
    assert steady.now() == began + 10
    assert steady.until(began + 15) == clock.time + 5
    assert steady.look() == 3600.0
    assert steady.now() == began + 3610
    assert steady.until(began + 3615) == clock.time + 5
    assert steady.look() == 0.0


@pytest.mark.parametrize(("by_s", "told"), [(-3600.0, -3600.0), (5.5, 5.5), (4.5, 0.0), (-4.5, 0.0)])
def test_a_clock_that_is_adjusted_is_followed_without_a_word(by_s: float, told: float) -> None:
    """Days of small adjustments do not add up to a clock that was set."""
    clock = TwoClocks()
    steady = SteadyClock(clock)
    for _ in range(3):
        clock.set_by_s += by_s
        assert steady.look() == pytest.approx(told)
        assert steady.now() == clock.now()
