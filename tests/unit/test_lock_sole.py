"""What daemons say to the lock service: for an execution that is at two of them, again, for many at once."""

from __future__ import annotations

import math

import pytest

from jef_daemon.lock.protocol import places
from jef_daemon.lock.requests import Acquire, Answer, Expire, Keep, Limits, Refused, Release, Reply, Request
from jef_daemon.lock.state import Mode
from jef_daemon.testing.locks import MemoryLocks

X = (("x", Mode.EXCLUSIVE),)
XY = (("x", Mode.EXCLUSIVE), ("y", Mode.EXCLUSIVE))
S = (("x", Mode.SHARED),)


class Desk:
    """A lock service in memory, and daemons that speak to it."""

    def __init__(self) -> None:
        self.store = MemoryLocks(Limits(batch=4))
        self.now = 1000.0

    def run(self, request: Request) -> list[Reply]:
        return self.store.run(request, self.now)

    def acquire(
        self,
        owner: str,
        number: int = 1,
        at: str = "d1",
        locks: tuple[tuple[str, Mode], ...] = X,
        lease_s: float = 60.0,
        wait_s: float | None = 600.0,
    ) -> list[str]:
        asked = Acquire(
            owner=owner,
            locks=locks,
            lease_s=lease_s,
            wait_lease_s=wait_s,
            reply_to=at,
            correlation_id=f"{owner}#{number:03d}",
            sole=True,
        )
        return [f"{reply.owner} {reply.status}" for reply in self.run(asked)]

    def release(self, owner: str, number: int = 1, at: str = "d1") -> list[str]:
        over = Release(owner=owner, reply_to=at, correlation_id=f"{owner}#{number:03d}", sole=True)
        return [f"{reply.owner} {reply.status}" for reply in self.run(over)]

    def keep(self, *owners: str, at: str = "d1", lease_s: float = 60.0, wait_s: float = 600.0) -> list[Reply]:
        return self.run(
            Keep(
                owner="",
                owners=owners,
                lease_s=lease_s,
                wait_lease_s=wait_s,
                sole=True,
                reply_to=at,
                correlation_id="k",
            )
        )

    def kept(self, *owners: str, at: str = "d1") -> tuple[list[str], list[str]]:
        answer = self.keep(*owners, at=at)[-1] if len(owners) else self.keep(at=at)[-1]
        return list(answer.held), list(answer.lost)

    @property
    def holders(self) -> list[str]:
        return [f"{g.owner}@{g.reply_to} {g.correlation_id} {g.fencing_token}" for g in self.store.all_grants]

    @property
    def queue(self) -> list[str]:
        return [f"{w.owner}@{w.reply_to} {w.correlation_id}" for w in self.store.all_waiters]


@pytest.fixture
def desk() -> Desk:
    return Desk()


# --- sole --------------------------------------------------------------------------------------------------


def test_an_execution_at_another_daemon_is_somebody_else(desk: Desk) -> None:
    """While the first holds, and while it waits; the refusal says so to machines."""
    assert desk.acquire("1") == ["1 GRANTED"]
    assert desk.acquire("1", at="d2") == ["1 REFUSED"]
    desk.acquire("2")
    assert desk.queue == ["2@d1 2#001"]
    asked = Acquire(owner="2", locks=X, reply_to="d2", correlation_id="2#009", sole=True)
    [refused] = desk.run(asked)
    assert (refused.status, refused.code, refused.reply_to) == (Answer.REFUSED, Refused.ELSEWHERE, "d2")
    assert "d1" in refused.reason
    assert desk.holders == ["1@d1 1#001 1"]
    assert desk.queue == ["2@d1 2#001"]
    desk.release("1")
    desk.release("2")
    assert desk.acquire("1", at="d2") == ["1 GRANTED"]


def test_a_lease_that_is_over_is_nobodys(desk: Desk) -> None:
    """A daemon that died does not keep its execution from the next for ever."""
    desk.acquire("1")
    desk.now += 60
    assert desk.acquire("1", at="d2") == ["1 EXPIRED", "1 GRANTED"]


def test_a_release_never_touches_another_daemons(desk: Desk) -> None:
    desk.acquire("1")
    desk.acquire("2")
    assert desk.release("1", 9, at="d2") == []
    assert desk.release("2", 9, at="d2") == []
    assert (desk.holders, desk.queue) == (["1@d1 1#001 1"], ["2@d1 2#001"])


def test_a_release_that_comes_again_does_not_undo_a_newer_request(desk: Desk) -> None:
    """Neither its grant nor its place in the queue."""
    desk.acquire("1", 1)
    desk.release("1", 1)
    desk.acquire("1", 2)
    assert desk.release("1", 1) == []
    assert desk.holders == ["1@d1 1#002 2"]
    desk.acquire("2", 2)
    assert desk.release("2", 1) == []
    assert desk.queue == ["2@d1 2#002"]
    assert desk.release("1", 2) == ["2 GRANTED"]


def test_a_release_has_no_answer_but_hands_on(desk: Desk) -> None:
    """Its sender keeps no account of it; who waited is told."""
    desk.acquire("1")
    desk.acquire("2")
    assert desk.release("1") == ["2 GRANTED"]
    assert desk.release("1") == []
    assert desk.release("2") == []
    assert desk.store.all_grants == []


def test_an_old_request_that_comes_again_changes_nothing_and_is_not_answered(desk: Desk) -> None:
    """Neither while the newer one holds nor while it waits."""
    desk.acquire("1", 2)
    assert desk.acquire("1", 1, locks=XY) == []
    desk.acquire("2", 2)
    assert desk.acquire("2", 1) == []
    assert (desk.holders, desk.queue) == (["1@d1 1#002 1"], ["2@d1 2#002"])


def test_the_same_request_again_has_the_same_answer(desk: Desk) -> None:
    desk.acquire("1")
    desk.acquire("2")
    assert desk.acquire("1") == ["1 GRANTED"]
    assert desk.acquire("2") == ["2 WAITING"]
    assert desk.holders == ["1@d1 1#001 1"]


def test_the_place_in_the_queue_has_its_own_lease(desk: Desk) -> None:
    """And the grant that comes of it the other."""
    desk.acquire("1", lease_s=700.0)
    desk.acquire("2", lease_s=10.0, wait_s=500.0)
    desk.acquire("3", wait_s=None)
    assert [waiter.wait_until - desk.now for waiter in desk.store.all_waiters] == [500.0, 60.0]
    desk.now += 499
    assert desk.release("1") == ["2 GRANTED"]
    assert [grant.lease_until - desk.now for grant in desk.store.all_grants] == [10.0]


@pytest.mark.parametrize("wait_s", [0.5, 1e9, math.nan])
def test_a_lease_of_waiting_beyond_the_limits_is_refused(desk: Desk, wait_s: float) -> None:
    assert desk.acquire("1", wait_s=wait_s) == ["1 REFUSED"]


# --- keep --------------------------------------------------------------------------------------------------


def test_what_is_held_lost_and_waited_for_is_told_apart(desk: Desk) -> None:
    desk.acquire("1")
    desk.acquire("2")
    assert desk.kept("1", "2", "3") == (["1"], ["3"])


def test_both_leases_are_renewed_and_never_shortened(desk: Desk) -> None:
    desk.acquire("1", lease_s=60.0)
    desk.acquire("2", wait_s=600.0)
    desk.now += 30
    desk.keep("1", "2", lease_s=60.0, wait_s=600.0)
    assert [grant.lease_until - desk.now for grant in desk.store.all_grants] == [60.0]
    assert [waiter.wait_until - desk.now for waiter in desk.store.all_waiters] == [600.0]
    desk.keep("1", "2", lease_s=5.0, wait_s=5.0)
    assert [grant.lease_until - desk.now for grant in desk.store.all_grants] == [60.0]
    assert [waiter.wait_until - desk.now for waiter in desk.store.all_waiters] == [600.0]
    assert (desk.holders, desk.queue) == (["1@d1 1#001 1"], ["2@d1 2#001"]), "the addresses stay"


def test_only_what_was_asked_for_from_the_same_queue_is_kept(desk: Desk) -> None:
    """To another daemon it is lost, and nothing of it is renewed."""
    desk.acquire("1")
    desk.acquire("2")
    before = desk.store.all_grants, desk.store.all_waiters
    desk.now += 10
    assert desk.kept("1", "2", at="d2") == ([], ["1", "2"])
    assert (desk.store.all_grants, desk.store.all_waiters) == before


def test_what_is_over_is_told_handed_on_and_lost(desk: Desk) -> None:
    """Noticed or not; by the renewal itself when it is the first to look."""
    desk.acquire("1")
    desk.acquire("2")
    desk.now += 60
    told = desk.keep("1", "2")
    assert [f"{reply.owner} {reply.status}" for reply in told] == ["1 EXPIRED", " KEPT", "2 GRANTED"]
    assert (told[1].held, told[1].lost) == ((), ("1",))
    assert desk.holders == ["2@d1 2#001 2"]


def test_who_speaks_in_time_or_not_keeps_its_place(desk: Desk) -> None:
    """A place whose lease is over but that nobody has taken away yet: its daemon is not dead."""
    desk.acquire("1", lease_s=900.0)
    desk.acquire("2", wait_s=100.0)
    desk.now += 100
    assert desk.kept("2") == ([], [])
    assert desk.run(Expire()) == []
    desk.now += 600
    assert [reply.status for reply in desk.run(Expire())] == [Answer.EXPIRED]
    assert desk.kept("2") == ([], ["2"])


def test_an_owner_named_twice_is_kept_once(desk: Desk) -> None:
    desk.acquire("1")
    assert desk.kept("1", "1") == (["1"], [])


def test_nobody_is_a_question_whether_the_service_is_there(desk: Desk) -> None:
    assert desk.kept() == ([], [])


def test_more_than_the_limit_are_refused_and_nothing_is_renewed(desk: Desk) -> None:
    """The sentence names the limit."""
    desk.acquire("1")
    desk.now += 10
    before = desk.store.all_grants
    [refused] = desk.keep("1", "2", "3", "4", "5")
    assert (refused.status, refused.code) == (Answer.REFUSED, Refused.LIMIT)
    assert "4" in refused.reason
    assert desk.store.all_grants == before
    assert desk.kept("1", "2", "3", "4") == (["1"], ["2", "3", "4"])


@pytest.mark.parametrize(("lease_s", "wait_s"), [(0.5, 60.0), (60.0, 1e9), (math.nan, 60.0)])
def test_leases_beyond_the_limits_are_refused(desk: Desk, lease_s: float, wait_s: float) -> None:
    desk.acquire("1")
    [refused] = desk.keep("1", lease_s=lease_s, wait_s=wait_s)
    assert (refused.status, refused.code) == (Answer.REFUSED, Refused.LIMIT)


# --- places ------------------------------------------------------------------------------------------------


def told_places(desk: Desk, resource: str, most: int = 9) -> list[tuple[str, int, tuple[str, ...]]]:
    found = []
    for reply in places(desk.store, resource, most):
        assert reply.status is Answer.WAITING
        assert reply.place is not None
        assert reply.place.resource == resource
        found.append((reply.owner, reply.place.position, reply.place.holders))
    return found


def test_the_first_of_a_queue_are_told_where_they_stand(desk: Desk) -> None:
    """No more than asked for; as the queue moves, so do they."""
    for owner in "1234":
        desk.acquire(owner)
    assert told_places(desk, "x") == [("2", 1, ("1",)), ("3", 2, ("1",)), ("4", 3, ("1",))]
    assert told_places(desk, "x", 2) == [("2", 1, ("1",)), ("3", 2, ("1",))]
    desk.release("1")
    assert told_places(desk, "x") == [("3", 1, ("2",)), ("4", 2, ("2",))]


def test_only_those_that_wait_there_are_told_but_all_are_counted(desk: Desk) -> None:
    """Who waits for another of its resources would hear of two places in turn."""
    desk.acquire("1", locks=(("w", Mode.EXCLUSIVE),))
    desk.acquire("2", locks=X)
    desk.acquire("3", locks=(("w", Mode.EXCLUSIVE), ("x", Mode.EXCLUSIVE)))
    desk.acquire("4", locks=X)
    assert told_places(desk, "x") == [("4", 2, ("2",))]
    assert told_places(desk, "w") == [("3", 1, ("1",))]


def test_at_most_ten_holders_are_named(desk: Desk) -> None:
    for number in range(12):
        desk.acquire(f"h{number:02d}", locks=S)
    desk.acquire("1")
    [(_, _, holders)] = told_places(desk, "x")
    assert holders == tuple(f"h{number:02d}" for number in range(10))


def test_a_place_is_told_to_the_address_of_the_request(desk: Desk) -> None:
    desk.acquire("1")
    desk.acquire("2", 5, at="d2")
    [reply] = places(desk.store, "x", 9)
    assert (reply.reply_to, reply.correlation_id) == ("d2", "2#005")


def test_nobody_waits_for_what_nobody_wants(desk: Desk) -> None:
    desk.acquire("1")
    assert places(desk.store, "x", 9) == places(desk.store, "nothing", 9) == []
