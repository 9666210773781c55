"""What every lock store promises (`lock.state`): the one in memory, and the database of the lock service."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis.stateful import invariant
from sqlalchemy import Engine, event, func, select

from jef_daemon.ledger import SqlLedger, schema
from jef_daemon.ledger.lock_store import LockStore
from jef_daemon.ledger.opening import migrate, open_engine
from jef_daemon.lock.requests import (
    Acquire,
    Answer,
    Cancel,
    Expire,
    ForceRelease,
    Inspect,
    Keep,
    Limits,
    Release,
    Renew,
    Request,
)
from jef_daemon.lock.state import Among, LockView, Mode
from jef_daemon.testing.locks import MemoryLocks
from tests.support.lock_machine import LockMachine, Store, depth, marked
from tests.support.stored_locks import StoredLocks, fresh

NOW = 1000.0
LIMITS = Limits(overtakes=2, patience_s=600.0, batch=4)
S, X = Mode.SHARED, Mode.EXCLUSIVE


# --- random histories --------------------------------------------------------------------------------------


class StoredMachine(LockMachine):
    """Over the database; each history is rolled back at its end."""

    engine: Engine

    def new_store(self, limits: Limits) -> Store:
        self.connection = self.engine.connect()
        self.transaction = self.connection.begin()
        return StoredLocks(self.connection, limits)

    @invariant()
    def the_wants_are_those_of_the_waiters(self) -> None:
        """The index that is read by, and the counters, say what the waiters say."""
        wants = {
            (resource, waiter.ticket, mode.value, waiter.firm, waiter.blocked_at == resource)
            for waiter in self.store.all_waiters
            for resource, mode in waiter.locks
        }
        assert {tuple(row) for row in self.connection.execute(select(schema.lock_wants))} == wants
        counts = dict[str, int]()
        for resource, *_ in wants:
            counts[resource] = counts.get(resource, 0) + 1
        for row in self.connection.execute(select(schema.lock_resources)):
            assert row.waiting == counts.pop(row.resource, 0)
            assert row.fence == self.model.numbers.get(row.resource, 0)
        assert counts == {}

    def teardown(self) -> None:
        super().teardown()
        if hasattr(self, "transaction"):
            self.transaction.rollback()
            self.connection.close()


StoredMachine.TestCase.settings = depth(25, 150)


@pytest.fixture(scope="module")
def history_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One database for all histories."""
    StoredMachine.engine = open_engine(fresh(tmp_path_factory.mktemp("histories") / "ledger.db"))
    yield
    StoredMachine.engine.dispose()


TestHistories = pytest.mark.usefixtures("history_engine")(marked(StoredMachine.TestCase))


# --- each read, on both ------------------------------------------------------------------------------------


@contextmanager
def in_memory(folder: Path) -> Iterator[Desk]:
    yield Desk(MemoryLocks(LIMITS))


@contextmanager
def in_database(folder: Path) -> Iterator[Desk]:
    engine = open_engine(fresh(folder / "ledger.db"))
    with engine.begin() as connection:
        yield Desk(StoredLocks(connection, LIMITS))
    engine.dispose()


class Desk:
    """A store and a way to talk to it in few words."""

    def __init__(self, store: MemoryLocks | StoredLocks) -> None:
        self.store = store
        self.now = NOW

    @property
    def view(self) -> LockView:
        """Its reads, now."""
        return self.store if isinstance(self.store, MemoryLocks) else self.store.at(self.now)

    def asks(self, owner: str, *locks: tuple[str, Mode], lease_s: float = 60.0) -> None:
        self.store.run(
            Acquire(owner=owner, locks=locks, lease_s=lease_s, reply_to=f"q-{owner}", correlation_id="1"),
            self.now,
        )

    def releases(self, owner: str, *resources: str) -> None:
        self.store.run(Release(owner=owner, resources=resources), self.now)

    def owners(self, resource: str, mode: Mode | None, among: Among, after: int = 0, limit: int = 9) -> str:
        """Of waiters, in the order in which they are read."""
        return "".join(w.owner for w in self.view.waiters(resource, mode, among, after, limit))

    def ticket(self, owner: str) -> int:
        waiter = self.view.waiter_of(owner)
        assert waiter is not None
        return waiter.ticket


@pytest.fixture(params=[in_memory, in_database])
def desk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Desk]:
    opened = cast("Callable[[Path], Any]", request.param)
    with opened(tmp_path) as made:
        yield made


def test_an_empty_store(desk: Desk) -> None:
    """Nothing is there, and every read says so."""
    view = desk.view
    assert (list(view.grants_of("a")), view.waiter_of("a"), list(view.holders("x", 9))) == ([], None, [])
    assert list(view.waiters("x", None, Among.ALL, 0, 9)) == []
    assert (view.ahead("x", 9), view.waiting("x"), view.fence("x"), view.next_ticket()) == (0, 0, 0, 1)
    assert (list(view.expired_grants(NOW, 9)), list(view.expired_waiters(NOW, 9))) == ([], [])
    assert list(view.resources("", 9)) == []


def test_grants_are_read_as_they_were_put(desk: Desk) -> None:
    """By name of resource, whatever the order in which they were asked for."""
    desk.asks("a", ("z", X), ("y", S), ("é/ü", S))
    grants = desk.view.grants_of("a")
    assert [grant.resource for grant in grants] == ["y", "z", "é/ü"]
    grant = grants[1]
    assert (grant.mode, grant.owner, grant.fencing_token) == (X, "a", 1)
    assert (grant.granted_at, grant.lease_until) == (NOW, NOW + 60)
    assert (grant.reply_to, grant.correlation_id) == ("q-a", "1")
    assert list(desk.view.grants_of("A")) == []


def test_holders_are_read_by_number_and_no_more_than_asked_for(desk: Desk) -> None:
    for owner in "dcba":
        desk.asks(owner, ("x", S))
    desk.releases("c")
    desk.asks("c", ("x", S))
    assert [grant.owner for grant in desk.view.holders("x", 9)] == ["d", "b", "a", "c"]
    assert [grant.fencing_token for grant in desk.view.holders("x", 3)] == [1, 3, 4]
    assert list(desk.view.holders("x", 0)) == []


def test_waiters_are_read_by_ticket_mode_and_kind(desk: Desk) -> None:
    """Those behind a ticket, in one mode or in any, all of them or the firm or those blocked there."""
    desk.asks("h", ("x", X))
    desk.asks("i", ("y", X))
    desk.asks("a", ("x", X))
    desk.asks("b", ("x", S), ("y", S))
    desk.asks("c", ("w", X), ("y", X))
    desk.asks("d", ("x", S), ("y", X))
    assert desk.owners("x", None, Among.ALL) == "abd"
    assert desk.owners("x", None, Among.ALL, limit=2) == "ab"
    assert desk.owners("x", None, Among.ALL, limit=0) == ""
    assert desk.owners("x", None, Among.ALL, after=desk.ticket("a")) == "bd"
    assert desk.owners("x", S, Among.ALL) == "bd"
    assert desk.owners("x", X, Among.ALL) == "a"
    assert desk.owners("y", None, Among.ALL) == "bcd"
    assert desk.owners("y", None, Among.BLOCKED) == "c"
    assert desk.owners("y", S, Among.BLOCKED) == ""
    assert desk.owners("x", None, Among.FIRM) == ""
    for _ in range(LIMITS.overtakes):  # `w` is free, and waited for by `c`
        desk.asks("o", ("w", S))
        desk.releases("o")
    assert desk.owners("w", None, Among.FIRM) == desk.owners("y", X, Among.FIRM) == "c"
    assert desk.owners("y", S, Among.FIRM) == ""


def test_a_waiter_is_read_as_it_was_put(desk: Desk) -> None:
    desk.asks("h", ("y", X))
    desk.asks("a", ("y", X), ("x", S), lease_s=5.0)
    waiter = desk.view.waiter_of("a")
    assert waiter is not None
    assert waiter.locks == (("x", S), ("y", X))
    assert (waiter.asked_at, waiter.wait_until, waiter.lease_s) == (NOW, NOW + 5, 5.0)
    assert (waiter.blocked_at, waiter.overtaken, waiter.firm) == ("y", 0, False)
    assert (waiter.reply_to, waiter.correlation_id) == ("q-a", "1")


def test_who_is_freed_is_blocked_elsewhere(desk: Desk) -> None:
    """The index of those that wait at a resource moves with the waiter."""
    desk.asks("h", ("x", X))
    desk.asks("i", ("y", X))
    desk.asks("a", ("x", X), ("y", X))
    assert (desk.owners("x", X, Among.BLOCKED), desk.owners("y", X, Among.BLOCKED)) == ("a", "")
    desk.releases("h")
    assert (desk.owners("x", X, Among.BLOCKED), desk.owners("y", X, Among.BLOCKED)) == ("", "a")


def test_counters_follow_who_comes_and_goes(desk: Desk) -> None:
    """Joined, cancelled, granted, expired; of every resource that a request names."""
    desk.asks("h", ("x", X))
    for owner in "abcd":
        desk.asks(owner, ("x", X), ("y", X))
    assert (desk.view.waiting("x"), desk.view.waiting("y"), desk.view.waiting("z")) == (4, 4, 0)
    assert desk.view.ahead("x", desk.ticket("c")) == 2
    desk.store.run(Cancel(owner="b"), NOW)
    assert (desk.view.waiting("x"), desk.view.ahead("x", desk.ticket("c"))) == (3, 1)
    desk.releases("h")
    assert (desk.view.waiting("x"), desk.view.waiting("y")) == (2, 2)
    desk.now += 60
    desk.store.run(Expire(), desk.now)
    assert (desk.view.waiting("x"), desk.view.waiting("y")) == (0, 0)


def test_a_new_ticket_is_later_than_all_that_wait(desk: Desk) -> None:
    desk.asks("h", ("x", X))
    for owner in "abc":
        desk.asks(owner, ("x", X))
    desk.store.run(Cancel(owner="b"), NOW)
    assert desk.view.next_ticket() > max(desk.ticket("a"), desk.ticket("c"))


def test_what_is_over_is_read_in_order_and_in_pages(desk: Desk) -> None:
    """By end, then by name; `now` itself is over."""
    desk.asks("c", ("x", S), lease_s=20.0)
    desk.asks("b", ("x", S), ("w", X), lease_s=10.0)
    desk.asks("a", ("x", S), lease_s=10.0)
    for owner, lease_s in (("p", 9.0), ("q", 5.0), ("r", 9.0)):
        desk.asks(owner, ("x", X), lease_s=lease_s)
    ended = desk.view.expired_grants(NOW + 10, 9)
    assert [(grant.resource, grant.owner) for grant in ended] == [("w", "b"), ("x", "a"), ("x", "b")]
    assert [grant.owner for grant in desk.view.expired_grants(NOW + 10, 2)] == ["b", "a"]
    assert list(desk.view.expired_grants(NOW + 9.999, 9)) == []
    assert [waiter.owner for waiter in desk.view.expired_waiters(NOW + 9, 9)] == ["q", "p", "r"]
    assert [waiter.owner for waiter in desk.view.expired_waiters(NOW + 9, 1)] == ["q"]
    assert [waiter.owner for waiter in desk.view.expired_waiters(NOW + 8.999, 9)] == ["q"]


def test_names_in_use_are_read_in_pages(desk: Desk) -> None:
    """Held or waited for, each once; not those that were released."""
    desk.asks("a", ("b", X), ("d", X), ("x", X))
    desk.asks("b", ("a", X), ("b", X), ("d", X))
    desk.releases("a", "x")
    assert list(desk.view.resources("", 9)) == ["a", "b", "d"]
    assert list(desk.view.resources("", 2)) == ["a", "b"]
    assert list(desk.view.resources("b", 9)) == ["d"]
    assert list(desk.view.resources("d", 9)) == []


def test_a_fencing_number_is_kept_when_all_is_released(desk: Desk) -> None:
    for expected in (1, 2, 3):
        desk.asks("a", ("x", X))
        assert desk.view.fence("x") == desk.view.grants_of("a")[0].fencing_token == expected
        desk.releases("a")
    assert desk.view.fence("x") == 3


def test_a_renewal_writes_lease_and_address(desk: Desk) -> None:
    """And nothing else; also by asking again, for a holder and for a waiter."""
    desk.asks("a", ("x", X))
    desk.asks("b", ("x", X))
    desk.now += 10
    desk.store.run(
        Acquire(owner="a", locks=(("x", X),), lease_s=90.0, reply_to="new", correlation_id="2"), desk.now
    )
    desk.store.run(
        Acquire(owner="b", locks=(("x", X),), lease_s=90.0, reply_to="new", correlation_id="2"), desk.now
    )
    [grant] = desk.view.grants_of("a")
    assert (grant.lease_until, grant.reply_to, grant.correlation_id) == (NOW + 100, "new", "2")
    assert (grant.fencing_token, grant.granted_at) == (1, NOW)
    waiter = desk.view.waiter_of("b")
    assert waiter is not None
    assert (waiter.wait_until, waiter.lease_s) == (NOW + 100, 90.0)
    assert (waiter.reply_to, waiter.correlation_id, waiter.asked_at) == ("new", "2", NOW)


def test_both_answer_a_long_story_alike(tmp_path: Path) -> None:
    """Word for word, tickets aside: cascades longer than one decision, renewals of many, a forced release."""
    owners = [f"o{number}" for number in range(12)]
    story: list[Request] = [
        *(Acquire(owner=owner, locks=(("x", X),), reply_to=owner, correlation_id="1") for owner in "ab"),
        *(Acquire(owner=o, locks=(("x", S), ("y", S)), reply_to=o, correlation_id="1") for o in owners),
        Keep(owner="", owners=("a", "b", *owners[:2]), lease_s=60.0, wait_lease_s=900.0, reply_to="d"),
        Inspect(owner="", reply_to="d"),
        Release(owner="a", reply_to="a", correlation_id="2"),
        ForceRelease(resource="x", reason="stuck", by="op", reply_to="op"),
        Renew(owner="o3", reply_to="o3"),
        Inspect(owner="", resources=("x", "nothing"), reply_to="d"),
        Cancel(owner="o3", reply_to="o3"),
    ]
    with in_memory(tmp_path) as one, in_database(tmp_path) as other:
        for request in story:
            assert one.store.run(request, NOW) == other.store.run(request, NOW), request


# --- the database alone ------------------------------------------------------------------------------------


@pytest.fixture
def url(tmp_path: Path) -> str:
    return fresh(tmp_path / "ledger.db")


@pytest.fixture
def engine(url: str) -> Iterator[Engine]:
    made = open_engine(url)
    yield made
    made.dispose()


def run(engine: Engine, *requests: Any, now: float = NOW) -> LockStore:
    """Requests in one transaction, committed; gives the store that decided them."""
    with engine.begin() as connection:
        store = LockStore(connection, now, LIMITS)
        store.run(requests)
    return store


def ask(owner: str, *locks: tuple[str, Mode], lease_s: float = 60.0) -> Acquire:
    return Acquire(owner=owner, locks=locks, lease_s=lease_s, reply_to=owner, correlation_id="1")


def test_all_is_there_after_the_database_was_closed(engine: Engine, url: str) -> None:
    """Grants, waiters in their order, and the fencing numbers, also of what nobody holds."""
    run(engine, ask("a", ("x", X)), ask("p", ("gone", X)), Release(owner="p"))
    run(engine, ask("b", ("x", X)), ask("c", ("x", X)))
    engine.dispose()
    again = open_engine(url)
    migrate(again)
    with again.begin() as connection:
        store = LockStore(connection, NOW, LIMITS)
        assert [grant.owner for grant in store.holders("x", 9)] == ["a"]
        assert [waiter.owner for waiter in store.waiters("x", None, Among.ALL, 0, 9)] == ["b", "c"]
        assert (store.fence("x"), store.fence("gone"), store.waiting("x")) == (1, 1, 2)
        [reply] = store.run([ask("d", ("gone", X))])
        assert [grant.fencing_token for grant in reply.grants] == [2]
        told = [reply for reply in store.run([Release(owner="a")]) if reply.status is Answer.GRANTED]
        assert [(reply.owner, reply.grants[0].fencing_token) for reply in told] == [("b", 2)]
    again.dispose()


def test_what_is_rolled_back_never_was(engine: Engine) -> None:
    """No number is used up, nobody waits; the next transaction reads what is stored."""
    with engine.connect() as connection:
        transaction = connection.begin()
        LockStore(connection, NOW, LIMITS).run([ask("a", ("x", X)), ask("b", ("x", X))])
        transaction.rollback()
    with engine.begin() as connection:
        store = LockStore(connection, NOW, LIMITS)
        assert (store.fence("x"), store.waiting("x"), list(store.holders("x", 9))) == (0, 0, [])


def test_no_lease_ends_within_the_grace_of_a_takeover(engine: Engine) -> None:
    """Those that are over and those that end soon live until then; those that live longer are left alone."""
    run(engine, ask("a", ("x", X), lease_s=5.0), ask("b", ("y", X), lease_s=500.0))
    run(engine, ask("c", ("x", X), lease_s=5.0), ask("d", ("y", X), lease_s=500.0))
    with engine.begin() as connection:
        LockStore(connection, NOW + 100, LIMITS).take_over(NOW + 130)
    with engine.begin() as connection:
        store = LockStore(connection, NOW + 129, LIMITS)
        assert store.run([Expire()]) == []
        assert [store.grants_of(owner)[0].lease_until for owner in "ab"] == [NOW + 130, NOW + 500]
        waiters = [store.waiter_of(owner) for owner in "cd"]
        assert [waiter and waiter.wait_until for waiter in waiters] == [NOW + 130, NOW + 500]
    with engine.begin() as connection:
        store = LockStore(connection, NOW + 130, LIMITS)
        ended = [reply.owner for reply in store.run([Expire()]) if reply.status is Answer.EXPIRED]
        assert sorted(ended) == ["a", "c"]


def test_leases_last_as_long_when_the_clock_was_set(engine: Engine) -> None:
    """Their ends move with it, those of who waits too."""
    run(engine, ask("a", ("x", X), lease_s=500.0), ask("b", ("x", X), lease_s=400.0))
    with engine.begin() as connection:
        LockStore(connection, NOW - 3600, LIMITS).shift(-3600.0)
    with engine.begin() as connection:
        store = LockStore(connection, NOW - 3600, LIMITS)
        assert store.grants_of("a")[0].lease_until == NOW - 3600 + 500
        waiter = store.waiter_of("b")
        assert waiter is not None
        assert waiter.wait_until == NOW - 3600 + 400


def lines(engine: Engine) -> list[tuple[Any, ...]]:
    """The locks' history."""
    columns = schema.lock_history.c
    wanted = [columns[name] for name in ("resource", "owner", "event", "mode", "fencing_token", "reason")]
    with engine.connect() as connection:
        return [tuple(row) for row in connection.execute(select(*wanted).order_by(columns.number))]


def test_the_history_tells_who_asked_had_and_lost_what_and_why(engine: Engine) -> None:
    run(engine, ask("a", ("x", X)), ask("b", ("x", S)), ask("c", ("x", S)), ask("d", ("x", X)))
    run(engine, Cancel(owner="c"))
    run(engine, Release(owner="a"))
    run(engine, ForceRelease(resource="x", owner="b", reason="stuck", by="ann"))
    run(engine, Renew(owner="d"))
    run(engine, Expire(), now=NOW + 60)
    assert lines(engine) == [
        ("x", "a", "granted", "EXCLUSIVE", 1, ""),
        ("x", "b", "asked", "SHARED", None, ""),
        ("x", "c", "asked", "SHARED", None, ""),
        ("x", "d", "asked", "EXCLUSIVE", None, ""),
        ("x", "c", "left", "SHARED", None, "cancelled"),
        ("x", "a", "ended", "EXCLUSIVE", 1, "released"),
        ("x", "b", "granted", "SHARED", 2, ""),
        ("x", "b", "ended", "SHARED", 2, "released by force by ann: stuck"),
        ("x", "d", "granted", "EXCLUSIVE", 3, ""),
        ("x", "d", "ended", "EXCLUSIVE", 3, "the lease ended"),
    ]


def test_resources_whose_queue_moved_are_named(engine: Engine) -> None:
    """Those where a place became another: somebody left, or what was waited for was given up."""
    assert run(engine, ask("a", ("x", X), ("y", X)), ask("b", ("x", X), ("z", X))).touched == set()
    assert run(engine, ask("c", ("x", X))).touched == set()
    assert run(engine, Renew(owner="a"), Inspect(owner="")).touched == set()
    assert run(engine, Cancel(owner="b")).touched == {"x", "z"}
    assert run(engine, Release(owner="a")).touched == {"x", "y"}


def test_requests_of_one_transaction_see_each_other(engine: Engine) -> None:
    """Who came to wait in it is granted by a release in it; a queue that has emptied holds nobody up."""
    run(engine, ask("a", ("x", X)), ask("b", ("x", X)), Release(owner="a"), ask("c", ("y", X)))
    run(engine, Release(owner="b"), ask("d", ("x", X)), ask("e", ("x", X)), Cancel(owner="e"))
    run(engine, ask("f", ("x", X)), Cancel(owner="f"), Release(owner="d"), ask("g", ("x", X)))
    with engine.connect() as connection:
        told = connection.execute(select(schema.lock_history.c.owner, schema.lock_history.c.event)).all()
        waiting = connection.execute(
            select(schema.lock_resources.c.resource, schema.lock_resources.c.waiting)
        )
        assert {owner for owner, event in told if event == "granted"} == set("abcdg")
        assert {row.resource: row.waiting for row in waiting} == {"x": 0, "y": 0}


async def test_old_history_is_purged_and_numbers_are_not(url: str) -> None:
    """In steps, to the line; the fencing numbers stay for ever."""
    engine = open_engine(url)
    for number in range(5):
        run(engine, ask("a", ("x", X)), Release(owner="a"), now=NOW + number)
    engine.dispose()
    async with SqlLedger(url) as ledger:
        await ledger.purge(NOW + 3, 2)
        with open_engine(url, read_only=True).connect() as connection:
            kept = list(connection.scalars(select(schema.lock_history.c.at)))
            assert kept == [NOW + 3, NOW + 3, NOW + 4, NOW + 4]
            assert connection.scalar(select(schema.lock_resources.c.fence)) == 5


@pytest.mark.parametrize("waiting", [10, 300])
def test_a_hand_over_asks_the_database_the_same_however_many_wait(engine: Engine, waiting: int) -> None:
    """The same statements, each answered by an index: no plan reads a whole table."""
    run(engine, ask("a", ("x", X)), *(ask(f"w{number}", ("x", X)) for number in range(waiting)))
    asked: list[str] = []
    event.listen(engine, "checkout", lambda connection, *_: connection.set_trace_callback(asked.append))
    event.listen(engine, "checkin", lambda connection, *_: connection.set_trace_callback(None))
    run(engine, Release(owner="a"))
    changes = [words for words in asked if words.startswith(("SELECT", "UPDATE", "DELETE"))]
    assert 10 < len(changes) <= 24
    with engine.begin() as connection:
        for statement in changes:
            plan = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}").all()
            assert not [row.detail for row in plan if row.detail.startswith("SCAN")], statement


@pytest.mark.parametrize("name", ["lock_grants", "lock_waiters", "lock_wants", "lock_history", "job_locks"])
def test_nothing_is_left_behind(engine: Engine, name: str) -> None:
    """When all is released only the resources' numbers and the history stay."""
    run(engine, ask("a", ("x", X)), ask("b", ("x", X), ("y", S)), Cancel(owner="b"), Release(owner="a"))
    with engine.begin() as connection:
        left = connection.scalar(select(func.count()).select_from(schema.metadata.tables[name]))
    assert left == (6 if name == "lock_history" else 0)
