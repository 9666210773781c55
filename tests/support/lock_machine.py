"""The lock protocol under random histories, against a model that knows nothing of indexes or pages.

Requests are delivered at once, late, in another order or twice; owners die (they say nothing more); answers
are lost (who lost one asks again); time passes; operators take locks away. Two daemons ask for the same
executions, attempt after attempt, and the broker repeats what they said. After every step the store must be
what the model says, and the invariants must hold of it. `HYPOTHESIS_PROFILE=ci` looks deeper.

The machine runs over any store: the one in memory (`tests/unit/test_lock_machine`) and the database
(`tests/contract/test_lock_store`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypedDict, TypeVar
from unittest import TestCase

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from jef_daemon.lock.requests import (
    Acquire,
    Answer,
    Asked,
    Cancel,
    Expire,
    ForceRelease,
    Keep,
    Limits,
    Release,
    Renew,
    Reply,
    Request,
)
from jef_daemon.lock.state import Grant, Mode, Waiter

OVERTAKES = 2
PATIENCE_S = 25.0

Wanted = dict[str, Mode]


class Store(Protocol):
    """What the machine drives."""

    def run(self, request: Request, now: float) -> list[Reply]:
        """Decide and apply one request, and all that follows from it."""
        ...

    @property
    def all_grants(self) -> Sequence[Grant]:
        """Everything that is held."""
        ...

    @property
    def all_waiters(self) -> Sequence[Waiter]:
        """Everybody who waits, by ticket."""
        ...


class Address(TypedDict):
    """Who asks, and where the answer goes."""

    owner: str
    reply_to: str | None
    correlation_id: str | None


# --- the model -------------------------------------------------------------------------------------------


@dataclass
class Held:
    mode: Mode
    token: int
    until: float
    at: str | None
    """The queue of whoever asked for it."""
    number: str | None
    """The correlation id of its request."""


@dataclass
class Waiting:
    owner: str
    wants: Wanted
    asked_at: float
    until: float
    lease_s: float
    at: str | None
    number: str | None
    overtaken: int = 0


def exclude(one: Mode, other: Mode) -> bool:
    return one == "EXCLUSIVE" or other == "EXCLUSIVE"


@dataclass
class Naive:
    """Locks as one would write them down: a list in order of arrival, searched from the front each time."""

    batch: int
    now: float = 0.0
    held: dict[tuple[str, str], Held] = field(default_factory=dict)
    """By (resource, owner)."""
    queue: list[Waiting] = field(default_factory=list)
    numbers: dict[str, int] = field(default_factory=dict)

    def of(self, owner: str) -> dict[str, Held]:
        return {resource: held for (resource, who), held in self.held.items() if who == owner}

    def waiter(self, owner: str) -> Waiting | None:
        return next((waiting for waiting in self.queue if waiting.owner == owner), None)

    def firm(self, waiting: Waiting) -> bool:
        return waiting.overtaken >= OVERTAKES or self.now - waiting.asked_at >= PATIENCE_S

    def blocked_at(self, resource: str, mode: Mode, earlier: list[Waiting]) -> bool:
        holders = [held.mode for (name, _), held in self.held.items() if name == resource]
        rivals = [w for w in earlier if resource in w.wants and exclude(w.wants[resource], mode)]
        return (
            any(exclude(holder, mode) for holder in holders)
            or (bool(holders) and any(w.wants[resource] == "EXCLUSIVE" for w in rivals))
            or any(self.firm(w) for w in rivals)
        )

    def blocked(self, wants: Wanted, earlier: list[Waiting]) -> list[str]:
        return [name for name in sorted(wants) if self.blocked_at(name, wants[name], earlier)]

    def grant(self, by: Address, wants: Wanted, lease_s: float, earlier: list[Waiting]) -> None:
        overtaken: list[Waiting] = []
        for resource, mode in sorted(wants.items()):
            for waiting in earlier:
                if resource in waiting.wants and exclude(waiting.wants[resource], mode):
                    if waiting not in overtaken:
                        overtaken.append(waiting)
                    break
            self.numbers[resource] = self.numbers.get(resource, 0) + 1
            where = by["reply_to"], by["correlation_id"]
            until = self.now + lease_s
            self.held[resource, by["owner"]] = Held(mode, self.numbers[resource], until, *where)
        for waiting in overtaken:
            waiting.overtaken += 1

    def hand_on(self) -> None:
        """Until nothing changes: grant the first in the list that can be."""
        for index, waiting in enumerate(self.queue):
            if not self.blocked(waiting.wants, self.queue[:index]):
                del self.queue[index]
                by = Address(owner=waiting.owner, reply_to=waiting.at, correlation_id=waiting.number)
                self.grant(by, waiting.wants, waiting.lease_s, self.queue[:index])
                return self.hand_on()
        return None

    def end(self, owner: str) -> None:
        """What of an owner is over, ends."""
        waiting = self.waiter(owner)
        over = {(r, owner) for r, held in self.of(owner).items() if held.until <= self.now}
        if waiting and waiting.until <= self.now:
            self.queue.remove(waiting)
        self.held = {key: held for key, held in self.held.items() if key not in over}
        self.hand_on()

    def may_touch(self, entry: Held | Waiting, request: Asked) -> bool:
        """Whether a request may end or renew something: a daemon's only what it asked for itself, and not later."""
        return not request.sole or (
            entry.at == request.reply_to and str(entry.number) <= str(request.correlation_id)
        )

    def acquire(self, request: Acquire, wants: Wanted) -> str | None:
        owner, lease_s = request.owner, request.lease_s
        wait_s = lease_s if request.wait_lease_s is None else request.wait_lease_s
        self.end(owner)
        mine = self.of(owner)
        waiting = self.waiter(owner)
        entries: list[Held | Waiting] = [*mine.values(), *([waiting] if waiting else [])]
        if not all(self.may_touch(entry, request) for entry in entries):
            elsewhere = any(entry.at != request.reply_to for entry in entries)
            return "REFUSED" if elsewhere else None
        where = request.reply_to, request.correlation_id
        if mine:
            for resource, mode in wants.items():
                if resource not in mine or (mode == "EXCLUSIVE" and mine[resource].mode == "SHARED"):
                    return "REFUSED"
            for resource in wants:
                mine[resource].until = max(mine[resource].until, self.now + lease_s)
                mine[resource].at, mine[resource].number = where
            return "GRANTED"
        if waiting:
            if waiting.wants != wants or not request.wait:
                return "REFUSED"
            waiting.until = max(waiting.until, self.now + wait_s)
            waiting.lease_s = lease_s
            waiting.at, waiting.number = where
            return "WAITING"
        if not self.blocked(wants, self.queue):
            by = Address(owner=owner, reply_to=where[0], correlation_id=where[1])
            self.grant(by, wants, lease_s, self.queue)
            return "GRANTED"
        if not request.wait:
            return "REFUSED"
        self.queue.append(Waiting(owner, wants, self.now, self.now + wait_s, lease_s, *where))
        return "WAITING"

    def keep(self, request: Keep) -> str:
        """Renew, owner by owner, what was asked for from one queue; what is over ends."""
        if len(request.owners) > self.batch:
            return "REFUSED"
        held, lost = [], []
        for owner in dict.fromkeys(request.owners):
            mine = {r: h for r, h in self.of(owner).items() if not request.sole or h.at == request.reply_to}
            over = [resource for resource, one in mine.items() if one.until <= self.now]
            for resource in over:
                del self.held[resource, owner]
            for resource in mine.keys() - over:
                mine[resource].until = max(mine[resource].until, self.now + request.lease_s)
            waiting = self.waiter(owner)
            if mine and not over:
                held.append(owner)
            elif waiting and not mine.keys() - over and (not request.sole or waiting.at == request.reply_to):
                waiting.until = max(waiting.until, self.now + request.wait_lease_s)
            else:
                lost.append(owner)
        self.hand_on()
        return f"KEPT held {held} lost {lost}"

    def renew(self, owner: str, lease_s: float) -> str:
        self.end(owner)
        waiting = self.waiter(owner)
        if waiting:
            waiting.until = max(waiting.until, self.now + lease_s)
            return "WAITING"
        for held in self.of(owner).values():
            held.until = max(held.until, self.now + lease_s)
        return "RENEWED" if self.of(owner) else "LOST"

    def release(self, request: Release) -> str | None:
        for resource, held in self.of(request.owner).items():
            if (not request.resources or resource in request.resources) and self.may_touch(held, request):
                del self.held[resource, request.owner]
        if not request.resources:
            self.queue = [w for w in self.queue if w.owner != request.owner or not self.may_touch(w, request)]
        self.hand_on()
        return None if request.sole else "RELEASED"

    def cancel(self, owner: str) -> str:
        if self.of(owner):
            return "GRANTED"
        self.queue = [waiting for waiting in self.queue if waiting.owner != owner]
        self.hand_on()
        return "CANCELLED"

    def force(self, resource: str) -> str:
        self.held = {key: held for key, held in self.held.items() if key[0] != resource}
        self.hand_on()
        return "RELEASED"

    def expire(self) -> None:
        """Page by page: each page of ended leases is handed on before the next."""
        while True:
            over = sorted((h.until, key) for key, h in self.held.items() if h.until <= self.now)[: self.batch]
            late = sorted((w for w in self.queue if w.until <= self.now), key=lambda w: w.until)[: self.batch]
            for _, key in over:
                del self.held[key]
            for waiting in late:
                self.queue.remove(waiting)
            self.hand_on()
            if self.batch not in (len(over), len(late)):
                return


# --- the machine -----------------------------------------------------------------------------------------


OWNERS = st.sampled_from("abcdef")
RESOURCES = st.sampled_from("wxyz")
EXECUTIONS = st.sampled_from(["e1", "e2"])
DAEMONS = st.sampled_from(["d1", "d2"])
WANTED = st.dictionaries(RESOURCES, st.sampled_from(Mode), min_size=1, max_size=3)
LEASES = st.sampled_from([5.0, 20.0, 60.0])
WHICH = st.integers(0, 5)

_T = TypeVar("_T")


def pick(things: list[_T], which: int) -> list[_T]:
    """One of them, if there is any: a rule with a precondition would be drawn and thrown away too often."""
    return [things[which % len(things)]] if things else []


class LockMachine(RuleBasedStateMachine):
    """Drives the store and the model side by side."""

    def new_store(self, limits: Limits) -> Store:
        """An empty store."""
        raise NotImplementedError

    @initialize(batch=st.sampled_from([1, 2, 3, 256]))
    def begin(self, batch: int) -> None:
        self.model = Naive(batch)
        self.store = self.new_store(Limits(overtakes=OVERTAKES, patience_s=PATIENCE_S, batch=batch))
        self.wire: list[Request] = []
        """Sent, not delivered yet."""
        self.said: list[Request] = []
        """By daemons, in order: the broker may say it again."""
        self.attempts: dict[tuple[str, str], int] = {}
        """Number of the last request, by execution and daemon."""
        self.numbers: dict[str, int] = {}
        self.sent = 0

    def address(self, owner: str) -> Address:
        self.sent += 1
        return Address(owner=owner, reply_to=owner, correlation_id=str(self.sent))

    # --- what owners ask; each request is sent, and mostly delivered at once -------------------------------

    @rule(owner=OWNERS, wants=WANTED, lease_s=LEASES, wait=st.booleans(), late=st.booleans())
    def acquire(self, owner: str, wants: Wanted, lease_s: float, wait: bool, late: bool) -> None:
        weaker = [(resource, Mode.SHARED) for resource in wants] if late else []
        locks = (*weaker, *wants.items())
        self.send(Acquire(**self.address(owner), locks=locks, lease_s=lease_s, wait=wait or late), late)

    @rule(rush=st.lists(st.tuples(OWNERS, WANTED), min_size=1, max_size=6))
    def many_acquire(self, rush: list[tuple[str, Wanted]]) -> None:
        """Queues form only when many ask at once and wait long."""
        for owner, wants in rush:
            self.deliver(Acquire(**self.address(owner), locks=tuple(wants.items()), lease_s=500.0))

    @rule(which=WHICH, mode=st.sampled_from(Mode), times=st.integers(1, OVERTAKES + 1))
    def passes_by(self, which: int, mode: Mode, times: int) -> None:
        """Somebody uses what is free, and waited for, for a moment: this is what makes waiters firm."""
        for resource in pick(self.contended(), which):
            for _ in range(times):
                self.deliver(Acquire(**self.address("p"), locks=((resource, mode),), wait=False))
                self.deliver(Release(**self.address("p")))

    def contended(self) -> list[str]:
        held = {resource for resource, _ in self.model.held}
        return sorted({resource for waiting in self.model.queue for resource in waiting.wants} - held)

    @rule(which=WHICH)
    def answer_was_lost(self, which: int) -> None:
        """Who waits and does not know asks again."""
        for waiting in pick(self.model.queue, which):
            again = tuple(waiting.wants.items())
            self.deliver(Acquire(**self.address(waiting.owner), locks=again, lease_s=60.0))

    @rule(owner=OWNERS, lease_s=LEASES, late=st.booleans())
    def renew(self, owner: str, lease_s: float, late: bool) -> None:
        self.send(Renew(**self.address(owner), lease_s=lease_s), late)

    @rule(owner=OWNERS, late=st.booleans(), resources=st.sets(RESOURCES, max_size=2))
    def release(self, owner: str, late: bool, resources: set[str]) -> None:
        """By anybody: also of nothing, also by who waits."""
        self.send(Release(**self.address(owner), resources=tuple(sorted(resources))), late)

    @rule(which=WHICH)
    def finish(self, which: int) -> None:
        """A holder is done."""
        for _, owner in pick(sorted(self.model.held), which):
            self.deliver(Release(**self.address(owner)))

    @rule(owner=OWNERS, late=st.booleans())
    def cancel(self, owner: str, late: bool) -> None:
        self.send(Cancel(**self.address(owner)), late)

    # --- what daemons ask for their executions; the same execution may be at both of them ------------------

    @rule(execution=EXECUTIONS, daemon=DAEMONS, wants=WANTED, late=st.booleans())
    def an_attempt_begins(self, execution: str, daemon: str, wants: Wanted, late: bool) -> None:
        """It gives up what the last one asked for, and asks anew."""
        self.say(Release(**self.attempt(execution, daemon), sole=True), late)
        self.attempts[execution, daemon] = self.attempts.get((execution, daemon), 0) + 1
        locks = tuple(wants.items())
        asked = self.attempt(execution, daemon)
        self.say(Acquire(**asked, locks=locks, lease_s=20.0, wait_lease_s=60.0, sole=True), late)

    @rule(execution=EXECUTIONS, daemon=DAEMONS, late=st.booleans())
    def an_attempt_ends(self, execution: str, daemon: str, late: bool) -> None:
        self.say(Release(**self.attempt(execution, daemon), sole=True), late)

    @rule(daemon=DAEMONS, owners=st.lists(EXECUTIONS | OWNERS, max_size=4), sole=st.booleans())
    def a_daemon_keeps(self, daemon: str, owners: list[str], sole: bool) -> None:
        """Its own; what it says of others must not matter when it is `sole`."""
        self.sent += 1
        where = {"reply_to": daemon, "correlation_id": f"keep{self.sent}"}
        kept = Keep(owner="", owners=tuple(owners), lease_s=20.0, wait_lease_s=60.0, sole=sole, **where)
        self.deliver(kept)

    @rule(which=st.integers(0, 20))
    def the_broker_repeats(self, which: int) -> None:
        """A daemon's message, however old."""
        for request in pick(self.said, which):
            self.deliver(request)

    def attempt(self, execution: str, daemon: str) -> Address:
        number = self.attempts.get((execution, daemon), 0)
        return Address(owner=execution, reply_to=daemon, correlation_id=f"{execution}#{number:06d}")

    def say(self, request: Request, late: bool) -> None:
        self.said.append(request)
        self.send(request, late)

    @rule(which=WHICH, again=st.booleans())
    def arrives(self, which: int, again: bool) -> None:
        """Out of order, perhaps not for the last time."""
        for request in pick(self.wire, which):
            if not again:
                self.wire.remove(request)
            self.deliver(request)

    # --- what happens to them ------------------------------------------------------------------------------

    @rule(seconds=st.sampled_from([0.0, 1.0, 2.0, 7.0, 30.0]))
    def time_passes(self, seconds: float) -> None:
        self.model.now += seconds

    @rule()
    def leases_end(self) -> None:
        self.deliver(Expire())

    @rule(resource=RESOURCES)
    def operator_intervenes(self, resource: str) -> None:
        self.deliver(ForceRelease(resource=resource, reason="stuck", by="op", correlation_id="forced"))

    # --- one step ------------------------------------------------------------------------------------------

    def send(self, request: Request, late: bool) -> None:
        if late:
            self.wire.append(request)
        else:
            self.deliver(request)

    def deliver(self, request: Request) -> None:
        grants = {(grant.resource, grant.owner): grant for grant in self.store.all_grants}
        before = {waiter.owner: waiter for waiter in self.store.all_waiters}
        replies = self.store.run(request, self.model.now)
        expected = self.expect(request)
        answers = [described(reply) for reply in replies_to(request, replies)]
        assert answers[-1:] == ([] if expected is None else [expected])
        self.check_numbers(grants, before)
        self.check_sole(request, grants, before)
        after = {waiter.owner: waiter for waiter in self.store.all_waiters}
        told = {(reply.reply_to, reply.correlation_id) for reply in replies}
        for owner, waiter in before.items():
            # Nobody is lost: who left the queue was told, where it asked to be, unless it went by itself.
            left = owner not in after or after[owner].ticket != waiter.ticket
            went = isinstance(request, Release) and request.sole and request.owner == owner
            assert not left or went or (waiter.reply_to, waiter.correlation_id) in told
        self.compare()

    def check_numbers(self, grants: dict[tuple[str, str], Grant], before: dict[str, Waiter]) -> None:
        """Fencing numbers rise, and firm waiters are not overtaken."""
        tokens = {key: grant.fencing_token for key, grant in grants.items()}
        new = [g for g in self.store.all_grants if tokens.get((g.resource, g.owner)) != g.fencing_token]
        after = {waiter.owner: waiter for waiter in self.store.all_waiters}
        for grant in new:
            # Fencing numbers rise, also across releases.
            assert grant.fencing_token > self.numbers.get(grant.resource, 0)
            # Who was firm before, and still waits, was not overtaken.
            ticket = before[grant.owner].ticket if grant.owner in before else 2**63
            for owner, waiter in before.items():
                if waiter.firm and owner in after and after[owner].ticket == waiter.ticket < ticket:
                    mode = waiter.mode_of(grant.resource)
                    assert mode is None or not exclude(mode, grant.mode), "a firm waiter was overtaken"
        for grant in new:
            self.numbers[grant.resource] = max(self.numbers.get(grant.resource, 0), grant.fencing_token)

    def check_sole(
        self, request: Request, grants: dict[tuple[str, str], Grant], before: dict[str, Waiter]
    ) -> None:
        """A daemon's message never touches what another daemon, or a newer request, has and nobody lost."""
        if not isinstance(request, Acquire | Release) or not request.sole:
            return
        now = self.model.now
        held = {(grant.resource, grant.owner): grant for grant in self.store.all_grants}
        for key, grant in grants.items():
            if grant.owner == request.owner and grant.lease_until > now and is_foreign(grant, request):
                assert held.get(key) == grant
        waiter = before.get(request.owner)
        if waiter is not None and waiter.wait_until > now and is_foreign(waiter, request):
            waits = {after.ticket: after for after in self.store.all_waiters}
            mine = (grant for grant in held.values() if grant.owner == request.owner)
            assert waiter.ticket in waits or [grant.correlation_id for grant in mine]

    def expect(self, request: Request) -> str | None:
        """Let the model do the same, and say what the answer is; None: there is none."""
        model = self.model
        match request:
            case Acquire():
                wants: Wanted = {}
                for resource, mode in request.locks:
                    wants[resource] = Mode.EXCLUSIVE if "EXCLUSIVE" in (mode, wants.get(resource)) else mode
                return model.acquire(request, wants)
            case Keep():
                return model.keep(request)
            case Renew():
                return model.renew(request.owner, request.lease_s)
            case Release():
                return model.release(request)
            case Cancel():
                return model.cancel(request.owner)
            case ForceRelease():
                return model.force(request.resource)
        assert isinstance(request, Expire)
        model.expire()
        return None

    def compare(self) -> None:
        """The store is what the model says."""
        assert {
            (g.resource, g.owner): Held(g.mode, g.fencing_token, g.lease_until, g.reply_to, g.correlation_id)
            for g in self.store.all_grants
        } == self.model.held
        assert [
            Waiting(
                w.owner,
                dict(w.locks),
                w.asked_at,
                w.wait_until,
                w.lease_s,
                w.reply_to,
                w.correlation_id,
                w.overtaken,
            )
            for w in self.store.all_waiters
        ] == self.model.queue

    # --- what must always hold of the store ----------------------------------------------------------------

    @invariant()
    def no_two_holders_exclude_each_other(self) -> None:
        modes: dict[str, list[Mode]] = {}
        for grant in self.store.all_grants:
            modes.setdefault(grant.resource, []).append(grant.mode)
        assert all(len(held) == 1 or Mode.EXCLUSIVE not in held for held in modes.values())

    @invariant()
    def who_waits_holds_nothing(self) -> None:
        assert not {w.owner for w in self.store.all_waiters} & {g.owner for g in self.store.all_grants}

    @invariant()
    def who_waits_is_blocked_where_it_says(self) -> None:
        """Otherwise a change there would not wake it. It follows that nobody waits for what is free."""
        for index, waiter in enumerate(self.store.all_waiters):
            mode = waiter.mode_of(waiter.blocked_at)
            assert mode is not None
            assert self.model.blocked_at(waiter.blocked_at, mode, self.model.queue[:index]), waiter

    @invariant()
    def who_is_marked_firm_is_firm(self) -> None:
        for waiter, naive in zip(self.store.all_waiters, self.model.queue, strict=True):
            assert not waiter.firm or self.model.firm(naive)
            assert waiter.firm or waiter.overtaken < OVERTAKES

    def teardown(self) -> None:
        """Whatever happened: when the holders release, everybody who waits is granted in the end."""
        if not hasattr(self, "store"):
            return
        for _ in range(len(self.model.queue)):
            for owner in sorted({grant.owner for grant in self.store.all_grants}):
                self.deliver(Release(**self.address(owner)))
        assert self.store.all_waiters == []


def replies_to(request: Request, replies: list[Reply]) -> list[Reply]:
    """The answers to the request itself."""
    mine = getattr(request, "correlation_id", None)
    return [r for r in replies if r.correlation_id == mine and r.status is not Answer.EXPIRED]


def described(reply: Reply) -> str:
    """The status of an answer, with whom it names."""
    if reply.status is Answer.KEPT:
        return f"KEPT held {list(reply.held)} lost {list(reply.lost)}"
    return reply.status.value


def is_foreign(entry: Grant | Waiter, request: Asked) -> bool:
    """Whether an entry of the same owner came from another daemon, or from a later request."""
    return entry.reply_to != request.reply_to or str(entry.correlation_id) > str(request.correlation_id)


DEEP = os.environ.get("HYPOTHESIS_PROFILE") == "ci"


def depth(examples: int, deep: int) -> settings:
    """How many histories are looked at, and how long each is."""
    return settings(
        max_examples=deep if DEEP else examples,
        stateful_step_count=60 if DEEP else 40,
        deadline=None,
        report_multiple_bugs=False,
    )


def marked(case: type[TestCase]) -> type[TestCase]:
    """A machine's test, with the marks it needs."""
    # A failure is made small before it is told, which takes longer than a test may elsewhere. Measuring coverage
    # makes it three times as slow, and tells nothing that the other tests of the locks do not.
    for mark in (pytest.mark.timeout(600), pytest.mark.long, pytest.mark.no_cover):
        case = mark(case)
    return case
