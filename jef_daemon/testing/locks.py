"""The lock store in memory: what the SQL of the lock service does, without a database.

For tests of the protocol and of whatever talks to a lock service. It is strict: a change that does not fit
what is stored is an error, so that a decision that contradicts itself is seen at once.
"""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Sequence
from functools import singledispatchmethod
from typing import TypeVar

from jef_daemon.lock.protocol import DEFAULT_LIMITS, decide
from jef_daemon.lock.requests import Decision, Limits, Reply, Request
from jef_daemon.lock.state import (
    Among,
    Change,
    ChangeWaiter,
    DropGrant,
    DropWaiter,
    Grant,
    Mode,
    PutGrant,
    PutWaiter,
    RenewGrant,
    SetFence,
    Waiter,
)

_Row = TypeVar("_Row")


class MemoryLocks:
    """A `LockView` and what applies changes to it.

    Attributes:
        rows_read: rows that all reads together returned, to show that an operation's cost is flat.
        decisions: made so far.
    """

    def __init__(self, limits: Limits = DEFAULT_LIMITS) -> None:
        self.limits = limits
        self.rows_read = 0
        self.decisions = 0
        self._held: dict[str, dict[str, Grant]] = {}
        """By resource, then by owner in the order of fencing numbers."""
        self._owned: dict[str, dict[str, Grant]] = {}
        self._fences: dict[str, int] = {}
        self._waiters: dict[int, Waiter] = {}
        self._last_ticket = 0
        self._tickets: dict[str, int] = {}
        """By owner."""
        self._queues: dict[tuple[str, Mode | None, Among], list[int]] = {}
        """Sorted tickets: the index of (resource, mode, among)."""

    def run(self, request: Request, now: float) -> list[Reply]:
        """Decide and apply one request, and all that follows from it."""
        replies: list[Reply] = []
        pending: deque[Request] = deque([request])
        while pending:
            decision = self.step(pending.popleft(), now)
            replies += decision.replies
            pending.extendleft(reversed(decision.rest))
        return replies

    def step(self, request: Request, now: float) -> Decision:
        """Decide and apply one request; `rest` is the caller's."""
        decision = decide(self, request, now, self.limits)
        self.decisions += 1
        for change in decision.changes:
            self._apply(change)
        return decision

    @property
    def all_grants(self) -> list[Grant]:
        """Everything that is held."""
        return [grant for held in self._held.values() for grant in held.values()]

    @property
    def all_waiters(self) -> list[Waiter]:
        """Everybody who waits, by ticket."""
        return [self._waiters[ticket] for ticket in sorted(self._waiters)]

    # --- LockView ----------------------------------------------------------------------------------------

    def grants_of(self, owner: str) -> Sequence[Grant]:
        """All that an owner holds, by name of resource."""
        return self._read(sorted(self._owned.get(owner, {}).values(), key=lambda grant: grant.resource))

    def waiter_of(self, owner: str) -> Waiter | None:
        """The owner's place in the queue."""
        self.rows_read += 1
        return self._waiters.get(self._tickets.get(owner, 0))

    def holders(self, resource: str, limit: int) -> Sequence[Grant]:
        """The oldest holders."""
        held = iter(self._held.get(resource, {}).values())
        return self._read([grant for grant, _ in zip(held, range(limit), strict=False)])

    def waiters(
        self, resource: str, mode: Mode | None, among: Among, after: int, limit: int
    ) -> Sequence[Waiter]:
        """A page of a resource's queue."""
        tickets = self._queues.get((resource, mode, among), [])
        start = bisect.bisect_right(tickets, after)
        return self._read([self._waiters[ticket] for ticket in tickets[start : start + limit]])

    def ahead(self, resource: str, ticket: int) -> int:
        """Waiters before a ticket."""
        return bisect.bisect_left(self._queues.get((resource, None, Among.ALL), []), ticket)

    def waiting(self, resource: str) -> int:
        """Waiters of a resource."""
        return len(self._queues.get((resource, None, Among.ALL), []))

    def fence(self, resource: str) -> int:
        """The last fencing number."""
        self.rows_read += 1
        return self._fences.get(resource, 0)

    def next_ticket(self) -> int:
        """One more than the last; never one again, so that tests can tell two waits of an owner apart."""
        return self._last_ticket + 1

    def expired_grants(self, now: float, limit: int) -> Sequence[Grant]:
        """Grants whose lease is over."""
        over = [grant for grant in self.all_grants if grant.lease_until <= now]
        over.sort(key=lambda grant: (grant.lease_until, grant.resource, grant.owner))
        return self._read(over[:limit])

    def expired_waiters(self, now: float, limit: int) -> Sequence[Waiter]:
        """Waiters whose lease of waiting is over."""
        over = [waiter for waiter in self.all_waiters if waiter.wait_until <= now]
        over.sort(key=lambda waiter: (waiter.wait_until, waiter.ticket))
        return self._read(over[:limit])

    def resources(self, after: str, limit: int) -> Sequence[str]:
        """Names in use."""
        used = {resource for resource, held in self._held.items() if held}
        used |= {resource for resource, _, _ in self._queues}
        return self._read(sorted(name for name in used if name > after and self._in_use(name))[:limit])

    def _in_use(self, resource: str) -> bool:
        return bool(self._held.get(resource) or self.waiting(resource))

    def _read(self, rows: list[_Row]) -> list[_Row]:
        self.rows_read += len(rows) + 1
        return rows

    # --- changes -----------------------------------------------------------------------------------------

    @singledispatchmethod
    def _apply(self, change: Change) -> None:
        raise TypeError(change)

    @_apply.register
    def _(self, change: PutGrant) -> None:
        grant = change.grant
        if grant.owner in self._held.get(grant.resource, {}):
            raise ValueError(f"granted twice: {grant}")
        if grant.fencing_token != self._fences[grant.resource]:
            raise ValueError(f"not the last fencing number: {grant}")
        self._put(grant)

    @_apply.register
    def _(self, change: RenewGrant) -> None:
        if change.grant.owner not in self._held[change.grant.resource]:
            raise ValueError(f"not held: {change.grant}")
        self._put(change.grant)

    @_apply.register
    def _(self, change: DropGrant) -> None:
        del self._held[change.grant.resource][change.grant.owner]
        del self._owned[change.grant.owner][change.grant.resource]

    @_apply.register
    def _(self, change: SetFence) -> None:
        if change.number <= self._fences.get(change.resource, 0):
            raise ValueError(f"a fencing number that does not rise: {change}")
        self._fences[change.resource] = change.number

    @_apply.register
    def _(self, change: PutWaiter) -> None:
        waiter = change.waiter
        if waiter.owner in self._tickets or waiter.ticket in self._waiters:
            raise ValueError(f"waits already: {waiter}")
        self._tickets[waiter.owner] = self._last_ticket = waiter.ticket
        self._index(waiter)

    @_apply.register
    def _(self, change: ChangeWaiter) -> None:
        before = self._waiters[change.waiter.ticket]
        if (before.owner, before.locks) != (change.waiter.owner, change.waiter.locks):
            raise ValueError(f"another waiter: {change.waiter}")
        self._unindex(before)
        self._index(change.waiter)

    @_apply.register
    def _(self, change: DropWaiter) -> None:
        self._unindex(self._waiters[change.waiter.ticket])
        del self._waiters[change.waiter.ticket]
        del self._tickets[change.waiter.owner]

    def _put(self, grant: Grant) -> None:
        self._held.setdefault(grant.resource, {})[grant.owner] = grant
        self._owned.setdefault(grant.owner, {})[grant.resource] = grant

    def _index(self, waiter: Waiter) -> None:
        self._waiters[waiter.ticket] = waiter
        for key in _keys(waiter):
            bisect.insort(self._queues.setdefault(key, []), waiter.ticket)

    def _unindex(self, waiter: Waiter) -> None:
        for key in _keys(waiter):
            self._queues[key].remove(waiter.ticket)


def _keys(waiter: Waiter) -> list[tuple[str, Mode | None, Among]]:
    """The queues that a waiter stands in."""
    keys: list[tuple[str, Mode | None, Among]] = []
    for resource, mode in waiter.locks:
        for among, stands in (
            (Among.ALL, True),
            (Among.FIRM, waiter.firm),
            (Among.BLOCKED, waiter.blocked_at == resource),
        ):
            if stands:
                keys += [(resource, mode, among), (resource, None, among)]
    return keys
