"""Locks under violence: two daemons and foreign clients contend, everything is killed; nobody holds what another has.

What the jobs write to is a store that knows nothing of the lock service but the fencing numbers it is shown
(`tests.support.store`). Its files tell who was at work, and whom it had to refuse.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import random
import sqlite3
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pika
import pytest
from broker import PrivateBroker
from pika.exceptions import AMQPError

from jef_daemon.ledger import Filter
from tests.support import store as store_file
from tests.support.amqp import ENDS, Client
from tests.support.lockers import ACTIONS
from tests.support.process import DaemonProcess
from tests.support.store import Line, Store

pytestmark = pytest.mark.timeout(600)
logging.getLogger("pika").setLevel(logging.CRITICAL)  # that a broker is away is what is tested
SEED = int(os.environ.get("JEF_TEST_SEED", "0")) or random.randrange(1, 10**6)
PREFIX = "contended"
RESOURCES = [f"asset/{number}" for number in range(20)]
JOBS = 2000
KILLS = 8
SLOTS = 8
IN_FLIGHT = 80
"""Jobs submitted and not ended: enough that all resources have a queue, few enough that foreigners get a turn."""
FOREIGNERS = 3
LEASE_S = 6.0
KINDS = ["writes"] * 12 + ["writes-once"] * 4 + ["blocking-writes"] * 3 + ["command-writes"]

Grant = tuple[str, str, int]
"""Holder, owner, attempt."""


def some_locks(chance: random.Random) -> dict[str, str]:
    """One to three resources, and how."""
    wanted = chance.sample(RESOURCES, chance.choice([1, 1, 1, 2, 3]))
    return {resource: chance.choice(["SHARED", "EXCLUSIVE"]) for resource in wanted}


def on_the_wire(locks: dict[str, str]) -> list[dict[str, str]]:
    return [{"resource": resource, "mode": mode} for resource, mode in locks.items()]


# --- a client that is not ours -------------------------------------------------------------------------------


class Foreigner(threading.Thread):
    """Takes locks and gives them back, over and over, with nothing but an AMQP library.

    Args:
        url: the broker's.
        name: of its queue and its owners.
        folder: the store's.
        queue_type: of its queue.
    """

    def __init__(self, url: str, name: str, folder: str, queue_type: str) -> None:
        super().__init__(name=name, daemon=True)
        self._url = url
        self._queue_type = queue_type
        self._store = Store(folder)
        self._chance = random.Random(f"{SEED} {name}")
        self._enough = threading.Event()
        self._connection: pika.BlockingConnection | None = None
        self._channel: Any = None
        self.turns = 0
        self.late: set[Grant] = set()
        """Was refused, and rightly: its lease was over by the clock."""
        self.unlawful: list[str] = []
        """What the lock service should not have done."""

    def enough(self) -> None:
        """Let it come to an end."""
        self._enough.set()

    def run(self) -> None:
        self._stall(f"{self.name}-0")
        while not self._enough.is_set():
            self.turns += 1
            self._turn(f"{self.name}-{self.turns}", some_locks(self._chance))

    def _turn(self, owner: str, locks: dict[str, str]) -> None:
        grants = self._acquire(owner, locks)
        if {grant["resource"]: grant["mode"] for grant in grants} != locks:
            self.unlawful.append(f"{owner} asked for {locks} and got {grants}")
        self._write("begin", owner, grants)
        time.sleep(self._chance.uniform(0, 0.02))
        self._write("end", owner, grants)
        self._until(owner, "release", {"RELEASED"})

    def _stall(self, owner: str) -> None:
        """Outlive the lease, see another take the lock, and be refused."""
        locks = {f"asset/of-{self.name}": "EXCLUSIVE"}
        stale = self._acquire(owner, locks)
        self._write("begin", owner, stale)
        heir = f"{owner}-heir"
        self._write("begin", heir, (newer := self._acquire(heir, locks)))
        if self._write("end", owner, stale):
            self.unlawful.append(f"{owner} was accepted with {stale} after {newer}")
        self._write("end", heir, newer)
        self._until(heir, "release", {"RELEASED"})

    def _write(self, what: str, owner: str, grants: list[dict[str, Any]]) -> bool:
        accepted = True
        for grant in grants:
            number, mode = grant["fencingToken"], grant["mode"]
            if not self._store.write(grant["resource"], what, self.name, owner, 1, mode, number):
                accepted = False
                if time.time() < instant(grant["leaseUntil"]):
                    self.unlawful.append(f"{owner} was refused within its lease: {grant}")
                self.late.add((self.name, owner, 1))
        return accepted

    # --- the wire ----------------------------------------------------------------------------------------

    def inspect(self) -> list[dict[str, Any]]:
        """All resources in use."""
        found: list[dict[str, Any]] = self._until("", "inspect", {"STATE"})["resources"]
        return found

    def _acquire(self, owner: str, locks: dict[str, str]) -> list[dict[str, Any]]:
        wanted = on_the_wire(locks)
        grants: list[dict[str, Any]] = self._until(owner, "acquire", {"GRANTED"}, locks=wanted)["grants"]
        return grants

    def _until(self, owner: str, operation: str, ends: set[str], **more: Any) -> dict[str, Any]:
        """Ask, and ask again whatever happens to the question, the answer or the broker, until it is answered."""
        request = {"operation": operation, "owner": owner, "leaseSeconds": LEASE_S, **more}
        while True:
            try:
                if (answer := self._ask(f"{operation} {owner}", request, ends)) is not None:
                    return answer
            except (AMQPError, OSError):
                self.close()
                time.sleep(0.2)

    def _ask(self, key: str, request: dict[str, Any], ends: set[str]) -> dict[str, Any] | None:
        channel = self._open()
        properties = pika.BasicProperties(
            content_type="application/json", delivery_mode=2, reply_to=self.name, correlation_id=key
        )
        channel.basic_publish("", f"{PREFIX}.locks", json.dumps(request).encode(), properties)
        for method, sent, body in channel.consume(self.name, inactivity_timeout=1.5):
            if method is None:
                return None
            channel.basic_ack(method.delivery_tag)
            answer = json.loads(body)
            if sent.correlation_id == key and answer["status"] in ends:
                return dict(answer)
            if sent.correlation_id == key and answer["status"] in {"EXPIRED", "REFUSED"}:
                return None
        return None

    def _open(self) -> Any:
        if self._channel is None:
            self._connection = pika.BlockingConnection(pika.URLParameters(self._url))
            self._channel = self._connection.channel()
            self._channel.queue_declare(self.name, durable=True, arguments={"x-queue-type": self._queue_type})
        return self._channel

    def close(self) -> None:
        """Hang up."""
        connection, self._connection, self._channel = self._connection, None, None
        if connection is not None:
            with contextlib.suppress(AMQPError, OSError):
                connection.close()


def instant(timestamp: str) -> float:
    """Seconds since the epoch of what the wire says."""
    return datetime.fromisoformat(timestamp).timestamp()


@dataclass(frozen=True)
class End:
    """How a job ended, by its ledger."""

    status: str
    sequence: int
    attempt: int
    word: str
    """The type of its error, else its status."""


# --- the checks ----------------------------------------------------------------------------------------------


def check_resource(resource: str, lines: list[Line], excused: set[Grant]) -> None:
    """Nobody was at work together with whom it excludes, no older number came after a newer, none came twice."""
    numbers: dict[int, Grant] = {}
    at_work: dict[Grant, Line] = {}
    newest = {"SHARED": 0, "EXCLUSIVE": 0}
    for line in lines:
        where = f"seed {SEED}: {resource}: {line}"
        assert numbers.setdefault(line.number, line.grant) == line.grant, f"{where}: number given twice"
        if not line.accepted:
            assert line.grant in excused, f"{where}: refused, though it did not lose its lock"
            continue
        older_than = max(newest.values()) if line.mode == "EXCLUSIVE" else newest["EXCLUSIVE"]
        assert line.number >= older_than, f"{where}: accepted after {older_than}"
        newest[line.mode] = max(newest[line.mode], line.number)
        for other, begun in list(at_work.items()):
            if other != line.grant and "EXCLUSIVE" in (begun.mode, line.mode):
                assert other in excused, f"{where}: while {begun} was at work"
                del at_work[other]
        at_work[line.grant] = line
        if line.what == "end":
            del at_work[line.grant]
    left = {grant for grant in at_work if grant not in excused}
    assert not left, f"seed {SEED}: {resource}: {left} never ended"


def check_numbers(ledger: Path) -> Counter[str]:
    """The service's own book: numbers rise with every grant. Returns how holding ended, by reason."""
    connection = sqlite3.connect(ledger)
    newest: dict[str, int] = defaultdict(int)
    granted = "SELECT resource, fencing_token FROM lock_history WHERE event = 'granted' ORDER BY number"
    for resource, number in connection.execute(granted):
        assert number > newest[resource], f"seed {SEED}: {resource}: {number} after {newest[resource]}"
        newest[resource] = number
    reasons = "SELECT reason, count(*) FROM lock_history WHERE event = 'ended' GROUP BY reason"
    return Counter(dict(connection.execute(reasons).fetchall()))


def lapsed(ledger: Path, holders: Iterable[Line]) -> set[Grant]:
    """Those whose lease the service ended, by its own book."""
    connection = sqlite3.connect(ledger)
    over = (
        "SELECT owner, fencing_token FROM lock_history WHERE event = 'ended' AND reason = 'the lease ended'"
    )
    ended = set(connection.execute(over).fetchall())
    return {line.grant for line in holders if (line.owner, line.number) in ended}


def attempts_that_ended_early(holder: str, ends: dict[str, End]) -> set[Grant]:
    """Killed with their daemon, or told that the lock was lost: those that may be at work when the next begins."""
    found = set()
    for name, end in ends.items():
        early = end.attempt if end.word in {"Interrupted", "LockLost"} else end.attempt - 1
        found |= {(holder, name, attempt) for attempt in range(1, early + 1)}
    return found


def check_told(client: Client, ledgers: dict[str, dict[str, End]]) -> Counter[str]:
    """Every job ended as told: what a ledger says last was told, once each number. Returns how they ended."""
    ends: Counter[str] = Counter()
    told = {(each["executionId"], each["sequence"], each["status"]) for each in client.told}
    places: Counter[str] = Counter(name for ledger in ledgers.values() for name in ledger)
    for ledger in ledgers.values():
        for name, end in ledger.items():
            last = name, end.sequence, end.status
            assert end.status in ENDS, f"seed {SEED}: {last}"
            assert last in told, f"seed {SEED}: {last} was not told"
            ends[end.word] += 1
    numbers: dict[str, set[int]] = defaultdict(set)
    for name, number, _ in told:
        numbers[name].add(number)
    for name in (name for name, count in places.items() if count == 1):
        assert numbers[name] == set(range(1, len(numbers[name]) + 1)), f"seed {SEED}: {name}: {numbers[name]}"
    assert len(places) == JOBS, f"seed {SEED}: {len(places)} of {JOBS} jobs are known"
    return ends


# --- the violence --------------------------------------------------------------------------------------------


class Load:
    """Jobs, as many in flight as there may be.

    Args:
        chance: what they want.
    """

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self.submitted = 0
        self.ended: set[str] = set()
        self._looked_at = 0

    def look(self, client: Client) -> int:
        """How many have ended."""
        news, self._looked_at = client.told[self._looked_at :], len(client.told)
        self.ended |= {told["executionId"] for told in news if told["status"] in ENDS}
        return len(self.ended)

    async def submit(self, client: Client, up_to: int) -> None:
        """Submit as the others end."""
        while self.submitted < up_to:
            while self.submitted - self.look(client) >= IN_FLIGHT:
                await asyncio.sleep(0.02)
            action = self._chance.choice(KINDS)
            locks = some_locks(self._chance)
            seconds = self._chance.choice([0, 0, 0.01, 0.02, 0.05])
            modes = [f"{resource}={mode}" for resource, mode in locks.items()]
            configuration = {"seconds": seconds, "modes": modes}
            name = f"{action}-{self.submitted}"
            await client.submit(action, name, configuration, locks=on_the_wire(locks))
            self.submitted += 1


async def kill_now_and_then(
    chance: random.Random, daemons: list[DaemonProcess], client: Client, load: Load, steps: list[int]
) -> None:
    """`kill -9` a daemon whenever so many jobs have ended; the next time it may not even be ready."""
    for step in steps:
        while load.look(client) < step:
            await asyncio.sleep(0.01)
        await asyncio.sleep(chance.uniform(0, 0.3))
        victim = chance.choice(daemons)
        victim.kill()
        await asyncio.sleep(chance.uniform(0, 0.5))
        await asyncio.to_thread(victim.start, ready=chance.random() < 0.5, **_where(victim))


def _where(daemon: DaemonProcess) -> dict[str, str]:
    return {"JEF_TEST_HOLDER": daemon.folder.name, "JEF_TEST_STORE": str(daemon.folder.parent / "store")}


@pytest.fixture
def daemons(own_broker: PrivateBroker, tmp_path: Path, queue_type: str) -> Iterator[list[DaemonProcess]]:
    """Two that know nothing of each other but the prefix; the first is the lock service."""
    (tmp_path / "store").mkdir()
    both = [DaemonProcess(own_broker.url, PREFIX, tmp_path / name) for name in ("one", "two")]
    actions = ACTIONS.format(python=sys.executable, store=store_file.__file__)
    for each in both:
        each.configure(
            actions,
            bus={"reconnect_max_s": 0.5, "queue_type": queue_type},
            slots={"total": SLOTS, "backlog": 40, "blocking_processes": 2},
            locks={
                "lease_s": LEASE_S,
                "start_within_s": 3.0,
                "takeover_grace_s": 3.0,
                "wait_lease_s": 60.0,
                "tell_places_every_s": 5.0,
            },
            logging={"format": "json", "level": "info"},
        )
        each.start(ready=True, **_where(each))
    yield both
    for each in both:
        each.kill()


async def test_nobody_holds_what_another_has(
    own_broker: PrivateBroker, daemons: list[DaemonProcess], queue_type: str, tmp_path: Path
) -> None:
    """2,000 jobs and foreign clients on 20 resources; daemons, lock service and broker are killed meanwhile."""
    print(f"seed {SEED}")
    chance = random.Random(SEED)
    service, other = daemons
    assert any(event["event"] == "locks_kept_elsewhere" for event in other.events())
    names = [f"foreign-{number}" for number in range(FOREIGNERS)]
    foreigners = [Foreigner(own_broker.url, name, str(tmp_path / "store"), queue_type) for name in names]
    for foreigner in foreigners:
        foreigner.start()
    load = Load(chance)
    steps = sorted(chance.sample(range(JOBS // 40, JOBS - IN_FLIGHT), KILLS))
    early, late = steps[: KILLS // 2], steps[KILLS // 2 :]
    middle = (early[-1] + late[0]) // 2
    async with Client(own_broker.url, PREFIX, queue_type) as client:
        killing = asyncio.create_task(kill_now_and_then(chance, daemons, client, load, early))
        await load.submit(client, middle + IN_FLIGHT // 2)
        await killing
    told = client.told
    await asyncio.to_thread(own_broker.kill)
    chance.choice(daemons).kill()
    await asyncio.to_thread(own_broker.start)
    for each in daemons:
        if each.process is not None and each.process.poll() is not None:
            await asyncio.to_thread(each.start, ready=True, **_where(each))
    async with Client(own_broker.url, PREFIX, queue_type) as client:
        client.remember(told)
        load.look(client)
        killing = asyncio.create_task(kill_now_and_then(chance, daemons, client, load, late))
        await load.submit(client, JOBS)
        await killing
        for foreigner in foreigners:
            foreigner.enough()
        await client.until(lambda: load.look(client) == JOBS, 90)
        ledgers = await all_ended(daemons)
        for foreigner in foreigners:
            await asyncio.to_thread(foreigner.join, 60)
            assert not foreigner.is_alive(), f"seed {SEED}: {foreigner.name} still waits"
            assert not foreigner.unlawful, f"seed {SEED}: {foreigner.unlawful}"
        await asyncio.to_thread(nothing_is_held, foreigners[0])
        for each in daemons:
            assert await asyncio.to_thread(each.stop) == 0
            assert "not_all_told" not in {event["event"] for event in each.events()}
        last = {(name, end.sequence) for ledger in ledgers.values() for name, end in ledger.items()}
        await client.until(lambda: last <= {(t["executionId"], t["sequence"]) for t in client.told})
        ends = check_told(client, ledgers)
    assert set(ends) <= {"COMPLETED", "Interrupted", "LockLost"}, f"seed {SEED}: {ends}"
    # One kill more, beside the broker's; a job that was interrupted lost its slot with it.
    assert ends["Interrupted"] + ends["LockLost"] <= (KILLS + 1) * SLOTS + 2 * SLOTS, f"seed {SEED}: {ends}"

    book = service.folder / "data" / "ledger.db"
    store = Store(str(tmp_path / "store"))
    lines = {
        resource: store.lines(resource) for resource in [*RESOURCES, *(f"asset/of-{name}" for name in names)]
    }
    excused = lapsed(book, [line for each in lines.values() for line in each])
    for foreigner in foreigners:
        excused |= foreigner.late
    for holder, ledger in ledgers.items():
        excused |= attempts_that_ended_early(holder, ledger)
    for resource in lines:
        check_resource(resource, lines[resource], excused)
    reasons = check_numbers(book)
    refused = [line for each in lines.values() for line in each if not line.accepted]
    assert len(refused) >= FOREIGNERS, f"seed {SEED}: the store never had to refuse anybody"
    assert reasons["the lease ended"] >= FOREIGNERS
    turns = sum(foreigner.turns for foreigner in foreigners)
    print(f"{dict(ends)}, {turns} turns of foreigners, {len(refused)} refused, {dict(reasons)}")


async def all_ended(daemons: list[DaemonProcess]) -> dict[str, dict[str, End]]:
    """What each ledger has, once nothing in it is open: a request that was redelivered may be in both."""
    ledgers: dict[str, dict[str, End]] = {}
    for each in daemons:
        reader = each.reader()
        async with asyncio.timeout(60):
            while set(reader.count()) - ENDS:
                await asyncio.sleep(0.1)
        ends = ledgers[each.folder.name] = {}
        for execution in reader.page(Filter(), most=JOBS + 100).executions:
            name, status = execution.execution_id, execution.status.value
            error = reader.outcome(name)["error"]["type"] if status == "FAILED" else ""
            ends[name] = End(status, execution.sequence, execution.attempt, error or status)
    return ledgers


def nothing_is_held(foreigner: Foreigner) -> None:
    """Every lock was given back, and nobody waits."""
    until = time.monotonic() + 60
    while in_use := foreigner.inspect():
        assert time.monotonic() < until, f"seed {SEED}: still in use: {in_use}"
        time.sleep(0.2)
    foreigner.close()
