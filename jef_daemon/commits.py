"""What a ledger tells of each of its commits: to those who count, measure and trace. Values only.

Part in the flow: a transaction counts into its `Tally` what is no transition; once it is on disk, the ledger hands the
`Commit` to `metrics` and `tracing`. What was rolled back is never told.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from jef_daemon.lifecycle import Execution, Transition
from jef_daemon.ports import Accepted, Arrival, Refusal


class Counted(StrEnum):
    """What happens in a transaction beside transitions, for those who count."""

    NOTIFIED = "notified"
    """A status notification; with the status."""
    UPDATE_REFUSED = "update-refused"
    """With the reason, one of few words."""
    FENCED = "fenced"
    """Something was kept out; with what it was."""
    LOCK_REQUEST = "lock-request"
    """The lock service decided one; with its answer."""
    LEASE_EXPIRED = "lease-expired"
    """The lock service ended a grant that was not renewed."""
    MESSAGE_REFUSED = "message-refused"
    """A dead letter; with the reason, one of few words."""
    LOCKS_LOST = "locks-lost"
    """Work outside lost its locks; what runs here, its worker knows of."""


@dataclass(slots=True)
class Tally:
    """What a transaction counts and measures beside its transitions."""

    counts: Counter[tuple[Counted, str]] = field(default_factory=Counter)
    """With a word of a bounded set; empty where there is none."""
    lock_waits: list[tuple[Execution, float]] = field(default_factory=list)
    """Jobs whose wait for locks ended with the grant, and how long it was, in seconds."""
    grants: list[tuple[Execution, float]] = field(default_factory=list)
    """Jobs that were granted their locks, whether or not they waited, and when."""
    workflows: list[tuple[str, str, float]] = field(default_factory=list)
    """Workflows that ended: the name of the definition, the status, and seconds since it was asked for."""


@dataclass(frozen=True, slots=True)
class Commit:
    """One transaction of a ledger, for those who count and measure."""

    seconds: float
    """From its begin until it was on disk."""
    operations: int
    """Callers' wishes in it."""
    door: Sequence[tuple[Arrival | Refusal, Accepted]]
    """Messages, and what became of each."""
    moves: Sequence[Transition]
    """What was applied, in order."""
    tally: Tally = field(default_factory=Tally)
    """What else happened."""


OnCommit = Callable[[Commit], None]
"""Called in the event loop after a commit."""
