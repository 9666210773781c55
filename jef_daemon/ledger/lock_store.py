"""The lock service's store in the ledger's database: the reads of a decision, and its changes (`lock.state`).

Each read is one look into an index and returns no more rows than it was asked for; a resource that 100,000
wait for costs as much as one that nobody wants. Whatever is read and changed here belongs to the one
transaction of the batch.
"""

from __future__ import annotations

import itertools
import json
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, cast

from sqlalchemy import Connection

from jef_daemon.commits import Counted
from jef_daemon.ledger import lock_statements as sql
from jef_daemon.ledger.driver import Driver
from jef_daemon.lock.leases import LEASE_ENDED
from jef_daemon.lock.protocol import decide
from jef_daemon.lock.requests import Answer, Decision, Limits, Reply, Request, outcome
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


class Count(Protocol):
    """Counts."""

    def __call__(self, what: Counted, word: str = "", number: int = 1) -> None:
        """See `Transaction.count`."""
        ...


class LockStore:
    """A `LockView` and what applies changes to it, inside one transaction.

    Args:
        connection: in the transaction.
        now: UTC seconds since the epoch.
        limits: of the lock service.
        count: told what is decided, for those who count.
    """

    def __init__(
        self, connection: Connection, now: float, limits: Limits, count: Count | None = None
    ) -> None:
        self._count_for = count
        self._driver = Driver(connection)
        self._now = now
        self._limits = limits
        self._counters: dict[str, tuple[int, int]] = {}
        """Fence and waiting by resource, as they are now: only this transaction changes them."""
        self._looked_up: dict[tuple[object, ...], Any] = {}
        """Answers of this decision: a sweep asks the same of a resource for each of its waiters."""
        self._history: list[dict[str, Any]] = []
        self.touched: set[str] = set()
        """Resources whose queue may have moved."""

    def run(self, requests: Iterable[Request]) -> list[Reply]:
        """Decide requests in order, each with all that follows from it; returns what is to be told."""
        replies: list[Reply] = []
        pending = deque(requests)
        while pending:
            self._looked_up.clear()
            request = pending.popleft()
            decision = decide(self, request, self._now, self._limits)
            if self._count_for is not None:
                _count(self._count_for, request, decision)
            for kind, changes in itertools.groupby(decision.changes, type):
                _APPLY[kind](self, list(changes))
            replies += decision.replies
            pending.extendleft(reversed(decision.rest))
        if self._history:
            self._driver.change(sql.PUT_HISTORY, *self._history)
            self._history = []
        return replies

    def take_over(self, until: float) -> None:
        """Let no lease end before an instant: while nobody listened, nobody could renew."""
        self._driver.change(sql.PROLONG_GRANTS, {"least": until})
        self._driver.change(sql.PROLONG_WAITERS, {"least": until})

    def shift(self, by_s: float) -> None:
        """Move the end of every lease: the wall clock was set by so much, and they last as long as before."""
        self._driver.change(sql.SHIFT_GRANTS, {"by": by_s})
        self._driver.change(sql.SHIFT_WAITERS, {"by": by_s})

    # --- LockView ----------------------------------------------------------------------------------------

    def grants_of(self, owner: str) -> Sequence[Grant]:
        """See `LockView`."""
        return [sql.grant_of(row) for row in self._driver.rows(sql.GRANTS_OF, {"owner": owner})]

    def waiter_of(self, owner: str) -> Waiter | None:
        """See `LockView`."""
        found = self._driver.rows(sql.WAITER_OF, {"owner": owner})
        return sql.waiter_of(found[0]) if found else None

    def holders(self, resource: str, limit: int) -> Sequence[Grant]:
        """See `LockView`."""
        key = "holders", resource, limit
        if key not in self._looked_up:
            wanted = {"resource": resource, "most": limit}
            found = self._driver.rows(sql.HOLDERS, wanted)
            self._looked_up[key] = [sql.grant_of(row) for row in found]
        return cast("list[Grant]", self._looked_up[key])

    def waiters(
        self, resource: str, mode: Mode | None, among: Among, after: int, limit: int
    ) -> Sequence[Waiter]:
        """See `LockView`."""
        if not self.waiting(resource):
            return []
        key = resource, mode, among, after, limit
        if key not in self._looked_up:
            wanted = {"resource": resource, "after": after, "most": limit}
            found = self._driver.rows(sql.WAITERS_OF[mode, among], wanted)
            self._looked_up[key] = [sql.waiter_of(row) for row in found]
        return cast("list[Waiter]", self._looked_up[key])

    def ahead(self, resource: str, ticket: int) -> int:
        """See `LockView`."""
        return self._driver.value(sql.AHEAD, {"resource": resource, "ticket": ticket}) or 0

    def waiting(self, resource: str) -> int:
        """See `LockView`."""
        return self._counted(resource)[1]

    def fence(self, resource: str) -> int:
        """See `LockView`."""
        return self._counted(resource)[0]

    def next_ticket(self) -> int:
        """See `LockView`."""
        return (self._driver.value(sql.LAST_TICKET, {}) or 0) + 1

    def expired_grants(self, now: float, limit: int) -> Sequence[Grant]:
        """See `LockView`."""
        found = self._driver.rows(sql.EXPIRED_GRANTS, {"now": now, "most": limit})
        return [sql.grant_of(row) for row in found]

    def expired_waiters(self, now: float, limit: int) -> Sequence[Waiter]:
        """See `LockView`."""
        found = self._driver.rows(sql.EXPIRED_WAITERS, {"now": now, "most": limit})
        return [sql.waiter_of(row) for row in found]

    def resources(self, after: str, limit: int) -> Sequence[str]:
        """See `LockView`."""
        return [name for (name,) in self._driver.rows(sql.IN_USE_PAGE, {"after": after, "most": limit})]

    def _counted(self, resource: str) -> tuple[int, int]:
        known = self._counters.get(resource)
        if known is None:
            found = self._driver.rows(sql.COUNTERS, {"name": resource})
            known = self._counters[resource] = tuple(found[0]) if found else (-1, 0)
        return (max(known[0], 0), known[1])

    # --- changes -----------------------------------------------------------------------------------------

    def _put_grant(self, change: PutGrant) -> None:
        grant = change.grant
        self._driver.change(
            sql.PUT_GRANT,
            {
                "resource": grant.resource,
                "owner": grant.owner,
                "mode": grant.mode.value,
                "fencing_token": grant.fencing_token,
                "lease_until": grant.lease_until,
                "granted_at": grant.granted_at,
                "reply_to": grant.reply_to,
                "correlation_id": grant.correlation_id,
            },
        )
        self._note(grant.resource, grant.owner, "granted", grant.mode, grant.fencing_token)

    def _renew_grant(self, change: RenewGrant) -> None:
        grant = change.grant
        self._driver.change(
            sql.RENEW_GRANT,
            {
                "r": grant.resource,
                "o": grant.owner,
                "until": grant.lease_until,
                "reply": grant.reply_to,
                "correlation": grant.correlation_id,
            },
        )

    def _drop_grant(self, change: DropGrant) -> None:
        grant = change.grant
        self._driver.change(sql.DROP_GRANT, {"r": grant.resource, "o": grant.owner})
        self._note(grant.resource, grant.owner, "ended", grant.mode, grant.fencing_token, change.reason)
        self.touched.add(grant.resource)

    def _set_fence(self, change: SetFence) -> None:
        self._ensure(change.resource)
        self._driver.change(sql.SET_FENCE, {"r": change.resource, "n": change.number})
        self._counters[change.resource] = (change.number, self._counters[change.resource][1])

    def _put_waiter(self, change: PutWaiter) -> None:
        waiter = change.waiter
        self._driver.change(
            sql.PUT_WAITER,
            {
                "ticket": waiter.ticket,
                "owner": waiter.owner,
                "locks": json.dumps(waiter.locks),
                "reply_to": waiter.reply_to,
                "correlation_id": waiter.correlation_id,
                "asked_at": waiter.asked_at,
                "wait_until": waiter.wait_until,
                "lease_s": waiter.lease_s,
                "blocked_at": waiter.blocked_at,
                "overtaken": waiter.overtaken,
                "firm": waiter.firm,
            },
        )
        wants = [
            {
                "resource": resource,
                "ticket": waiter.ticket,
                "mode": mode.value,
                "firm": waiter.firm,
                "blocked": waiter.blocked_at == resource,
            }
            for resource, mode in waiter.locks
        ]
        self._driver.change(sql.PUT_WANT, *wants)
        for resource, mode in waiter.locks:
            self._count(resource, 1)
            self._note(resource, waiter.owner, "asked", mode)

    def _change_waiters(self, changes: Sequence[ChangeWaiter]) -> None:
        waiters = [change.waiter for change in changes]
        changed = ("reply_to", "correlation_id", "wait_until", "lease_s", "blocked_at", "overtaken", "firm")
        new = [{f"new_{name}": getattr(w, name) for name in changed} | {"t": w.ticket} for w in waiters]
        self._driver.change(sql.CHANGE_WAITER, *new)
        wants = [
            {
                "r": resource,
                "t": waiter.ticket,
                "is_firm": waiter.firm,
                "is_blocked": waiter.blocked_at == resource,
            }
            for waiter in waiters
            for resource, _ in waiter.locks
        ]
        self._driver.change(sql.CHANGE_WANT, *wants)

    def _drop_waiter(self, change: DropWaiter) -> None:
        waiter = change.waiter
        self._driver.change(sql.DROP_WAITER, {"t": waiter.ticket})
        wants = [{"r": resource, "t": waiter.ticket} for resource, _ in waiter.locks]
        self._driver.change(sql.DROP_WANT, *wants)
        for resource, mode in waiter.locks:
            self._count(resource, -1)
            self.touched.add(resource)
            if change.reason != "granted":
                self._note(resource, waiter.owner, "left", mode, None, change.reason)

    def _count(self, resource: str, by: int) -> None:
        self._ensure(resource)
        self._driver.change(sql.COUNT, {"r": resource, "by": by})
        fence, waiting = self._counters[resource]
        self._counters[resource] = (fence, waiting + by)

    def _ensure(self, resource: str) -> None:
        self._counted(resource)
        if self._counters[resource][0] < 0:
            self._driver.change(sql.PUT_RESOURCE, {"resource": resource, "fence": 0, "waiting": 0})
            self._counters[resource] = (0, 0)

    def _note(
        self, resource: str, owner: str, event: str, mode: Mode, number: int | None = None, reason: str = ""
    ) -> None:
        self._history.append(
            {
                "at": self._now,
                "resource": resource,
                "owner": owner,
                "event": event,
                "mode": mode.value,
                "fencing_token": number,
                "reason": reason,
            }
        )


def _count(count: Count, request: Request, decision: Decision) -> None:
    word = outcome(request, decision)
    if word is not None:
        count(Counted.LOCK_REQUEST, word)
    if word == "stale":
        count(Counted.FENCED, "lock-request")
    for reply in decision.replies:
        if reply.status is Answer.LOST:
            count(Counted.FENCED, "lock-renewal")
        elif reply.status is Answer.KEPT:
            count(Counted.FENCED, "lock-renewal", len(reply.lost))
    ended = sum(isinstance(change, DropGrant) and change.reason == LEASE_ENDED for change in decision.changes)
    count(Counted.LEASE_EXPIRED, number=ended)


def _each(apply: Callable[[LockStore, Any], None]) -> Callable[[LockStore, Sequence[Any]], None]:
    def apply_all(store: LockStore, changes: Sequence[Any]) -> None:
        for change in changes:
            apply(store, change)

    return apply_all


_APPLY: dict[type[Change], Callable[[LockStore, Sequence[Any]], None]] = {
    PutGrant: _each(LockStore._put_grant),  # noqa: SLF001  the table of this very class
    RenewGrant: _each(LockStore._renew_grant),  # noqa: SLF001
    DropGrant: _each(LockStore._drop_grant),  # noqa: SLF001
    SetFence: _each(LockStore._set_fence),  # noqa: SLF001
    PutWaiter: _each(LockStore._put_waiter),  # noqa: SLF001
    # A renewal changes hundreds at once, a sweep moves many on to wait elsewhere.
    ChangeWaiter: LockStore._change_waiters,  # noqa: SLF001
    DropWaiter: _each(LockStore._drop_waiter),  # noqa: SLF001
}


def purge_history(connection: Connection, before: float, most: int) -> int:
    """Delete history of locks from before an instant; returns how many lines."""
    return connection.execute(sql.PURGE, {"before": before, "most": most}).rowcount
