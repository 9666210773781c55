"""When a failed attempt is followed by another, and after how long. Pure.

Part in the flow: the ledger asks here in the very transaction that records a failure, so that an execution is
never FAILED for good and about to be retried at the same time.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from jef_daemon.events import Failed
from jef_daemon.lifecycle import Execution

NEVER_RETRIED = frozenset(
    {"ConfigurationRefused", "ResponseRefused", "ExecutorNotLoaded", "LockRefused"}
    | {"QueueTimeout", "LockTimeout"}
)
"""Errors that another attempt would meet again, whatever the policy says; and waits: a longest one is not repeated."""
INTERRUPTED = "Interrupted"
"""Decided by `may_run_again`: half a job may have been done."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """What an action's operator and author allow."""

    attempts: int = 1
    """Of one execution, the first included. 1: no retry."""
    first_s: float = 1.0
    """Delay before the second attempt."""
    factor: float = 2.0
    """By which the delay grows from one attempt to the next."""
    most_s: float = 300.0
    """Longest delay."""
    jitter: float = 0.2
    """Share of the delay, 0 to 1, by which it is shortened at random: jobs that failed together come back apart."""
    not_on: frozenset[str] = frozenset()
    """Types of errors (`error.type`) that are not retried."""
    on_timeout: bool = False
    """Whether a TIMED_OUT attempt is retried once its time of grace is over."""

    def delay_s(self, attempt: int, chance: float | None = None) -> float:
        """Seconds between the end of an attempt and the next.

        Args:
            attempt: the one that ended, from 1.
            chance: 0 to 1; None: at random.
        """
        full = min(self.most_s, self.first_s * self.factor ** min(attempt - 1, 64))
        lot = random.random() if chance is None else chance  # noqa: S311  no secret hangs on it
        return full * (1 - self.jitter * lot)

    def retries(self, execution: Execution, failure: Failed) -> bool:
        """Whether a failure of the current attempt is followed by another one."""
        return (
            self.has_more(execution)
            and failure.error_type not in NEVER_RETRIED
            and failure.error_type not in self.not_on
            and failure.error_type != INTERRUPTED
        )

    def has_more(self, execution: Execution) -> bool:
        """Whether attempts are left; after a cancel request none is."""
        return execution.attempt < execution.max_attempts and not execution.cancel_requested
