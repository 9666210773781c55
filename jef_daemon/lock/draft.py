"""The law of the queue, and the changes of one decision before they are stored. Pure.

A request stands, by its ticket, in the queue of every resource it names, and holds nothing while it waits:
no set of jobs can deadlock. It is *blocked at* a resource when

    (a) the holders exclude it, or
    (b) others hold it SHARED and an earlier waiter wants it EXCLUSIVE, or
    (c) an earlier *firm* waiter excludes it,

and is granted when it is blocked nowhere. So a busy resource is handed on strictly in order, while a free one
may be used by a later request as long as the earlier ones wait for something else. A waiter that was
overtaken so `Limits.overtakes` times, or waited `patience_s`, becomes firm, which ends that: nobody starves.

Three facts make a hand-over cost as much as it grants, however long the queue:

- For one resource and one mode, (a), (b) and (c) only become truer with a later ticket. The first waiter that
  is still blocked there ends the search.
- A waiter is blocked as long as it is blocked at its `blocked_at`; only those waiting *there* are looked at.
  One that is not blocked there any more is granted or moves to another of its resources.
- A grant sets nobody free: who was kept out by the waiter is kept out by the holder. One pass in the order of
  tickets is enough.

Overtaking is counted for the first excluded waiter of a queue only. Counting it for all would cost as much
as the queue is long, and those behind have their turn as the first: the earliest waiter of all is always the
first of its queues, so it is granted after finitely many overtakes, and then the next one is the earliest.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Iterator, Sequence
from typing import Protocol

from jef_daemon.lock.requests import Answer, Asked, Limits, Place, Refused, Reply, Request, ResourceState
from jef_daemon.lock.state import (
    Among,
    Change,
    ChangeWaiter,
    DropGrant,
    DropWaiter,
    Grant,
    Locks,
    LockView,
    Mode,
    PutGrant,
    PutWaiter,
    RenewGrant,
    SetFence,
    Waiter,
)

Rest = tuple[Request, ...]
"""What is to be decided next, in the same transaction."""

Line = tuple[str, Mode]
"""Those of a resource's waiters that want it in one mode."""

NEWCOMER = 2**63 - 1
"""Ticket of a request that does not wait yet: later than all."""

_RIVALS: dict[Mode, Mode | None] = {Mode.SHARED: Mode.EXCLUSIVE, Mode.EXCLUSIVE: None}
"""Which waiters exclude a request of that mode; None: those of any mode."""

HOLDERS_TOLD = 10


class Address(Protocol):
    """Anything that knows where its owner is to be told: a request, a grant, a waiter."""

    @property
    def reply_to(self) -> str | None:
        """The queue; None where nobody wants to be told."""
        ...

    @property
    def correlation_id(self) -> str | None:
        """What its message says, so that it knows the answer."""
        ...


class Draft:
    """A view with the changes of one decision laid over it, and the replies.

    Reads see what was written before in the same decision; nothing reaches the store but by `changes`.
    """

    def __init__(self, view: LockView, now: float, limits: Limits) -> None:
        self.view = view
        self.now = now
        self.limits = limits
        self.changes: list[Change] = []
        self.replies: list[Reply] = []
        self._grants: dict[str, dict[str, Grant | None]] = {}
        """By resource and owner; None: dropped."""
        self._waiters: dict[int, Waiter] = {}
        """Changed ones, by ticket."""
        self._gone: set[int] = set()
        """Tickets of waiters that left."""

    # --- reading -----------------------------------------------------------------------------------------

    def holding(self, resource: str) -> Mode | None:
        """How a resource is held now; None: it is free."""
        mine = self._grants.get(resource, {})
        for grant in mine.values():
            if grant is not None:
                return grant.mode
        # All of `mine` are dropped: one row more than these tells whether anybody else is left.
        stored = self.view.holders(resource, len(mine) + 1)
        return next((grant.mode for grant in stored if grant.owner not in mine), None)

    def obstacle(self, locks: Locks, ticket: int = NEWCOMER) -> tuple[str | None, dict[int, Waiter]]:
        """The first resource at which a request is blocked, and whom it would overtake if there is none."""
        passed: dict[int, Waiter] = {}
        for resource, mode in locks:
            blocked, rival = self._standing(resource, mode, ticket)
            if blocked:
                return resource, {}
            if rival is not None:
                passed[rival.ticket] = rival
        return None, passed

    def _standing(self, resource: str, mode: Mode, ticket: int) -> tuple[bool, Waiter | None]:
        """Whether (a), (b) or (c) holds, and if not, the first waiter that would be overtaken."""
        held = self.holding(resource)
        if held is not None and held.excludes(mode):
            return True, None  # (a)
        rival = self._first_rival(resource, mode, ticket, Among.ALL)
        if rival is None:
            return False, None
        if held is not None:
            return True, None  # (b): only SHARED comes here, and its rivals are EXCLUSIVE
        if not rival.firm and self.now - rival.asked_at >= self.limits.patience_s:
            # Written only now that it matters: to mark each waiter when its patience ends would write the
            # whole queue once. Tickets are in the order of asking, so a later one is not older than this.
            self.change_waiter(dataclasses.replace(rival, firm=True))
            return True, None  # (c)
        if rival.firm or self._first_rival(resource, mode, ticket, Among.FIRM) is not None:
            return True, None  # (c)
        return False, rival

    def _first_rival(self, resource: str, mode: Mode, ticket: int, among: Among) -> Waiter | None:
        """The earliest waiter before a ticket that excludes a mode at a resource."""
        rivals = _RIVALS[mode]
        stored = self.view.waiters(resource, rivals, among, 0, len(self._gone) + 1)
        found = [self._waiters.get(w.ticket, w) for w in stored if w.ticket not in self._gone]
        if among is Among.FIRM:
            made = (w for w in self._waiters.values() if w.firm and w.ticket not in self._gone)
            found += [w for w in made if (wants := w.mode_of(resource)) and wants.excludes(mode)]
        first = min(found, key=lambda waiter: waiter.ticket, default=None)
        return first if first is not None and first.ticket < ticket else None

    def place(self, resource: str, mode: Mode, position: int) -> Place:
        """What a waiter is told of the resource that blocks it."""
        holders = self.view.holders(resource, HOLDERS_TOLD)
        return Place(resource, mode, position, tuple(grant.owner for grant in holders))

    # --- writing -----------------------------------------------------------------------------------------

    def grant(self, address: Address, owner: str, locks: Locks, lease_s: float) -> None:
        """Give all the locks of a request to its owner, each with a new fencing number, and tell it."""
        grants = []
        for resource, mode in locks:
            number = self.view.fence(resource) + 1 + self._granted_here(resource)
            until = self.now + lease_s
            where = address.reply_to, address.correlation_id
            grant = Grant(resource, mode, owner, number, until, self.now, *where)
            self._grants.setdefault(resource, {})[owner] = grant
            self.changes += [SetFence(resource, number), PutGrant(grant)]
            grants.append(grant)
        self.tell(owner, address, Answer.GRANTED, grants=tuple(grants))

    def _granted_here(self, resource: str) -> int:
        """Fencing numbers of a resource given out in this decision: nothing is granted and dropped in one."""
        return sum(grant is not None for grant in self._grants.get(resource, {}).values())

    def overtake(self, passed: dict[int, Waiter]) -> None:
        """Count a grant for those that were first in a queue and did not get it."""
        for waiter in passed.values():
            count = waiter.overtaken + 1
            firm = count >= self.limits.overtakes
            self.change_waiter(dataclasses.replace(waiter, overtaken=count, firm=firm))

    def renew(self, grant: Grant, address: Address, lease_s: float) -> Grant:
        """Let a grant live longer; never shorter, whatever the clock did. Its address is the new one."""
        renewed = dataclasses.replace(
            grant,
            lease_until=max(grant.lease_until, self.now + lease_s),
            reply_to=address.reply_to,
            correlation_id=address.correlation_id,
        )
        self.changes.append(RenewGrant(renewed))
        return renewed

    def drop_grant(self, grant: Grant, reason: str) -> None:
        """End a grant; the caller sweeps its resource."""
        self._grants.setdefault(grant.resource, {})[grant.owner] = None
        self.changes.append(DropGrant(grant, reason))

    def put_waiter(self, waiter: Waiter) -> None:
        """Let a request join the queue; the last thing a decision does."""
        self.changes.append(PutWaiter(waiter))

    def change_waiter(self, waiter: Waiter) -> None:
        """Write a waiter's new state."""
        self._waiters[waiter.ticket] = waiter
        self.changes.append(ChangeWaiter(waiter))

    def drop_waiter(self, waiter: Waiter, reason: str) -> None:
        """Let a waiter leave; unless it was granted, the caller sweeps its resources."""
        self._gone.add(waiter.ticket)
        self.changes.append(DropWaiter(waiter, reason))

    def tell(
        self,
        owner: str,
        address: Address,
        status: Answer,
        *,
        grants: tuple[Grant, ...] = (),
        place: Place | None = None,
        lost: tuple[str, ...] = (),
        reason: str = "",
        states: tuple[ResourceState, ...] = (),
        held: tuple[str, ...] = (),
        code: Refused | None = None,
    ) -> None:
        """Add a reply."""
        where = address.reply_to, address.correlation_id
        self.replies.append(Reply(status, owner, *where, grants, place, lost, reason, states, held, code))

    def refuse(self, request: Asked, code: Refused, reason: str, place: Place | None = None) -> Rest:
        """Refuse it: the answer is all that becomes of it."""
        self.tell(request.owner, request, Answer.REFUSED, reason=reason, place=place, code=code)
        return ()

    # --- handing on --------------------------------------------------------------------------------------

    def sweep(self, resources: Sequence[str]) -> tuple[str, ...]:
        """Grant, in the order of tickets, every waiter that these resources no longer block.

        Returns:
            Resources to be swept again because the decision grew to `Limits.batch`; mostly none.
        """
        # A resource that somebody still holds after a change was SHARED before and is SHARED now. That may
        # matter to SHARED waiters, when an EXCLUSIVE one left; EXCLUSIVE ones end at the first look.
        ended: set[Line] = set()
        lines = [(resource, mode) for resource in sorted(set(resources)) for mode in Mode]
        queues = (self._blocked(line, ended) for line in lines)
        looked_at = 0
        for ticket, line in heapq.merge(*queues):
            if looked_at == self.limits.batch:
                return tuple(sorted({resource for resource, mode in lines if (resource, mode) not in ended}))
            if self._look_at(ticket, line):
                looked_at += 1
            else:
                ended.add(line)
        return ()

    def _blocked(self, line: Line, ended: set[Line]) -> Iterator[tuple[int, Line]]:
        """Tickets that wait at a resource in one mode, until the line is found to have ended."""
        after, limit = 0, 2  # mostly one is granted, and the second ends the line
        while page := self.view.waiters(*line, Among.BLOCKED, after, limit):
            for waiter in page:
                if waiter.ticket in self._gone:
                    continue
                self._waiters.setdefault(waiter.ticket, waiter)
                yield waiter.ticket, line
                if line in ended:
                    return
            after, limit = page[-1].ticket, min(4 * limit, self.limits.batch)

    def _look_at(self, ticket: int, line: Line) -> bool:
        """Grant a waiter or let it wait elsewhere; False when it is still blocked where it waits."""
        waiter = self._waiters[ticket]
        if self._standing(*line, ticket)[0]:
            return False
        blocked_at, passed = self.obstacle(waiter.locks, ticket)
        if blocked_at is not None:
            self.change_waiter(dataclasses.replace(waiter, blocked_at=blocked_at))
            return True
        self.overtake(passed)
        self.drop_waiter(waiter, "granted")
        self.grant(waiter, waiter.owner, waiter.locks, waiter.lease_s)
        return True
