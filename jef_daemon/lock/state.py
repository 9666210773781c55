"""What the lock service stores: grants, waiters, fencing numbers; how it is read and how it is changed. Pure.

Part in the flow: `protocol.decide` reads through a `LockView` and answers with `Change`s; the store applies
them. A hundred thousand waiters and as many held resources live in the store only, so every read here is one
that an index answers, and none returns more rows than it was asked for.

What it does not do: decide anything (`draft`, `protocol`), or know of SQL (the service does).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

Locks = tuple[tuple[str, "Mode"], ...]
"""Resources and how each is wanted, sorted by name, each name once."""


class Mode(StrEnum):
    """How a resource is locked. The values are those of the wire."""

    SHARED = "SHARED"
    """Together with other SHARED ones."""
    EXCLUSIVE = "EXCLUSIVE"
    """Alone."""

    def excludes(self, other: Mode) -> bool:
        """True when the two cannot be held at the same time."""
        return Mode.EXCLUSIVE in (self, other)

    def covers(self, wanted: Mode) -> bool:
        """True when who holds this has what `wanted` would give."""
        return wanted in (self, Mode.SHARED)


@dataclass(frozen=True, slots=True)
class Grant:
    """One resource held by one owner."""

    resource: str
    mode: Mode
    owner: str
    """Who holds it: an execution's id, or any name that an external client chose."""
    fencing_token: int
    """Number of this grant among all of the resource, from 1; a later grant's is always higher."""
    lease_until: float
    """It ends then unless renewed. UTC seconds since the epoch."""
    granted_at: float
    reply_to: str | None = None
    """Where the owner is told when it loses the grant."""
    correlation_id: str | None = None


@dataclass(frozen=True, slots=True)
class Waiter:
    """A request in the queue of every resource it names. It holds nothing."""

    ticket: int
    """Its place in the order of all waiters, from 1."""
    owner: str
    locks: Locks
    reply_to: str | None
    """Where the owner is told when it is granted, or leaves the queue otherwise."""
    correlation_id: str | None
    asked_at: float
    wait_until: float
    """It leaves the queue then unless it asks again or renews: its requester is taken for dead."""
    lease_s: float
    """Lease of the grants it will get."""
    blocked_at: str
    """One of its resources that cannot be had now. It can only be granted once this one can, so that a
    change of another resource need not look at it."""
    overtaken: int = 0
    """How often a later request was granted a resource that this one, first in that queue, waits for."""
    firm: bool = False
    """True once it was overtaken too often or waited too long: nobody overtakes it any more."""

    def mode_of(self, resource: str) -> Mode | None:
        """How it wants a resource; None when it does not name it."""
        return dict(self.locks).get(resource)


# --- reading ---------------------------------------------------------------------------------------------


class Among(StrEnum):
    """Which of a resource's waiters are read."""

    ALL = "all"
    FIRM = "firm"
    """Those with `firm` set; few."""
    BLOCKED = "blocked"
    """Those whose `blocked_at` is the resource."""


class LockView(Protocol):
    """The reads of a decision, on a store that does not change meanwhile. Each is one look into an index."""

    def grants_of(self, owner: str) -> Sequence[Grant]:
        """All that an owner holds, by name of resource; bounded by the locks of one request."""
        ...

    def waiter_of(self, owner: str) -> Waiter | None:
        """The owner's place in the queue; an owner has at most one."""
        ...

    def holders(self, resource: str, limit: int) -> Sequence[Grant]:
        """Who holds a resource, by fencing number, the oldest first. All have the same mode."""
        ...

    def waiters(
        self, resource: str, mode: Mode | None, among: Among, after: int, limit: int
    ) -> Sequence[Waiter]:
        """Waiters that name a resource in a mode (None: in any), by ticket, those later than `after`."""
        ...

    def ahead(self, resource: str, ticket: int) -> int:
        """How many waiters of a resource have an earlier ticket. Only asked when a waiter asks again."""
        ...

    def waiting(self, resource: str) -> int:
        """How many wait for a resource: a counter kept by the store, not a count of rows."""
        ...

    def fence(self, resource: str) -> int:
        """The last fencing number given out for a resource, 0 before the first; kept when all is released."""
        ...

    def next_ticket(self) -> int:
        """A number higher than the ticket of everybody who waits now, at least 1."""
        ...

    def expired_grants(self, now: float, limit: int) -> Sequence[Grant]:
        """Grants with `lease_until <= now`, by (lease_until, resource, owner)."""
        ...

    def expired_waiters(self, now: float, limit: int) -> Sequence[Waiter]:
        """Waiters with `wait_until <= now`, by (wait_until, ticket)."""
        ...

    def resources(self, after: str, limit: int) -> Sequence[str]:
        """Names, later than `after`, of resources that are held or waited for; only for `Inspect`."""
        ...


# --- changing --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PutGrant:
    """A resource is granted."""

    grant: Grant


@dataclass(frozen=True, slots=True)
class RenewGrant:
    """A grant lives longer; the row of (resource, owner) is replaced: lease and address are new."""

    grant: Grant


@dataclass(frozen=True, slots=True)
class DropGrant:
    """A grant ends. The reason goes into the history."""

    grant: Grant
    reason: str


@dataclass(frozen=True, slots=True)
class SetFence:
    """The last fencing number of a resource rose; it is kept for ever."""

    resource: str
    number: int


@dataclass(frozen=True, slots=True)
class PutWaiter:
    """A request joins the queue of each of its resources."""

    waiter: Waiter


@dataclass(frozen=True, slots=True)
class ChangeWaiter:
    """A waiter's address, lease of waiting, `blocked_at`, `overtaken` or `firm` is new; never its locks."""

    waiter: Waiter


@dataclass(frozen=True, slots=True)
class DropWaiter:
    """A waiter leaves the queue: granted, or otherwise. The reason goes into the history."""

    waiter: Waiter
    reason: str


Change = PutGrant | RenewGrant | DropGrant | SetFence | PutWaiter | ChangeWaiter | DropWaiter
"""What a store applies, in the order given."""
