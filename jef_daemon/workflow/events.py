"""What happens to a workflow, and what follows from it: the words of the law. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jef_daemon.lifecycle import Status
from jef_daemon.lock.state import Mode
from jef_daemon.workflow.state import Holding


class Refused(Exception):
    """An event that does not concern the workflow as it is; nothing is changed."""


# --- what happens ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happens to a workflow."""

    actor: str = "coordinator"
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Begun(Event):
    """It may run: fewer of its name run than may."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended(Event):
    """A stage's job, or the workflow that a stage is, has come to an end (or is TIMED_OUT)."""

    actor: str = "executor"
    stage: str
    index: int | None
    attempt: int
    status: Status
    sequence: int | None = None
    """Of the notification; None: it has none."""
    result: str = ""
    job_variables: Mapping[str, Any] = field(default_factory=dict)
    workflow_variables: Mapping[str, Any] = field(default_factory=dict)
    error: Mapping[str, Any] | None = None
    """`type` and `message`; None: the job said nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LocksAwaited(Event):
    """Others hold what it asked for."""

    actor: str = "locks"
    place: Mapping[str, Any]
    """resource, mode, position, holders."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LocksGranted(Event):
    """It holds all its locks."""

    actor: str = "locks"
    tokens: Mapping[str, int]
    """Fencing numbers, by the lock service's names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LocksRefused(Event):
    """It can never have them."""

    actor: str = "locks"


@dataclass(frozen=True, slots=True, kw_only=True)
class LocksTimedOut(Event):
    """It has waited for them as long as it may."""

    actor: str = "watcher"


@dataclass(frozen=True, slots=True, kw_only=True)
class LocksLost(Event):
    """It holds them no more: the lease ended, or an operator took one away."""

    actor: str = "locks"
    is_failure: bool = True
    """Whether that is the workflow's failure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LocksLostAround(Event):
    """A workflow around it holds some no more, and goes on."""

    actor: str = "locks"
    names: frozenset[str]
    """`Holding.within` of those."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CancelAsked(Event):
    """Somebody wants it stopped."""

    actor: str = "operator"
    force: bool = False
    """Also the `always` stages, and jobs that do not answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Broken(Event):
    """The coordinator cannot go on with it, by a fault of its own; `reason` says what it ran into."""

    of: Event
    """What it was about to take."""
    at_once: bool = False
    """Whether it does not wait for its jobs to end: it met the fault also when it was to do that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryAsked(Event):
    """Somebody wants it to go on from the stage that failed."""

    actor: str = "operator"
    configuration: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """By stage: values that take the place of those in its configuration; None: as before an earlier retry."""


# --- what follows from it --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StartJob:
    """A request is to be published."""

    action: str
    body: bytes
    """As on the wire."""


@dataclass(frozen=True, slots=True)
class StartChild:
    """Another workflow is to be started."""

    execution_id: str
    """Its id, and what the stage knows it by."""
    workflow: str
    variables: dict[str, Any]
    priority: int
    around: tuple[Holding, ...] = ()
    """Locks that are held already where it runs."""


@dataclass(frozen=True, slots=True)
class CancelJob:
    """A stage's job is to be cancelled."""

    execution_id: str
    reason: str
    force: bool
    is_child: bool
    """Whether it is a workflow."""


@dataclass(frozen=True, slots=True)
class TellLost:
    """A workflow within is to hear that it relies on locks that are not held any more."""

    execution_id: str
    names: frozenset[str]
    """`Holding.within` of those."""
    reason: str


@dataclass(frozen=True, slots=True)
class AskLocks:
    """Its locks are to be asked for."""

    locks: tuple[tuple[str, Mode], ...]
    """Names and modes."""


@dataclass(frozen=True, slots=True)
class ReleaseLocks:
    """It needs its locks no more, nor a place among those who wait for them."""


@dataclass(frozen=True, slots=True)
class Noted:
    """A line of the history."""

    event: str
    stage: str = ""
    actor: str = "coordinator"
    reason: str = ""


Effect = StartJob | StartChild | CancelJob | TellLost | AskLocks | ReleaseLocks | Noted
