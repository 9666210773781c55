"""When a failure is followed by another attempt, and after how long: the pure policy."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jef_daemon.events import Failed
from jef_daemon.lifecycle import Execution
from jef_daemon.retry import NEVER_RETRIED, RetryPolicy

POLICIES = st.builds(
    RetryPolicy,
    attempts=st.integers(1, 50),
    first_s=st.floats(0, 1e4),
    factor=st.floats(1, 10),
    most_s=st.floats(0, 1e5),
    jitter=st.floats(0, 1),
)
ATTEMPTS = st.integers(1, 1_000_000)
CHANCES = st.floats(0, 1)


def failure(kind: str = "RuntimeError") -> Failed:
    return Failed(error_type=kind, error_message="")


@pytest.mark.parametrize(
    ("attempt", "delay"), [(1, 1.0), (2, 2.0), (3, 4.0), (4, 8.0), (9, 256.0), (10, 300.0), (1_000, 300.0)]
)
def test_the_delay_grows_by_its_factor_up_to_its_cap(attempt: int, delay: float) -> None:
    """By default from one second, doubled each time, up to five minutes."""
    assert RetryPolicy().delay_s(attempt, 0.0) == delay


@given(POLICIES, ATTEMPTS, CHANCES)
def test_the_delay_is_within_its_bounds(policy: RetryPolicy, attempt: int, chance: float) -> None:
    """Never longer than the cap, never shorter than the jitter allows, whatever the numbers."""
    full = policy.delay_s(attempt, 0.0)
    assert 0 <= full <= policy.most_s
    assert full * (1 - policy.jitter) <= policy.delay_s(attempt, chance) <= full


@given(POLICIES, st.integers(1, 1000), CHANCES)
def test_a_later_attempt_waits_no_shorter(policy: RetryPolicy, attempt: int, chance: float) -> None:
    """With the same luck."""
    assert policy.delay_s(attempt, chance) <= policy.delay_s(attempt + 1, chance)


def test_jobs_that_failed_together_come_back_apart() -> None:
    """The jitter is a lot of its own each time."""
    delays = {RetryPolicy().delay_s(3) for _ in range(50)}
    assert len(delays) > 10
    assert all(3.2 <= delay <= 4.0 for delay in delays)


@given(ATTEMPTS, ATTEMPTS, st.booleans())
def test_attempts_are_counted_with_the_first(attempt: int, most: int, cancelled: bool) -> None:
    """What the execution allows counts, the policy's own number was narrowed into it; a cancel request ends it."""
    execution = Execution("1", "a", attempt=attempt, max_attempts=most, cancel_requested=cancelled)
    wanted = attempt < most and not cancelled
    assert RetryPolicy(attempts=1).retries(execution, failure()) is wanted
    assert RetryPolicy(attempts=1).has_more(execution) is wanted


@pytest.mark.parametrize("kind", [*sorted(NEVER_RETRIED), "Interrupted", "mine.Hopeless"])
def test_some_errors_are_not_retried(kind: str) -> None:
    """Those that would come again, an interruption (`may_run_again` decides that), those that the operator names."""
    execution = Execution("1", "a", max_attempts=9)
    assert not RetryPolicy(not_on=frozenset({"mine.Hopeless"})).retries(execution, failure(kind))
    assert RetryPolicy(not_on=frozenset({"mine.Hopeless"})).retries(execution, failure("mine.Other"))
