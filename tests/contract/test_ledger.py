"""What every ledger promises (`ports.Ledger`), on a real database. PostgreSQL will join the parameters."""

from __future__ import annotations

import asyncio
import fcntl
import json
import sqlite3
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import insert
from sqlalchemy.exc import IntegrityError

from jef_daemon.errors import (
    LedgerError,
    LedgerInUse,
    LedgerTooNew,
    LedgerUnavailable,
    NotFound,
    RequestRefused,
)
from jef_daemon.events import Completed, Failed, Progressed
from jef_daemon.ledger import Filter, Reader, SqlLedger, opening, schema
from jef_daemon.ledger.transaction import Transaction
from jef_daemon.lifecycle import Execution, Status
from jef_daemon.names import Names
from jef_daemon.ports import Accepted, Arrival, Capacity, Delivery, Outgoing, Refusal
from jef_daemon.rabbitmq import frames
from tests.support.clock import ManualClock


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'ledger.db'}"


@pytest.fixture
async def ledger(url: str, clock: ManualClock) -> AsyncIterator[SqlLedger]:
    async with SqlLedger(url, Names("t"), clock) as opened:
        yield opened


def arrival(execution_id: str, action: str = "a", **fields: Any) -> Arrival:
    return Arrival(
        Execution(execution_id, action, token="t", **fields), json.dumps({"executionId": execution_id})
    )


def capacity(total: int = 100, **by_action: int) -> Capacity:
    return Capacity(total, by_action or {"a": total})


async def told(ledger: SqlLedger) -> list[dict[str, Any]]:
    return [json.loads(message.body) for message in await ledger.outbox(0, 10_000)]


async def run_to_end(ledger: SqlLedger, execution_id: str = "1") -> None:
    await ledger.accept([arrival(execution_id)])
    await ledger.claim(capacity())
    await ledger.apply(execution_id, 1, [Completed(result="done", job_context_variables={"w": 1})])


async def test_a_request_is_queued_and_told_in_one_step(ledger: SqlLedger) -> None:
    """Status and notification are one transaction."""
    assert await ledger.accept([arrival("1")]) == [Accepted.NEW]
    [only] = await told(ledger)
    assert (only["executionId"], only["status"], only["sequence"]) == ("1", "QUEUED", 1)
    assert await ledger.queued() == {"a": 1}


async def test_a_duplicate_changes_nothing(ledger: SqlLedger) -> None:
    """Neither in the same batch nor later; and only once is told."""
    assert await ledger.accept([arrival("1"), arrival("1")]) == [Accepted.NEW, Accepted.KNOWN]
    assert await ledger.accept([arrival("1")]) == [Accepted.KNOWN]
    assert len(await told(ledger)) == 1
    assert len(await ledger.claim(capacity())) == 1
    assert await ledger.accept([arrival("1")]) == [Accepted.KNOWN]
    assert await ledger.claim(capacity()) == []


async def test_a_duplicate_of_a_finished_one_tells_its_end_again(ledger: SqlLedger) -> None:
    """Word for word, with the old sequence number; to the new asker's `reply_to` too."""
    await run_to_end(ledger)
    final = (await told(ledger))[-1]
    assert await ledger.accept([arrival("1", reply_to="me", correlation_id="c")]) == [Accepted.FINISHED]
    again = await ledger.outbox(0, 100)
    assert json.loads(again[-2].body) == final == json.loads(again[-1].body)
    assert (again[-1].exchange, again[-1].routing_key, again[-1].correlation_id) == ("", "me", "c")


async def test_a_job_is_told_in_order_with_rising_numbers(ledger: SqlLedger) -> None:
    """QUEUED, RUNNING, progress, COMPLETED; the outbox keeps that order."""
    await ledger.accept([arrival("1", reply_to="asker", correlation_id="c7")])
    await ledger.claim(capacity())
    await ledger.apply("1", 1, [Progressed(progress=40, message="half"), Completed(result="ok")])
    messages = await ledger.outbox(0, 100)
    bodies = [json.loads(message.body) for message in messages if message.exchange == "t.status"]
    assert [body["status"] for body in bodies] == ["QUEUED", "RUNNING", "RUNNING", "COMPLETED"]
    assert [body["sequence"] for body in bodies] == [1, 2, 3, 4]
    assert [message.routing_key for message in messages[:4]] == [
        "a.queued",
        "a.running",
        "a.running",
        "a.completed",
    ]
    assert (messages[-1].routing_key, messages[-1].correlation_id) == ("asker", "c7")
    assert bodies[-1]["result"] == "ok"


async def test_an_illegal_event_changes_nothing_and_is_recorded(ledger: SqlLedger, url: str) -> None:
    """A second end, an end for an older attempt, an unknown execution."""
    await run_to_end(ledger)
    before = await told(ledger)
    [late] = await ledger.apply("1", 1, [Failed(error_type="X", error_message="y")])
    assert late.transition is None
    assert "COMPLETED" in late.refused
    [unknown] = await ledger.apply("2", None, [Completed()])
    assert unknown.refused
    assert await told(ledger) == before
    reader = Reader(url)
    assert reader.history("1")[-1].event == "Failed refused"
    assert reader.find("1").status is Status.COMPLETED


async def test_an_event_for_another_attempt_is_refused(ledger: SqlLedger) -> None:
    """A result of attempt 1 says nothing about attempt 2."""
    await ledger.accept([arrival("1", attempt=2)])
    await ledger.claim(capacity())
    [applied] = await ledger.apply("1", 1, [Completed()])
    assert applied.transition is None


async def test_claims_go_by_priority_then_age_within_the_capacity(ledger: SqlLedger) -> None:
    """Across actions, with places per action and processes shared by blocking ones."""
    await ledger.accept(
        [arrival("1"), arrival("2", priority=5), arrival("3", "b"), arrival("4", "b", priority=9)]
    )
    first = await ledger.claim(Capacity(2, {"a": 5, "b": 5}))
    assert [job.execution.execution_id for job in first] == ["4", "2"]
    assert await ledger.claim(Capacity(5, {"a": 5, "b": 5}, 0, frozenset({"a", "b"}))) == []
    one_process = await ledger.claim(Capacity(5, {"a": 5, "b": 5}, 1, frozenset({"a", "b"})))
    assert [job.execution.execution_id for job in one_process] == ["1"]
    assert [job.execution.execution_id for job in await ledger.claim(capacity(a=5, b=5))] == ["3"]


async def test_a_job_does_not_start_before_its_time(ledger: SqlLedger, clock: ManualClock) -> None:
    """`notBefore` keeps it QUEUED, and out of the count of ready ones."""
    await ledger.accept([arrival("1", not_before=clock.time + 60)])
    assert await ledger.claim(capacity()) == []
    assert await ledger.queued() == {}
    clock.time += 59
    assert await ledger.claim(capacity()) == []
    clock.time += 2
    assert len(await ledger.claim(capacity())) == 1


async def test_a_job_that_wants_locks_is_not_claimed_without_them(ledger: SqlLedger) -> None:
    """Never run unprotected."""
    await ledger.accept([arrival("1", wants_locks=True)])
    assert await ledger.claim(capacity()) == []


async def test_a_refusal_becomes_a_dead_letter_and_a_failed_notification(ledger: SqlLedger) -> None:
    """Body unharmed, headers with code and sentence; FAILED where the id could be read and is not known."""
    delivery = Delivery("a", b"\xff{", 1, 1, routing_key="a", headers={"mine": 1, "raw": b"\xff"})
    error = RequestRefused("field-invalid", "priority: wrong", "9")
    assert await ledger.accept([Refusal(error, delivery, "a")]) == [Accepted.REFUSED]
    dead, failed = await ledger.outbox(0, 10)
    assert (dead.exchange, dead.body) == ("t.dead", b"\xff{")
    assert dead.headers is not None
    assert dead.headers["x-jef-reason"] == "field-invalid"
    assert dead.headers["mine"] == 1
    assert (failed.exchange, failed.routing_key) == ("t.status", "a.failed")
    assert json.loads(failed.body)["executionId"] == "9"


@pytest.mark.parametrize(
    "value",
    ["word", -(2**63), 0.5, True, None, [1, "a", None, [2.5]], {"a": [1, {"b": None}], "c": "d"}, [], {}],
)
async def test_a_refused_message_keeps_its_headers(ledger: SqlLedger, value: object) -> None:
    """All that AMQP and JSON can both carry: who mends a dead letter needs what it came with."""
    delivery = Delivery("a", b"{", 1, 1, routing_key="a", headers={"theirs": value})
    await ledger.accept([Refusal(RequestRefused("not-json", "x"), delivery, "a")])
    [dead] = await ledger.outbox(0, 10)
    assert dead.headers is not None
    assert dead.headers["theirs"] == value


@pytest.mark.parametrize(
    "value",
    [2**64 - 1, -(2**63), 1e300, float("nan"), {"a": [1, None, {"b": 2**63}]}, b"raw", [], {}, None, True],
)
async def test_a_refused_message_s_headers_can_always_be_sent_again(ledger: SqlLedger, value: object) -> None:
    """What AMQP or JSON cannot carry is left out; the message itself never is."""
    delivery = Delivery("a", b"{", 1, 1, routing_key="a", headers={"odd": value, "mine": 1})
    await ledger.accept([Refusal(RequestRefused("not-json", "x"), delivery, "a")])
    [dead] = await ledger.outbox(0, 10)
    assert dead.headers is not None
    assert dead.headers["mine"] == 1
    assert frames.publish(1, dead.exchange, dead.routing_key, dead.body, headers=dead.headers)


async def test_a_refused_message_s_headers_and_ours_fit_one_frame(ledger: SqlLedger) -> None:
    """The broker ends the connection of whoever sends a longer one."""
    theirs = {f"h{number}": "x" * 1000 for number in range(130)}
    delivery = Delivery("a", b"", 1, 1, routing_key="k" * 255, headers=theirs)
    await ledger.accept([Refusal(RequestRefused("not-json", "x" * 5000), delivery, "a")])
    [dead] = await ledger.outbox(0, 10)
    assert len(frames.publish(1, dead.exchange, dead.routing_key, b"", headers=dead.headers)) < 131_000


async def test_a_bad_copy_of_a_known_request_fails_nobody(ledger: SqlLedger) -> None:
    """The running execution of that id is not told FAILED."""
    await ledger.accept([arrival("9")])
    error = RequestRefused("field-invalid", "priority: wrong", "9")
    await ledger.accept([Refusal(error, Delivery("a", b"{}", 1, 1), "a")])
    assert [message.exchange for message in await ledger.outbox(0, 10)] == ["t.status", "t.dead"]


async def test_confirmed_messages_leave_the_outbox(ledger: SqlLedger) -> None:
    """Any set of them, also with gaps."""
    await ledger.accept([arrival(str(number)) for number in range(6)])
    ids = [message.id for message in await ledger.outbox(0, 10)]
    await ledger.confirm([ids[0], ids[1], ids[3], ids[5]])
    assert [message.id for message in await ledger.outbox(0, 10)] == [ids[2], ids[4]]
    assert [message.id for message in await ledger.outbox(ids[2], 10)] == [ids[4]]


async def test_messages_are_handed_over_after_the_commit_in_order(ledger: SqlLedger) -> None:
    """The notifier need not read what it is given."""
    handed: list[Outgoing] = []
    ledger.on_outbox(handed.extend)
    await run_to_end(ledger)
    assert handed == await ledger.outbox(0, 100)


async def test_an_arrival_and_a_claim_share_a_transaction(ledger: SqlLedger) -> None:
    """What the daemon relies on for one fsync per idle start."""
    accepting = ledger.accepting([arrival("1")])
    claiming = ledger.claiming(capacity())
    assert await accepting == [Accepted.NEW]
    assert len(await claiming) == 1


async def test_one_bad_operation_spares_the_others(ledger: SqlLedger) -> None:
    """An operation that breaks the transaction fails alone."""
    broken = ledger.accepting([Arrival(Execution("bad", None), "{}")])  # type: ignore[arg-type]
    fine = ledger.accepting([arrival("good")])
    results = await asyncio.gather(broken, fine, return_exceptions=True)
    assert isinstance(results[0], Exception)
    assert results[1] == [Accepted.NEW]


async def test_what_is_written_survives(url: str, clock: ManualClock) -> None:
    """A new life of the ledger knows it all, and goes on counting."""
    async with SqlLedger(url, Names("t"), clock) as first:
        await first.accept([arrival("1"), arrival("2")])
        await first.claim(capacity(1))
    async with SqlLedger(url, Names("t"), clock) as second:
        assert await second.interrupt(lambda action: False, "died") == 1
        bodies = await told(second)
        assert [(body["executionId"], body["status"]) for body in bodies] == [
            ("1", "QUEUED"),
            ("2", "QUEUED"),
            ("1", "RUNNING"),
            ("1", "FAILED"),
        ]
        assert bodies[-1]["error"]["type"] == "Interrupted"
        assert [job.execution.execution_id for job in await second.claim(capacity())] == ["2"]


async def test_an_interrupted_job_that_may_run_again_is_queued_anew(ledger: SqlLedger) -> None:
    """Attempt 2, a new token, progress from 0."""
    await ledger.accept([arrival("1")])
    await ledger.claim(capacity())
    assert await ledger.interrupt(lambda action: True, "died") == 1
    [job] = await ledger.claim(capacity())
    assert job.execution.attempt == 2
    assert job.execution.token not in {"", "t"}


async def test_unstarted_jobs_are_handed_back_once_and_can_come_again(ledger: SqlLedger) -> None:
    """The request goes back to the jobs exchange with what the next owner must go on counting from."""
    await ledger.accept([arrival("1", traceparent="00-x", reply_to="r", correlation_id="c")])
    assert await ledger.hand_back() == 1
    assert await ledger.hand_back() == 0
    assert await ledger.claim(capacity()) == []
    back = (await ledger.outbox(0, 10))[-1]
    assert (back.exchange, back.routing_key, json.loads(back.body)) == ("t.jobs", "a", {"executionId": "1"})
    assert back.headers == {"x-jef-sequence": 1, "x-jef-attempt": 1, "traceparent": "00-x"}
    assert (back.reply_to, back.correlation_id) == ("r", "c")
    assert await ledger.accept([arrival("1", sequence=1)]) == [Accepted.TAKEN_AGAIN]
    assert len(await ledger.claim(capacity())) == 1


async def test_jobs_of_some_actions_are_handed_back(ledger: SqlLedger) -> None:
    """Those of others stay."""
    other = Arrival(Execution("2", "b", token="t"), "{}")
    await ledger.accept([arrival("1"), other, arrival("3")])
    assert await ledger.hand_back({"a", "c"}) == 2
    assert [job.execution.execution_id for job in await ledger.claim(capacity(2, a=2, b=2))] == ["2"]


async def test_a_job_that_comes_again_goes_on_where_the_other_daemon_stopped(ledger: SqlLedger) -> None:
    """Taken, interrupted and handed back there: attempt, sequence and token are those it left with."""
    await ledger.accept([arrival("1")])
    await ledger.hand_back()
    again = Arrival(Execution("1", "a", token="new", sequence=7, attempt=3), "{}")
    assert await ledger.accept([again]) == [Accepted.TAKEN_AGAIN]
    [job] = await ledger.claim(capacity())
    assert (job.execution.attempt, job.execution.sequence, job.execution.token) == (3, 8, "new")


async def test_a_copy_of_a_handed_back_request_runs_nothing(ledger: SqlLedger) -> None:
    """The job is with another daemon by now, or has ended there: only the hand-back itself brings it home."""
    await ledger.accept([arrival("1")])
    await ledger.claim(capacity())
    await ledger.interrupt(lambda action: True, "died")
    await ledger.hand_back()
    assert await ledger.accept([arrival("1")]) == [Accepted.KNOWN]
    older = arrival("1", sequence=1)  # an earlier hand-back, repeated because its confirm was lost
    assert await ledger.accept([older]) == [Accepted.KNOWN]
    assert await ledger.claim(capacity()) == []
    home = arrival("1", sequence=3, attempt=2)
    assert await ledger.accept([home, home]) == [Accepted.TAKEN_AGAIN, Accepted.KNOWN]
    assert len(await ledger.claim(capacity())) == 1


async def test_a_bad_copy_in_the_same_batch_fails_nobody(ledger: SqlLedger) -> None:
    """The request beside it is fine, and is not told FAILED."""
    error = RequestRefused("field-invalid", "priority: wrong", "9")
    bad = Refusal(error, Delivery("a", b"{}", 1, 1), "a")
    assert await ledger.accept([arrival("9"), bad]) == [Accepted.NEW, Accepted.REFUSED]
    assert [message.exchange for message in await ledger.outbox(0, 10)] == ["t.dead", "t.status"]


async def test_old_finished_executions_are_purged_in_steps(
    ledger: SqlLedger, clock: ManualClock, url: str
) -> None:
    """With request, outcome and history; unfinished ones stay."""
    for number in range(5):
        await run_to_end(ledger, str(number))
    await ledger.accept([arrival("open")])
    clock.time += 100
    await run_to_end(ledger, "new")
    assert await ledger.purge(clock.time - 50, 2) == 5
    reader = Reader(url)
    assert [execution.execution_id for execution in reader.page(Filter()).executions] == ["new", "open"]
    assert reader.outcome("new") != {}
    assert reader.history("1") == []
    assert reader.outcome("1") == {}


async def test_what_was_handed_back_is_known_for_as_long_as_what_ended(
    ledger: SqlLedger, clock: ManualClock
) -> None:
    """From then on, however long it had waited: a copy of its request does not run it beside another daemon."""
    await ledger.accept([arrival("1")])
    clock.time += 100
    await ledger.hand_back()
    assert await ledger.purge(clock.time - 50, 2) == 0
    clock.time += 100
    assert await ledger.purge(clock.time - 50, 2) == 1


async def test_a_job_is_found_by_either_of_its_names(ledger: SqlLedger, url: str) -> None:
    """Ours, or the executor's own for the work elsewhere."""
    await ledger.accept([arrival("1")])
    await ledger.claim(capacity())
    await ledger.apply("1", 1, [Completed(external_id="render-77")])
    reader = Reader(url)
    assert reader.find("render-77").execution_id == reader.find("1").execution_id == "1"
    with pytest.raises(NotFound):
        reader.find("nobody")


async def test_pages_go_from_new_to_old(ledger: SqlLedger, url: str) -> None:
    """Filters apply; the last page says that it is."""
    await ledger.accept([arrival(str(number), "b" if number % 2 else "a") for number in range(5)])
    reader = Reader(url)
    first = reader.page(Filter(action="a"), most=2)
    assert [execution.execution_id for execution in first.executions] == ["4", "2"]
    rest = reader.page(Filter(action="a"), most=2, before=first.next_before)
    assert ([execution.execution_id for execution in rest.executions], rest.next_before) == (["0"], None)
    assert reader.page(Filter(statuses=[Status.RUNNING])).executions == []


async def test_two_daemons_cannot_own_one_ledger(ledger: SqlLedger, url: str) -> None:
    """The sentence names the owner and the remedy."""
    with pytest.raises(LedgerInUse, match="process id"):
        await SqlLedger(url).open()


@pytest.mark.parametrize("is_let_go", [True, False])
async def test_what_a_killed_daemon_left_behind_is_waited_for(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_let_go: bool
) -> None:
    """A process that it was just starting has its lock until it is another program; one that keeps it is told of."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    left = (tmp_path / "ledger.db.lock").open("w")
    left.write(f"{gone.pid}\n")
    left.flush()
    fcntl.flock(left, fcntl.LOCK_EX)
    looked = 0

    def look(_: float) -> None:
        nonlocal looked
        looked += 1
        if is_let_go and looked == 3:
            left.close()

    monkeypatch.setattr("jef_daemon.ledger.opening.time.sleep", look)
    monkeypatch.setattr(opening, "_LEFT_BEHIND_S", 60.0 if is_let_go else 0.05)
    if is_let_go:
        async with SqlLedger(url) as ledger:
            assert ledger.identity
        assert looked == 3
    else:
        with pytest.raises(
            LedgerInUse, match=f"a daemon that is gone .process id {gone.pid}. left behind; end"
        ):
            await SqlLedger(url).open()
        left.close()


async def test_a_ledger_of_a_newer_version_is_refused(url: str, tmp_path: Path) -> None:
    """Nothing is changed in it."""
    import sqlite3

    async with SqlLedger(url):
        pass
    with sqlite3.connect(tmp_path / "ledger.db") as database:
        database.execute("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(LedgerTooNew, match="9999"):
        await SqlLedger(url).open()


async def test_a_file_that_is_no_ledger_is_refused(url: str, tmp_path: Path) -> None:
    """One sentence, no traceback of the driver's."""
    (tmp_path / "ledger.db").write_bytes(b"not a database at all, really not one" * 100)
    with pytest.raises(LedgerUnavailable, match="no ledger"):
        await SqlLedger(url).open()


async def test_a_locked_ledger_is_waited_for(ledger: SqlLedger, tmp_path: Path) -> None:
    """Another process holds the write lock longer than SQLite waits: nothing raises, nothing is lost."""
    import sqlite3

    assert ledger._writer is not None
    stalled = ledger._writer.stalled
    other = sqlite3.connect(tmp_path / "ledger.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    accepting = ledger.accepting([arrival("1")])
    async with asyncio.timeout(20):
        while ledger.stalled is None:
            await asyncio.wait({accepting}, timeout=0.1)
    assert stalled is None
    assert "locked" in str(ledger.stalled)
    other.execute("ROLLBACK")
    assert await accepting == [Accepted.NEW]
    assert ledger.stalled is None


async def test_confirmations_ride_with_the_next_transaction(
    ledger: SqlLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They cost none of their own while there is other work, and get one where there is none."""
    assert ledger._writer is not None
    await ledger.accept([arrival("1")])
    [first] = await ledger.outbox(0, 10)
    await ledger.confirm([first.id])
    assert await ledger.outbox(0, 10) == []
    monkeypatch.setattr("jef_daemon.ledger.writer._CONFIRM_WITHIN_S", 3600)
    await ledger.accept([arrival("2")])
    [second] = await ledger.outbox(0, 10)
    before = ledger._writer.transactions
    riding = asyncio.ensure_future(ledger.confirm([second.id]))
    await asyncio.wait({riding}, timeout=0.3)
    assert not riding.done()
    await ledger.accept([arrival("3")])
    await riding
    assert ledger._writer.transactions == before + 1
    assert second.id not in {message.id for message in await ledger.outbox(0, 10)}


def test_the_migrations_make_exactly_the_tables(tmp_path: Path) -> None:
    """`schema`, of which a new ledger is made, and `migrations` cannot drift apart."""
    from alembic import command
    from alembic.autogenerate import compare_metadata
    from alembic.config import Config
    from alembic.migration import MigrationContext

    from jef_daemon.ledger import opening, schema

    made, migrated = (
        opening.open_engine(f"sqlite:///{tmp_path / name}") for name in ("made.db", "migrated.db")
    )
    opening.migrate(made)
    config = Config()
    config.set_main_option("script_location", str(Path(opening.__file__).parent / "migrations"))
    with migrated.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
    described = []
    for engine in (made, migrated):
        assert opening.version(engine) == schema.HEAD
        with engine.connect() as connection:
            assert compare_metadata(MigrationContext.configure(connection), schema.metadata) == []
            assert len(connection.exec_driver_sql("SELECT id FROM identity").scalar_one()) == 12
            tables = connection.exec_driver_sql(
                "SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name"
            ).scalars()
            # Name, type, may it be null, is it part of the key; defaults of old rows apart, and the order of columns.
            described.append(
                {
                    table: sorted(
                        (row.name, row.type, row.notnull, row.pk)
                        for row in connection.exec_driver_sql(f"PRAGMA table_info({table})")
                    )
                    for table in tables
                }
            )
        engine.dispose()
    assert described[0] == described[1]


async def test_a_damaged_ledger_is_no_message_s_fault(tmp_path: Path, url: str, clock: ManualClock) -> None:
    """Parts of it may still work, as that which keeps dead letters: a whole queue would become some."""
    async with SqlLedger(url, Names("t"), clock):
        pass
    with sqlite3.connect(tmp_path / "ledger.db") as database:
        [size] = database.execute("PRAGMA page_size").fetchone()
        [page] = database.execute("SELECT rootpage FROM sqlite_master WHERE name = 'executions'").fetchone()
    database.close()
    with (tmp_path / "ledger.db").open("r+b") as file:
        file.seek((page - 1) * size)
        file.write(b"\xff" * size)
    async with SqlLedger(url, Names("t"), clock) as ledger:
        with pytest.raises(LedgerError, match="the file is damaged; restore it from a backup"):
            await ledger.accept([arrival("1")])
        refusal = Refusal(RequestRefused("not-json", "the body is no JSON"), Delivery("a", b"{", 1, 1), "a")
        assert await ledger.accept([refusal]) == [Accepted.REFUSED]


@pytest.mark.parametrize("way", ["connection", "driver"])
async def test_no_error_carries_what_was_to_be_written(ledger: SqlLedger, way: str) -> None:
    """It is logged, and told to whoever waits: tokens are among it."""
    statement, row = insert(schema.requests), {"execution_id": "1", "body": "secret"}

    def twice(transaction: Transaction) -> None:
        for _ in range(2):
            if way == "driver":
                transaction.driver.change(statement, row)
            else:
                transaction.connection.execute(statement, row)

    with pytest.raises(IntegrityError, match="UNIQUE") as caught:
        await ledger._other(twice)
    assert "secret" not in str(caught.value)
