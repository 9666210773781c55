"""What a ledger is told by its daemon, the same for all transactions until a reload changes it. Pure values.

`assembly` and `daemon` make them of settings and catalogue, `SqlLedger` keeps them; transactions decide by them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from jef_daemon.lock.requests import Limits
from jef_daemon.names import Names
from jef_daemon.ports import LockTimes
from jef_daemon.retry import RetryPolicy
from jef_daemon.workflow.state import Bounds


@dataclass(frozen=True, slots=True)
class Policy:
    """What the ledger knows of an action."""

    retry: RetryPolicy = field(default_factory=RetryPolicy)
    cancellable: bool = True
    """False: a running attempt goes on to its end unless it is forced."""
    hooks: frozenset[str] = frozenset()
    """Of an async executor: which of `poll`, `cancel`, `resume`, `retry` it has."""


NO_POLICY = Policy()
"""Of an action that is not served: no retry, no hooks."""


@dataclass(frozen=True, slots=True)
class Terms:
    """What is the same for all transactions of a ledger. Replaced as a whole: one is never seen half changed."""

    names: Names = field(default_factory=Names)
    """Exchanges and queues to tell things to."""
    tracebacks: bool = True
    """Whether FAILED notifications carry the stack trace."""
    identity: str = ""
    """The ledger's own name."""
    policies: Mapping[str, Policy] = field(default_factory=dict)
    """Of each action that is served."""
    lost_locks_fail: bool = True
    """Whether work outside that lost its locks is FAILED for it."""
    lock_times: LockTimes = field(default_factory=LockTimes)
    """Leases of this daemon's own jobs."""
    lock_limits: Limits = field(default_factory=Limits)
    """Of the lock service, where it is served from this ledger."""
    workflow_bounds: Bounds = field(default_factory=Bounds)
    """How much a workflow may carry."""
    is_traced: bool = False
    """Whether what is told of an execution names our span of it, not its producer's."""
