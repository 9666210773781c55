"""What can happen to an execution: the events of its life cycle, with what each brings. Pure.

Part in the flow: intake, worker, updates, commands and clocks say here what happened; what it means, and whether it may
happen where the execution stands, says the table of `lifecycle`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happens to an execution. `actor` and `reason` go into its history."""

    actor: str = "daemon"
    """Who: `daemon`, `executor`, `watcher`, `operator:NAME`, `producer`."""
    reason: str = ""
    """Why, in a sentence; empty where the event's name says it all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted(Event):
    """The request was valid and is recorded."""

    actor: str = "producer"


@dataclass(frozen=True, slots=True, kw_only=True)
class LockAwaited(Event):
    """A lock it needs is taken, or its place in the queue changed."""

    actor: str = "locks"
    waiting_for: Mapping[str, Any]
    """`resource`, `mode`, `position`, `holders`: as told on the wire."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Started(Event):
    """A slot is free and every lock granted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progressed(Event):
    """Progress or a sign of life. None keeps what was told before."""

    actor: str = "executor"
    progress: int | None = None
    message: str | None = None
    external_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Launched(Event):
    """An async executor has started the work outside: from now on only updates move it."""

    actor: str = "executor"
    message: str | None = None
    external_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Completed(Event):
    """The executor's response (the seed's four fields), or a COMPLETED update."""

    actor: str = "executor"
    result: str = ""
    external_id: str | None = None
    job_context_variables: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    workflow_context_variables: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed(Event):
    """An unhandled exception, a FAILED update, an interruption that may not be repeated."""

    actor: str = "executor"
    error_type: str
    error_message: str
    traceback: str | None = None
    external_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CancelRequested(Event):
    """Somebody wants it stopped."""

    actor: str = "operator"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopped(Event):
    """The executor stopped for a cancellation, or the external side acknowledged it."""

    actor: str = "executor"
    forced: bool = False
    """True when nobody acknowledged: the attempt is fenced."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FellSilent(Event):
    """No update before the deadline, or past it at a restart."""

    actor: str = "watcher"


@dataclass(frozen=True, slots=True, kw_only=True)
class GraceEnded(Event):
    """The time for late updates is over: the attempt is fenced, its locks go."""

    actor: str = "watcher"


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumed(Event):
    """`resume()` brought a timed-out attempt back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Retried(Event):
    """A new attempt, by policy or by command."""

    token: str
    not_before: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Interrupted(Event):
    """The daemon died or drained while it ran, and the action may run again."""

    token: str
