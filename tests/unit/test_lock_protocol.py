"""The lock protocol, rule by rule. Random histories are in `test_lock_machine`."""

from __future__ import annotations

import ast
import dataclasses
import math
import sys
from pathlib import Path
from typing import TypedDict

import pytest

import jef_daemon.lock
from jef_daemon.lock.acquiring import normalised
from jef_daemon.lock.requests import (
    Acquire,
    Answer,
    Cancel,
    Expire,
    ForceRelease,
    Inspect,
    Limits,
    Release,
    Renew,
    Reply,
    Request,
)
from jef_daemon.lock.state import Locks, Mode
from jef_daemon.testing.locks import MemoryLocks

LIMITS = Limits(overtakes=2, patience_s=600.0)


def locks(text: str) -> Locks:
    """`x` is SHARED, `x!` EXCLUSIVE; several are separated by spaces."""
    return tuple(
        (name.rstrip("!"), Mode.EXCLUSIVE if name.endswith("!") else Mode.SHARED) for name in text.split()
    )


def names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


class Address(TypedDict):
    """Who asks, and where the answer goes."""

    owner: str
    reply_to: str
    correlation_id: str


class Desk:
    """A lock service in memory and a clock, driven by sentences."""

    def __init__(self, limits: Limits = LIMITS) -> None:
        self.store = MemoryLocks(limits)
        self.now = 1000.0

    def say(self, sentence: str) -> list[Reply]:
        """`OWNER VERB ARGUMENTS`, or `time N` (passes, unnoticed), or `tick N` (passes, leases end)."""
        owner, verb, *rest = sentence.split(maxsplit=2)
        if owner in ("time", "tick"):
            self.now += float(verb)
            return self.run(Expire()) if owner == "tick" else []
        return self.run(self.request(owner, verb, rest[0] if rest else ""))

    def request(self, owner: str, verb: str, text: str) -> Request:
        asked = Address(owner=owner, reply_to=f"to-{owner}", correlation_id=verb)
        match verb:
            case "asks":
                return Acquire(**asked, locks=locks(text))
            case "tries":
                return Acquire(**asked, locks=locks(text), wait=False)
            case "renews":
                return Renew(**asked, resources=names(text))
            case "releases":
                return Release(**asked, resources=names(text))
            case "cancels":
                return Cancel(**asked)
            case "takes-away":
                return ForceRelease(resource=text, reason="stuck", by=owner)
        raise ValueError(verb)

    def run(self, request: Request) -> list[Reply]:
        return self.store.run(request, self.now)

    def told(self, sentence: str) -> list[str]:
        return [f"{reply.owner} {reply.status}" for reply in self.say(sentence)]

    @property
    def held(self) -> dict[str, int]:
        """`owner resource` → fencing number."""
        return {f"{g.owner} {g.resource}": g.fencing_token for g in self.store.all_grants}

    @property
    def queue(self) -> list[str]:
        return [waiter.owner for waiter in self.store.all_waiters]


STORIES = {
    "many SHARED hold a resource together": """
        a asks x        > a GRANTED
        b asks x        > b GRANTED""",
    "one EXCLUSIVE holds it alone": """
        a asks x!       > a GRANTED
        b asks x!       > b WAITING
        c asks x        > c WAITING""",
    "EXCLUSIVE waits for SHARED": """
        a asks x        > a GRANTED
        b asks x!       > b WAITING
        a releases      > a RELEASED, b GRANTED""",
    "a released resource goes to the first in the queue": """
        a asks x!       > a GRANTED
        b asks x!       > b WAITING
        c asks x!       > c WAITING
        a releases      > a RELEASED, b GRANTED
        b releases      > b RELEASED, c GRANTED""",
    "a SHARED that comes later does not overtake a waiting EXCLUSIVE": """
        a asks x        > a GRANTED
        b asks x!       > b WAITING
        c asks x        > c WAITING
        a releases      > a RELEASED, b GRANTED
        b releases      > b RELEASED, c GRANTED""",
    "neighbouring SHAREDs are granted together, up to the next EXCLUSIVE": """
        a asks x!       > a GRANTED
        b asks x        > b WAITING
        c asks x        > c WAITING
        d asks x!       > d WAITING
        e asks x        > e WAITING
        a releases      > a RELEASED, b GRANTED, c GRANTED
        b releases      > b RELEASED
        c releases      > c RELEASED, d GRANTED
        d releases      > d RELEASED, e GRANTED""",
    "several resources are granted together or not at all": """
        a asks x!       > a GRANTED
        b asks x! y!    > b WAITING
        c asks y!       > c GRANTED
        a releases      > a RELEASED
        c releases      > c RELEASED, b GRANTED""",
    "a request that waits for one resource does not hold its free ones": """
        a asks x!       > a GRANTED
        b asks x! y!    > b WAITING
        c tries y!      > c GRANTED""",
    "who uses a resource that is free meanwhile is not joined by others": """
        a asks x!       > a GRANTED
        b asks x! y!    > b WAITING
        c asks y        > c GRANTED
        d asks y        > d WAITING""",
    "a request may be refused rather than wait": """
        a asks x!       > a GRANTED
        b tries x!      > b REFUSED
        a releases      > a RELEASED""",
    "asking again tells the present answer again": """
        a asks x! y     > a GRANTED
        a asks y x!     > a GRANTED
        b asks x!       > b WAITING
        b asks x!       > b WAITING
        a releases      > a RELEASED, b GRANTED
        b asks x!       > b GRANTED""",
    "less than what is held is granted again": """
        a asks x! y     > a GRANTED
        a asks x        > a GRANTED""",
    "SHARED is not upgraded while it is held": """
        a asks x        > a GRANTED
        a asks x!       > a REFUSED
        a tries x!      > a REFUSED""",
    "no more resources while some are held, even free ones": """
        a asks x        > a GRANTED
        a asks x y      > a REFUSED
        a asks y        > a REFUSED""",
    "who waits cannot ask for other locks": """
        a asks x!       > a GRANTED
        b asks x!       > b WAITING
        b asks y!       > b REFUSED
        b tries x!      > b REFUSED
        a releases      > a RELEASED, b GRANTED""",
    "a release of nothing is a release": """
        a releases      > a RELEASED
        a releases x    > a RELEASED""",
    "named resources are released alone": """
        a asks x! y!    > a GRANTED
        b asks y!       > b WAITING
        c asks x!       > c WAITING
        a releases y z  > a RELEASED, b GRANTED
        a releases      > a RELEASED, c GRANTED""",
    "one release hands on to several, in the order of tickets": """
        a asks x! y!    > a GRANTED
        b asks y!       > b WAITING
        c asks x!       > c WAITING
        d asks y! z!    > d WAITING
        a releases      > a RELEASED, b GRANTED, c GRANTED
        b releases      > b RELEASED, d GRANTED""",
    "the earlier ticket is served first, whichever resource is freed": """
        a asks x! y!    > a GRANTED
        b asks y! s!    > b WAITING
        c asks s! x!    > c WAITING
        a releases      > a RELEASED, b GRANTED
        b releases      > b RELEASED, c GRANTED""",
    "who releases everything leaves the queue too": """
        a asks x!       > a GRANTED
        b asks x!       > b WAITING
        b releases      > b CANCELLED, b RELEASED
        a releases      > a RELEASED""",
    "a cancel leaves the queue, and those behind come forward": """
        a asks x        > a GRANTED
        b asks x!       > b WAITING
        c asks x        > c WAITING
        d asks x        > d WAITING
        b cancels       > b CANCELLED, b CANCELLED, c GRANTED, d GRANTED
        b cancels       > b CANCELLED""",
    "a cancel that crossed its grant is told so": """
        a asks x!       > a GRANTED
        a cancels       > a GRANTED
        b tries x!      > b REFUSED""",
    "a lease that ends is told, and hands the resource on": """
        a asks x!       > a GRANTED
        b asks x!       > b WAITING
        tick 59         >
        b renews        > b WAITING
        tick 1          > a EXPIRED, b GRANTED
        a renews        > a LOST""",
    "a renewed lease lives on": """
        a asks x!       > a GRANTED
        time 50         >
        a renews        > a RENEWED
        tick 59         >
        tick 1          > a EXPIRED""",
    "a lease that is over cannot be renewed, noticed or not": """
        a asks x!       > a GRANTED
        b asks x!       > b WAITING
        time 59         >
        b renews        > b WAITING
        time 1          >
        a renews        > a EXPIRED, b GRANTED, a LOST""",
    "who asks again after its lease is over comes behind those who waited": """
        a asks x!       > a GRANTED
        time 30         >
        b asks x!       > b WAITING
        time 30         >
        a asks x!       > a EXPIRED, b GRANTED, a WAITING""",
    "a renewal names what is lost and keeps the rest": """
        a asks x y      > a GRANTED
        time 30         >
        a renews x      > a RENEWED
        time 30         >
        a renews        > a EXPIRED, a RENEWED
        a renews x y    > a LOST
        a renews z      > a LOST""",
    "nobody renews what it never held": """
        a renews        > a LOST""",
    "a place in the queue has a lease as well": """
        a asks x!       > a GRANTED
        b asks x!       > b WAITING
        time 30         >
        a renews        > a RENEWED
        c asks x        > c WAITING
        tick 30         > b EXPIRED
        a releases      > a RELEASED, c GRANTED""",
    "a place that is lost is not kept by asking again": """
        a asks x!       > a GRANTED
        time 30         >
        a renews        > a RENEWED
        b asks x!       > b WAITING
        time 30         >
        c asks x!       > c WAITING
        a renews        > a RENEWED
        time 30         >
        b asks x!       > b EXPIRED, b WAITING
        a releases      > a RELEASED, c GRANTED""",
    "an operator takes a resource away from all": """
        a asks x y      > a GRANTED
        b asks x        > b GRANTED
        c asks x!       > c WAITING
        op takes-away x > a REVOKED, b REVOKED, op RELEASED, c GRANTED
        a renews        > a RENEWED
        a renews x      > a LOST
        op takes-away z > op RELEASED""",
    "who is overtaken too often becomes firm and keeps its place": """
        a asks x!       > a GRANTED
        b asks x! y!    > b WAITING
        c asks y!       > c GRANTED
        c releases      > c RELEASED
        c asks y!       > c GRANTED
        c releases      > c RELEASED
        c asks y!       > c WAITING
        a releases      > a RELEASED, b GRANTED
        b releases      > b RELEASED, c GRANTED""",
    "a grant out of the queue overtakes as well": """
        a asks x!       > a GRANTED
        c asks y!       > c GRANTED
        b asks x! y!    > b WAITING
        d asks y!       > d WAITING
        e asks y!       > e WAITING
        f asks y!       > f WAITING
        c releases      > c RELEASED, d GRANTED
        d releases      > d RELEASED, e GRANTED
        e releases      > e RELEASED
        a releases      > a RELEASED, b GRANTED""",
    "all that is over ends": """
        a asks x!       > a GRANTED
        b asks y!       > b GRANTED
        c asks z!       > c GRANTED
        tick 60         > a EXPIRED, b EXPIRED, c EXPIRED""",
    "who leaves does not keep others out": """
        a asks x!       > a GRANTED
        b asks x! y!    > b WAITING
        c asks y!       > c GRANTED
        c releases      > c RELEASED
        c asks y!       > c GRANTED
        c releases      > c RELEASED
        c asks y!       > c WAITING
        b cancels       > b CANCELLED, b CANCELLED, c GRANTED""",
    "a firm waiter is not overtaken behind one that is not firm either": """
        a asks q! z!    > a GRANTED
        b asks x! z!    > b WAITING
        c asks q! x! y! > c WAITING
        d asks y!       > d GRANTED
        d releases      > d RELEASED
        d asks y!       > d GRANTED
        d releases      > d RELEASED
        e tries x!      > e REFUSED""",
    "a firm SHARED lets SHARED pass": """
        a asks x!       > a GRANTED
        b asks x! y     > b WAITING
        c asks y!       > c GRANTED
        c releases      > c RELEASED
        c asks y!       > c GRANTED
        c releases      > c RELEASED
        d tries y!      > d REFUSED
        d tries y       > d GRANTED""",
    "who is freed at one resource waits at the next": """
        a asks x!       > a GRANTED
        b asks y!       > b GRANTED
        c asks x! y!    > c WAITING
        a releases      > a RELEASED
        d asks x!       > d GRANTED
        b releases      > b RELEASED
        d releases      > d RELEASED, c GRANTED""",
    "who goes on to wait elsewhere does not keep those behind it": """
        a asks x!       > a GRANTED
        b asks y!       > b GRANTED
        c asks x! y!    > c WAITING
        d asks x!       > d WAITING
        a releases      > a RELEASED, d GRANTED
        b releases      > b RELEASED
        d releases      > d RELEASED, c GRANTED""",
}


@pytest.mark.parametrize("batch", [1, 2, 256])
@pytest.mark.parametrize("title", STORIES)
def test_story(title: str, batch: int) -> None:
    """The title is the fact; it does not depend on how much one decision may do."""
    desk = Desk(dataclasses.replace(LIMITS, batch=batch))
    for line in STORIES[title].strip().splitlines():
        sentence, _, expected = (part.strip() for part in line.partition(">"))
        assert desk.told(sentence) == [part.strip() for part in expected.split(",") if part], sentence


def test_who_waited_too_long_becomes_firm() -> None:
    """Up to `patience_s` a free resource may be used past a waiter; then it is kept for it."""
    desk = Desk(Limits(patience_s=40.0))
    for sentence in ("a asks x!", "b asks x! y!", "d asks x! y!", "time 39", "c tries y!", "c releases"):
        desk.say(sentence)
    desk.say("time 1")
    assert desk.told("c tries y!") == ["c REFUSED"]
    assert [waiter.firm for waiter in desk.store.all_waiters] == [True, False], "marked when it matters"


def test_a_request_takes_the_stronger_of_two_modes() -> None:
    """One resource named twice, in whatever order, is one lock."""
    both = locks("x y x! y")
    assert normalised(both) == normalised(both[::-1]) == locks("x! y")


def test_asking_again_renews_the_lease_and_keeps_the_numbers() -> None:
    """The same tokens, a later end, and losses are told to the new address."""
    desk = Desk()
    (first,) = desk.say("a asks x! y")
    desk.say("time 30")
    again = Acquire(owner="a", reply_to="elsewhere", correlation_id="2", locks=locks("x! y"), lease_s=60)
    (second,) = desk.run(again)
    assert [g.fencing_token for g in second.grants] == [g.fencing_token for g in first.grants]
    assert [g.lease_until for g in second.grants] == [desk.now + 60] * 2
    (told,) = desk.say("tick 60")
    assert (told.reply_to, told.correlation_id, told.lost) == ("elsewhere", "2", ("x", "y"))


def test_asking_again_while_waiting_moves_the_answer() -> None:
    """A requester that restarted is told where it is now, and waits no less long."""
    desk = Desk()
    for sentence in ("a asks x!", "b asks x!", "c asks x!", "time 30", "a renews"):
        desk.say(sentence)
    again = Acquire(owner="c", reply_to="elsewhere", correlation_id="2", locks=locks("x!"))
    (told,) = desk.run(again)
    assert told.place is not None
    assert (told.place.position, told.reply_to) == (2, "elsewhere")
    assert desk.store.all_waiters[1].wait_until == desk.now + 60
    assert desk.queue == ["b", "c"]
    desk.say("b cancels")
    granted = desk.say("a releases")[-1]
    assert (granted.status, granted.reply_to, granted.correlation_id) == (Answer.GRANTED, "elsewhere", "2")


def test_a_waiter_is_told_for_what_it_waits() -> None:
    """The first of its resources that cannot be had, its position there, at most ten holders."""
    desk = Desk()
    for number in range(12):
        desk.say(f"h{number} asks y")
    desk.say("w asks y!")
    (told,) = desk.say("v asks a! y! z!")
    assert told.place is not None
    assert (told.place.resource, told.place.mode, told.place.position) == ("y", Mode.EXCLUSIVE, 2)
    assert told.place.holders == tuple(f"h{number}" for number in range(10))


def test_fencing_numbers_only_rise() -> None:
    """Per resource, also after everything was released, in either mode."""
    desk = Desk()
    seen = []
    for owner, wanted in (("a", "x!"), ("b", "x"), ("c", "x! y"), ("d", "x")):
        desk.say(f"{owner} asks {wanted}")
        seen.append(desk.held[f"{owner} x"])
        desk.say(f"{owner} releases")
    assert seen == [1, 2, 3, 4]


def test_two_granted_together_have_different_numbers() -> None:
    """SHARED holders too: a store can tell an older from a newer one."""
    desk = Desk()
    for sentence in ("a asks x!", "b asks x", "c asks x", "a releases"):
        desk.say(sentence)
    assert desk.held == {"b x": 2, "c x": 3}


def test_a_waiter_s_lease_begins_when_it_is_granted() -> None:
    """Waiting uses nothing up."""
    desk = Desk()
    for sentence in ("a asks x!", "b asks x!", "time 50", "a releases"):
        desk.say(sentence)
    (grant,) = desk.store.all_grants
    assert (grant.granted_at, grant.lease_until) == (desk.now, desk.now + 60)


def test_a_clock_that_goes_back_does_no_harm() -> None:
    """No lease is shortened by a renewal, nothing ended lives again, nobody is let past a firm waiter."""
    desk = Desk(Limits(patience_s=40.0, overtakes=99))
    for sentence in ("a asks x!", "b asks x! y!", "time 40", "c tries y!", "a renews", "b renews"):
        desk.say(sentence)
    desk.say("time -1000")
    (renewed,) = desk.say("a renews")
    assert renewed.grants[0].lease_until == 1100.0
    desk.say("b renews")
    assert desk.store.all_waiters[0].wait_until == 1100.0
    assert desk.told("c tries y!") == ["c REFUSED"]
    assert desk.told("tick 0") == []
    desk.say("time 1060")
    assert desk.told("tick 0") == ["a EXPIRED", "b EXPIRED"]
    desk.say("time -1000")
    assert desk.told("a renews") == ["a LOST"]


@pytest.mark.parametrize("reason", ["", "  \n"])
def test_a_forced_release_needs_a_reason(reason: str) -> None:
    """Without one nothing happens."""
    desk = Desk()
    desk.say("a asks x!")
    (told,) = desk.run(ForceRelease(resource="x", reason=reason, by="op"))
    assert told.status is Answer.REFUSED
    assert desk.held == {"a x": 1}


def test_a_forced_release_tells_the_holder_who_and_why() -> None:
    """Only the owner that is named loses it; both the holder and the operator are told."""
    desk = Desk()
    for sentence in ("a asks x", "b asks x"):
        desk.say(sentence)
    to_holder, to_operator = desk.run(ForceRelease(resource="x", owner="b", reason="it hangs", by="op"))
    assert (to_holder.owner, to_holder.reply_to, to_holder.lost) == ("b", "to-b", ("x",))
    assert "op" in to_holder.reason
    assert "it hangs" in to_holder.reason
    assert to_operator.owner == "op"
    assert desk.held == {"a x": 1}


SMALL = Limits(locks_per_request=2, name_length=5, waiters_per_resource=1, lease_min_s=1, lease_max_s=10)
GOOD = Acquire(owner="b", locks=locks("x!"), lease_s=10)


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (dataclasses.replace(GOOD, locks=()), "no resource"),
        (dataclasses.replace(GOOD, locks=locks("x y z")), "limit is 2"),
        (dataclasses.replace(GOOD, locks=locks("abcdef")), "limit is 5"),
        (dataclasses.replace(GOOD, owner="abcdef"), "limit is 5"),
        (dataclasses.replace(GOOD, owner=""), "empty"),
        (dataclasses.replace(GOOD, locks=(("", Mode.SHARED),)), "empty"),
        (dataclasses.replace(GOOD, lease_s=0.5), "from 1 to 10"),
        (dataclasses.replace(GOOD, lease_s=math.nan), "from 1 to 10"),
        (dataclasses.replace(GOOD, wait_lease_s=11.0), "from 1 to 10"),
        (dataclasses.replace(GOOD, owner="c"), "1 wait already"),
        (Renew(owner="a", lease_s=11), "from 1 to 10"),
    ],
)
def test_a_refusal_names_the_limit(request_: Request, said: str) -> None:
    """And changes nothing."""
    store = MemoryLocks(SMALL)
    store.run(Acquire(owner="a", locks=locks("x!"), lease_s=10), 0.0)
    store.run(Acquire(owner="w", locks=locks("x!"), lease_s=10), 0.0)
    decision = store.step(request_, 0.0)
    assert [reply.status for reply in decision.replies] == [Answer.REFUSED]
    assert said in decision.replies[0].reason
    assert decision.changes == ()


def test_inspect_tells_holders_and_waiters() -> None:
    """Of the named resources, or of all in use, page by page."""
    desk = Desk(dataclasses.replace(LIMITS, page=2))
    for sentence in ("a asks x! y!", "b asks x!", "c asks z", "c releases", "d asks v"):
        desk.say(sentence)
    (told,) = desk.run(Inspect(owner="op", resources=("x", "z")))
    x, z = told.states
    assert [grant.owner for grant in x.holders] == ["a"]
    assert ([waiter.owner for waiter in x.waiters], x.waiting) == (["b"], 1)
    assert (z.fence, z.holders, z.waiting) == (1, (), 0)
    (told,) = desk.run(Inspect(owner="op"))
    assert [state.resource for state in told.states] == ["v", "x"]
    (told,) = desk.run(Inspect(owner="op", after="x"))
    assert [state.resource for state in told.states] == ["y"]


@pytest.mark.parametrize("waiting", [10, 1000])
def test_a_hand_over_reads_no_more_when_more_wait(waiting: int) -> None:
    """The cost of an operation does not depend on the queue's length, nor on what else is held."""
    desk = Desk()
    for number in range(waiting):
        desk.say(f"other{number} asks r{number}")
        desk.say(f"w{number} asks x! y")
    before = desk.store.rows_read
    for sentence in ("w0 releases", "w1 releases", "z asks x", "z cancels", "y asks q", "y releases"):
        desk.say(sentence)
    assert desk.store.rows_read - before < 130


def test_many_shared_are_granted_in_small_decisions() -> None:
    """A release that lets 1,000 start is many decisions of one transaction, each of bounded size."""
    desk = Desk(dataclasses.replace(LIMITS, batch=100))
    desk.say("a asks x!")
    for number in range(1000):
        desk.say(f"w{number} asks x")
    before = desk.store.decisions
    assert desk.told("a releases") == ["a RELEASED"] + [f"w{number} GRANTED" for number in range(1000)]
    assert desk.store.decisions - before == 10


def test_the_protocol_is_pure() -> None:
    """It imports nothing but itself and pure parts of the standard library, and never awaits."""
    pure = {"__future__", "collections.abc", "dataclasses", "enum", "heapq", "typing"}
    for name in ("state", "requests", "draft", "protocol"):
        source = (Path(jef_daemon.lock.__file__).parent / f"{name}.py").read_text()
        for node in ast.walk(ast.parse(source)):
            assert not isinstance(node, ast.Await | ast.AsyncFunctionDef)
            if isinstance(node, ast.ImportFrom):
                assert node.module in pure or str(node.module).startswith("jef_daemon.lock."), node.module
            if isinstance(node, ast.Import):
                assert {alias.name for alias in node.names} <= pure & sys.stdlib_module_names
