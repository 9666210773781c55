"""Locks as the wire protocol writes them: a client that is not ours (pika), a real broker, `jef run --role locks`."""

from __future__ import annotations

import asyncio
import itertools
import json
import secrets
import signal
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pika
import pytest
from broker import PrivateBroker

from tests.support.amqp import delete_all
from tests.support.process import DaemonProcess
from tests.unit.test_schemas import check

LIMITS = {
    "max_per_request": 4,
    "max_name_length": 40,
    "max_waiters": 3,
    "max_lease_s": 3600,
    "takeover_grace_s": 0.1,
}
Answer = dict[str, Any]


class Foreign:
    """Any AMQP client: requests to `<prefix>.locks`, answers to a queue of its own.

    Args:
        url: the broker's.
        prefix: of the lock service's names.
    """

    def __init__(self, url: str, prefix: str) -> None:
        self.prefix = prefix
        self._connection = pika.BlockingConnection(pika.URLParameters(url))
        self._channel = self._connection.channel()
        self._channel.confirm_delivery()
        self.queue: str = self._channel.queue_declare("", exclusive=True).method.queue
        self._channel.basic_consume(self.queue, self._take, auto_ack=True)
        self._numbers = itertools.count(1)
        self._owners: set[str] = set()
        self.answers: list[tuple[str | None, Answer, Any]] = []
        """Correlation id, body and properties of what has come, in order."""

    def _take(self, channel: Any, method: Any, properties: Any, body: bytes) -> None:
        self.answers.append((properties.correlation_id, json.loads(body), properties))

    def send(self, body: bytes, correlation_id: str | None, *, reply: bool = True) -> None:
        """Any bytes, persistent, confirmed."""
        properties = pika.BasicProperties(
            content_type="application/json",
            delivery_mode=2,
            correlation_id=correlation_id,
            reply_to=self.queue if reply else None,
        )
        self._channel.basic_publish("", f"{self.prefix}.locks", body, properties)

    def ask(
        self, operation: str, owner: str | None = None, *locks: str, reply: bool = True, **more: Any
    ) -> str:
        """Send a request (`x` is SHARED, `x!` EXCLUSIVE); returns its correlation id."""
        correlation_id = f"c{next(self._numbers)}"
        named = [
            {"resource": x.rstrip("!"), "mode": "EXCLUSIVE" if x.endswith("!") else "SHARED"} for x in locks
        ]
        self._owners |= {owner} if owner else set()
        message = {"operation": operation, **({"owner": owner} if owner else {}), **more}
        if named:
            message["locks"] = named
        self.send(json.dumps(message).encode(), correlation_id, reply=reply)
        return correlation_id

    def answer(self, correlation_id: str, number: int = 1, within_s: float = 20.0) -> Answer:
        """The first answer, or a later one, to a request."""
        until = time.monotonic() + within_s
        while True:
            found = [body for asked, body, _ in self.answers if asked == correlation_id]
            if len(found) >= number:
                assert check("LockReply", found[number - 1]) == []
                return found[number - 1]
            assert time.monotonic() < until, f"no answer {number} to {correlation_id}: {self.answers}"
            self._connection.process_data_events(0.05)

    def said(self, operation: str, owner: str | None = None, *locks: str, **more: Any) -> Answer:
        """Ask, and wait for the first answer."""
        return self.answer(self.ask(operation, owner, *locks, **more))

    def count(self, correlation_id: str) -> int:
        """How many answers to a request have come, once the service has dealt with all that was asked."""
        self.said("inspect", None, "nobody/wants/this")
        return sum(asked == correlation_id for asked, _, _ in self.answers)

    def dead_letter(self, within_s: float = 20.0) -> tuple[Any, bytes]:
        """The next dead letter: properties and body."""
        until = time.monotonic() + within_s
        while time.monotonic() < until:
            method, properties, body = self._channel.basic_get(f"{self.prefix}.dead-letters", auto_ack=True)
            if method is not None:
                return properties, body
            self._connection.sleep(0.05)
        raise AssertionError("no dead letter")

    def granted(self, correlation_id: str) -> Answer:
        """The grant that a request got. After a crash an answer may come twice: it is told at least once."""
        number = 1
        while (told := self.answer(correlation_id, number))["status"] == "WAITING":
            number += 1
        assert told["status"] == "GRANTED"
        return told

    def release_all(self) -> None:
        """Leave nothing to the next test."""
        for owner in sorted(self._owners):
            self.said("release", owner)

    def close(self) -> None:
        """Leave."""
        self._connection.close()


@pytest.fixture(scope="module")
def service(broker: PrivateBroker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """One lock service for the tests that leave it alone; each has resources of its own."""
    process = lock_service(broker.url, f"t{secrets.token_hex(4)}", tmp_path_factory.mktemp("locks"))
    yield process
    process.kill()
    asyncio.run(delete_all(broker.url, process.prefix))


@pytest.fixture
def own_service(broker: PrivateBroker, prefix: str, tmp_path: Path) -> Iterator[DaemonProcess]:
    """One that may be killed."""
    process = lock_service(broker.url, prefix, tmp_path / "locks")
    yield process
    process.kill()


def lock_service(url: str, prefix: str, folder: Path) -> DaemonProcess:
    process = DaemonProcess(url, prefix, folder)
    process.arguments = ("--role", "locks")
    process.configure(locks=LIMITS)
    process.start()
    return process


@pytest.fixture
def client(service: DaemonProcess) -> Iterator[Foreign]:
    connected = Foreign(service.url, service.prefix)
    yield connected
    connected.release_all()
    connected.close()


@pytest.fixture
def x() -> str:
    """A resource of this test's own."""
    return f"asset/{secrets.token_hex(4)}"


def lease_left(grant: dict[str, Any]) -> float:
    until = datetime.fromisoformat(grant["leaseUntil"])
    return (until - datetime.now(UTC)).total_seconds()


def tokens(answer: Answer) -> list[int]:
    return [grant["fencingToken"] for grant in answer["grants"]]


# --- acquire -----------------------------------------------------------------------------------------------


def test_a_free_lock_is_granted_at_once(client: Foreign, x: str) -> None:
    """With resource, mode, fencing token and the end of the lease; to the request's correlation id."""
    asked = client.ask("acquire", "624", f"{x}!", leaseSeconds=60, wait=True)
    told = client.answer(asked)
    assert told.keys() == {"status", "owner", "grants"}
    assert (told["status"], told["owner"]) == ("GRANTED", "624")
    [grant] = told["grants"]
    assert grant.keys() == {"resource", "mode", "fencingToken", "leaseUntil"}
    assert (grant["resource"], grant["mode"], grant["fencingToken"]) == (x, "EXCLUSIVE", 1)
    assert grant["leaseUntil"].endswith("Z")
    assert 50 < lease_left(grant) <= 60
    properties = client.answers[-1][2]
    assert (properties.content_type, properties.delivery_mode) == ("application/json", 2)
    client.said("release", "624")


def test_a_taken_lock_is_waited_for_and_granted_later(client: Foreign, x: str) -> None:
    """WAITING with position and holders, then GRANTED with the same correlation id."""
    client.said("acquire", "a", f"{x}!")
    second, third = client.ask("acquire", "b", f"{x}!"), client.ask("acquire", "c", x)
    told = client.answer(second)
    assert told == {
        "status": "WAITING",
        "owner": "b",
        "resource": x,
        "mode": "EXCLUSIVE",
        "position": 1,
        "holders": ["a"],
    }
    assert (client.answer(third)["position"], client.answer(third)["mode"]) == (2, "SHARED")
    client.said("release", "a")
    assert (client.answer(second, 2)["status"], tokens(client.answer(second, 2))) == ("GRANTED", [2])
    assert client.count(third) == 1
    client.said("release", "b")
    assert tokens(client.answer(third, 2)) == [3]
    client.said("release", "c")


def test_who_does_not_want_to_wait_is_refused(client: Foreign, x: str) -> None:
    """With a reason and a code, and who holds it; nothing is left in the queue."""
    client.said("acquire", "a", f"{x}!")
    told = client.said("acquire", "b", x, wait=False)
    assert (told["status"], told["code"], told["holders"]) == ("REFUSED", "not-free", ["a"])
    assert x in told["reason"]
    client.said("release", "a")
    assert client.said("inspect", None, x)["resources"][0]["waiters"] == []


def test_many_share_and_neighbours_are_granted_together(client: Foreign, x: str) -> None:
    """A SHARED that comes later never overtakes a waiting EXCLUSIVE."""
    assert client.said("acquire", "s1", x)["status"] == client.said("acquire", "s2", x)["status"] == "GRANTED"
    exclusive = client.ask("acquire", "e", f"{x}!")
    late = [client.ask("acquire", owner, x) for owner in ("s3", "s4")]
    assert [client.answer(asked)["status"] for asked in (exclusive, *late)] == ["WAITING"] * 3
    assert client.answer(exclusive)["holders"] == ["s1", "s2"]
    client.said("release", "s1")
    assert client.count(exclusive) == 1
    client.said("release", "s2")
    assert client.answer(exclusive, 2)["status"] == "GRANTED"
    assert [client.count(asked) for asked in late] == [1, 1]
    client.said("release", "e")
    assert [client.answer(asked, 2)["status"] for asked in late] == ["GRANTED", "GRANTED"]


def test_several_are_granted_together_or_not_at_all(client: Foreign, x: str) -> None:
    """Who waits for one does not hold the others; they come in one answer."""
    client.said("acquire", "a", f"{x}/1!")
    both = client.ask("acquire", "b", f"{x}/2!", f"{x}/1!")
    assert client.answer(both)["resource"] == f"{x}/1"
    assert client.said("acquire", "c", f"{x}/2!")["status"] == "GRANTED"
    client.said("release", "a")
    assert client.count(both) == 1
    client.said("release", "c")
    granted = client.answer(both, 2)
    assert [grant["resource"] for grant in granted["grants"]] == [f"{x}/1", f"{x}/2"]


def test_the_queue_is_first_in_first_out(client: Foreign, x: str) -> None:
    client.said("acquire", "0", f"{x}!")
    waiting = [client.ask("acquire", str(number), f"{x}!") for number in (1, 2, 3)]
    assert [client.answer(asked)["position"] for asked in waiting] == [1, 2, 3]
    for number, asked in enumerate(waiting):
        client.said("release", str(number))
        assert tokens(client.answer(asked, 2)) == [number + 2]


def test_the_same_owner_again_has_the_same_answer_again(client: Foreign, x: str) -> None:
    """Its numbers stay; who waits keeps its place, and is granted at the new address."""
    assert tokens(client.said("acquire", "a", f"{x}!")) == tokens(client.said("acquire", "a", f"{x}!")) == [1]
    first, other = client.ask("acquire", "b", f"{x}!"), client.ask("acquire", "c", f"{x}!")
    again = client.ask("acquire", "b", f"{x}!")
    assert client.answer(first) == client.answer(again)
    client.said("release", "a")
    assert client.answer(again, 2)["status"] == "GRANTED"
    assert (client.count(first), client.count(other)) == (1, 1)


def test_a_resource_named_twice_is_taken_in_the_stronger_mode(client: Foreign, x: str) -> None:
    [grant] = client.said("acquire", "a", x, f"{x}!", x)["grants"]
    assert grant["mode"] == "EXCLUSIVE"


def test_shared_is_not_upgraded_while_it_is_held(client: Foreign, x: str) -> None:
    """Two that did would wait for each other for ever."""
    client.said("acquire", "a", x)
    told = client.said("acquire", "a", f"{x}!")
    assert (told["status"], told["code"]) == ("REFUSED", "upgrade")
    assert "SHARED" in told["reason"]
    assert client.said("renew", "a")["status"] == "RENEWED"


@pytest.mark.parametrize(
    ("owner", "locks", "more", "named"),
    [
        ("a", [f"l/{number}" for number in range(5)], {}, "4"),
        ("a", ["x" * 41], {}, "40"),
        ("a" * 41, ["l"], {}, "40"),
        ("a", ["l"], {"leaseSeconds": 3601}, "3600"),
        ("a", ["l"], {"leaseSeconds": 0.5}, "1"),
        ("a", ["l"], {"leaseSeconds": -1}, "1"),
        ("a", [], {}, "no resource"),
        ("a", [""], {}, "empty"),
    ],
)
def test_a_refusal_names_the_limit(
    client: Foreign, owner: str, locks: list[str], more: dict[str, Any], named: str
) -> None:
    told = client.said("acquire", owner, *locks, **more)
    assert (told["status"], told["code"]) == ("REFUSED", "limit")
    assert named in told["reason"]


def test_no_more_wait_than_the_limit(client: Foreign, x: str) -> None:
    for owner in "abcd":
        client.said("acquire", owner, f"{x}!")
    told = client.said("acquire", "e", f"{x}!")
    assert (told["status"], told["code"]) == ("REFUSED", "limit")
    assert "3" in told["reason"]


# --- renew, release, cancel, inspect -----------------------------------------------------------------------


def test_a_renewal_prolongs_the_lease(client: Foreign, x: str) -> None:
    client.said("acquire", "a", f"{x}!", leaseSeconds=10)
    told = client.said("renew", "a", leaseSeconds=100)
    assert told["status"] == "RENEWED"
    assert (tokens(told), 90 < lease_left(told["grants"][0]) <= 100) == ([1], True)
    assert client.said("acquire", "b", f"{x}!")["status"] == "WAITING"
    assert client.said("renew", "b")["status"] == "WAITING"


def test_what_is_not_held_cannot_be_renewed(client: Foreign, x: str) -> None:
    client.said("acquire", f"{x}a", f"{x}!")
    told = client.said("renew", f"{x}a", x, f"{x}/other")
    assert (told["status"], told["lost"], [g["resource"] for g in told["grants"]]) == (
        "LOST",
        [f"{x}/other"],
        [x],
    )
    assert client.said("renew", f"{x}nobody")["status"] == "LOST"


def test_many_owners_are_renewed_at_once(client: Foreign, x: str) -> None:
    """Those that hold, those that lost; who waits is in neither."""
    client.said("acquire", f"{x}a", f"{x}!")
    client.said("acquire", f"{x}b", f"{x}!")
    told = client.said("renew", owners=[f"{x}a", f"{x}b", f"{x}c"], leaseSeconds=60)
    assert told == {"status": "KEPT", "owner": "", "held": [f"{x}a"], "lost": [f"{x}c"]}


def test_a_release_can_be_repeated(client: Foreign, x: str) -> None:
    """The first names what was given up; the others are told the same status."""
    client.said("acquire", "a", f"{x}!")
    first = client.said("release", "a")
    assert (first["status"], [grant["resource"] for grant in first["grants"]]) == ("RELEASED", [x])
    assert (
        client.said("release", "a") == client.said("release", "a", x) == {"status": "RELEASED", "owner": "a"}
    )
    assert tokens(client.said("acquire", "b", f"{x}!")) == [2]


def test_some_of_several_can_be_released(client: Foreign, x: str) -> None:
    client.said("acquire", "a", f"{x}/1!", f"{x}/2!")
    waits = client.ask("acquire", "b", f"{x}/1!")
    assert client.answer(waits)["status"] == "WAITING"
    client.said("release", "a", f"{x}/1")
    assert client.answer(waits, 2)["status"] == "GRANTED"
    assert [grant["resource"] for grant in client.said("renew", "a")["grants"]] == [f"{x}/2"]


def test_who_cancels_leaves_the_queue(client: Foreign, x: str) -> None:
    """The request that waited is told; those behind come forward. Again it is the same."""
    client.said("acquire", "a", x)
    waits, behind = client.ask("acquire", "b", f"{x}!"), client.ask("acquire", "c", x)
    assert client.answer(behind)["position"] == 2
    assert client.said("cancel", "b")["status"] == "CANCELLED"
    assert client.answer(waits, 2)["status"] == "CANCELLED"
    assert client.answer(behind, 2)["status"] == "GRANTED"
    assert client.said("cancel", "b")["status"] == "CANCELLED"


def test_a_cancel_that_crosses_the_grant_is_told_what_is_held(client: Foreign, x: str) -> None:
    client.said("acquire", f"{x}a", f"{x}!")
    told = client.said("cancel", f"{x}a")
    assert (told["status"], tokens(told)) == ("GRANTED", [1])
    assert "release" in told["reason"]


def test_holders_and_waiters_can_be_looked_at(client: Foreign, x: str) -> None:
    """Of one resource, or of all in pages by name."""
    client.said("acquire", "a", f"{x}!")
    client.said("acquire", "b", x)
    [state] = client.said("inspect", None, x)["resources"]
    assert (state["resource"], state["fencingToken"], state["waiting"]) == (x, 1, 1)
    [holder] = state["holders"]
    assert (holder["owner"], holder["mode"], holder["fencingToken"]) == ("a", "EXCLUSIVE", 1)
    assert holder.keys() == {"owner", "resource", "mode", "fencingToken", "leaseUntil", "grantedAt"}
    [waiter] = state["waiters"]
    assert (waiter["owner"], waiter["mode"]) == ("b", "SHARED")
    everything = client.said("inspect")
    assert everything["status"] == "STATE"
    assert x in [one["resource"] for one in everything["resources"]]
    assert x not in [one["resource"] for one in client.said("inspect", after=x)["resources"]]


def test_an_operator_takes_a_lock_away(client: Foreign, x: str) -> None:
    """The holder is told who and why; without a reason it is refused."""
    holds = client.ask("acquire", "a", f"{x}!")
    waits = client.ask("acquire", "b", f"{x}!")
    assert client.said("force-release", None, x)["code"] == "reason-missing"
    told = client.said("force-release", None, x, reason="stuck", by="ann")
    assert told["status"] == "RELEASED"
    revoked = client.answer(holds, 2)
    assert (revoked["status"], revoked["lost"]) == ("REVOKED", [x])
    assert "ann" in revoked["reason"]
    assert "stuck" in revoked["reason"]
    assert tokens(client.answer(waits, 2)) == [2]
    assert client.said("renew", "a", x)["status"] == "LOST"


# --- leases, crashes, nonsense -----------------------------------------------------------------------------


def test_a_lease_that_ends_is_told_and_fenced(client: Foreign, x: str) -> None:
    """The holder hears EXPIRED, the next has a higher number; a place in the queue has a lease as well."""
    holds = client.ask("acquire", f"{x}a", f"{x}!", leaseSeconds=1)
    client.answer(holds)
    waits = client.ask("acquire", f"{x}b", f"{x}!", leaseSeconds=60)
    expired = client.answer(holds, 2)
    assert (expired["status"], expired["lost"], tokens(expired)) == ("EXPIRED", [x], [1])
    assert tokens(client.answer(waits, 2)) == [2]
    assert client.said("renew", f"{x}a")["status"] == "LOST"
    dies = client.ask("acquire", f"{x}c", f"{x}!", leaseSeconds=60, waitLeaseSeconds=1)
    assert client.answer(dies)["status"] == "WAITING"
    assert client.answer(dies, 2)["status"] == "EXPIRED"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"\xff{", "not-json"),
        (b'"acquire"', "not-an-object"),
        (b'{"operation": "steal", "owner": "a"}', "field-invalid"),
        (
            b'{"operation": "acquire", "owner": "a", "locks": [{"resource": "x", "mode": "BOTH"}]}',
            "field-invalid",
        ),
        (b'{"operation": "acquire", "locks": [{"resource": "x"}]}', "field-invalid"),
        (b'{"operation": "inspect", "x": "' + b"y" * 1024 * 1024 + b'"}', "body-too-long"),
    ],
    ids=["no JSON", "no object", "operation", "mode", "no owner", "too long"],
)
def test_what_is_no_request_is_kept_and_answered(client: Foreign, body: bytes, reason: str) -> None:
    """A dead letter, unharmed, with a code and a sentence; REFUSED to who asked; the service goes on."""
    client.send(body, "wrong")
    told = client.answer("wrong")
    assert (told["status"], told["code"]) == ("REFUSED", "malformed")
    assert told["reason"].startswith(f"{reason}: ")
    properties, kept = client.dead_letter()
    assert kept == body
    assert properties.headers["x-jef-reason"] == reason
    assert properties.headers["x-jef-detail"]
    assert (properties.correlation_id, properties.reply_to) == ("wrong", client.queue)
    client.send(body, None, reply=False)
    assert client.dead_letter()[1] == body
    assert client.said("inspect")["status"] == "STATE"


def test_who_names_no_queue_is_served_all_the_same(client: Foreign, x: str) -> None:
    """It learns nothing; others do."""
    client.ask("acquire", "quiet", f"{x}!", reply=False)
    assert client.said("acquire", "b", x, wait=False)["holders"] == ["quiet"]


def test_an_answer_that_nobody_can_be_told_stops_nothing(
    client: Foreign, service: DaemonProcess, x: str
) -> None:
    """A client that left with its queue; what it holds ends with its lease."""
    gone = Foreign(service.url, service.prefix)
    gone.said("acquire", f"{x}gone", f"{x}!", leaseSeconds=1)
    gone.ask("acquire", f"{x}too", f"{x}!", leaseSeconds=1)
    gone.close()
    waits = client.ask("acquire", "b", f"{x}!")
    assert client.answer(waits, 2)["status"] == "GRANTED"


def test_everything_survives_the_death_of_the_service(own_service: DaemonProcess) -> None:
    """Kill -9: who held holds, who waited waits in its place, and the numbers go on."""
    client = Foreign(own_service.url, own_service.prefix)
    for number in (1, 2):
        assert tokens(client.said("acquire", "a", "x!")) == [number]
        client.said("release", "a")
    holds = client.ask("acquire", "a", "x!", leaseSeconds=300)
    waits = [client.ask("acquire", owner, "x!", leaseSeconds=300) for owner in "bc"]
    assert [client.answer(asked)["status"] for asked in (holds, *waits)] == ["GRANTED", "WAITING", "WAITING"]
    own_service.kill()
    own_service.start()
    assert tokens(client.said("renew", "a")) == [3]
    client.said("release", "a")
    assert tokens(client.granted(waits[0])) == [4]
    client.said("release", "b")
    assert tokens(client.granted(waits[1])) == [5]
    client.close()


def test_a_request_whose_answer_was_never_sent_is_answered_by_the_next(own_service: DaemonProcess) -> None:
    """Killed with requests in its hands; and those that came while nobody was there, in order."""
    client = Foreign(own_service.url, own_service.prefix)
    client.said("acquire", "a", "x!", leaseSeconds=300)
    own_service.signal(signal.SIGSTOP)
    inside = [client.ask("release", "a"), client.ask("acquire", "b", "x!", leaseSeconds=300)]
    time.sleep(0.3)  # they are on their way to a process that will never read them
    own_service.kill()
    outside = client.ask("acquire", "c", "x!", leaseSeconds=300)
    own_service.start()
    assert client.answer(inside[0])["status"] == "RELEASED"
    assert tokens(client.answer(inside[1])) == [2]
    assert (client.answer(outside)["status"], client.answer(outside)["holders"]) == ("WAITING", ["b"])
    client.close()
