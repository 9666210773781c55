"""Locks on a real broker with a real daemon: its own jobs, and clients that only know the wire protocol."""

from __future__ import annotations

import asyncio
import json
import secrets
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import aio_pika
import pytest
from broker import PrivateBroker

from tests.support.amqp import Client, delete_all
from tests.support.process import DaemonProcess

ACTIONS = """
[actions.locked]
executor = "tests.support.executors:Locked"
[actions.locked-blocking]
executor = "tests.support.executors:LockedBlocking"
[actions.locked-command]
command = ["sh", "-c", 'printenv JEF_FENCING_TOKENS > "$0"', "{configuration.path}"]
"""
LOCKS: dict[str, Any] = {"tell_places_every_s": 0.2, "takeover_grace_s": 0.5, "lease_s": 20.0}

Another = Callable[..., DaemonProcess]


@pytest.fixture
def another(daemon: DaemonProcess, tmp_path: Path) -> Iterator[Another]:
    """Makes further daemons on the same prefix, each with a ledger of its own."""
    made: list[DaemonProcess] = []

    def make(name: str, *arguments: str, **sections: dict[str, Any]) -> DaemonProcess:
        process = DaemonProcess(daemon.url, daemon.prefix, tmp_path / name)
        process.arguments = arguments
        process.configure(ACTIONS, **{"locks": LOCKS, **sections})
        made.append(process)
        return process

    yield make
    for process in made:
        process.kill()


@pytest.fixture(scope="module")
def shared(broker: PrivateBroker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """One daemon for the tests that leave it alone; their jobs and resources have names of their own."""
    process = DaemonProcess(broker.url, f"t{secrets.token_hex(4)}", tmp_path_factory.mktemp("shared"))
    process.configure(ACTIONS, locks=LOCKS)
    process.start()
    yield process
    process.kill()
    asyncio.run(delete_all(broker.url, process.prefix))


@pytest.fixture
async def hearing(shared: DaemonProcess) -> AsyncIterator[Client]:
    """A client that hears it."""
    async with Client(shared.url, shared.prefix) as connected:
        yield connected


async def ask_service(client: Client, **message: Any) -> None:
    """What an operator says to the lock service, with no wish to be answered."""
    body = aio_pika.Message(json.dumps(message).encode(), delivery_mode=2)
    await client.channel.default_exchange.publish(body, f"{client.prefix}.locks")


async def is_told(client: Client, execution_id: str, status: str) -> None:
    """Wait until a status of a job was told."""
    await client.until(lambda: status in client.statuses(execution_id))


def places(client: Client, execution_id: str) -> list[int]:
    """Positions in the queue that a job was told, in order."""
    return [told["waitingFor"]["position"] for told in client.of(execution_id) if told.get("waitingFor")]


def lock(resource: str, mode: str = "EXCLUSIVE") -> dict[str, str]:
    return {"resource": resource, "mode": mode}


def overlaps(client: Client, one: str, other: str) -> bool:
    """Whether two jobs were RUNNING at the same time, by the times they were told at."""
    spans = []
    for name in (one, other):
        told = client.of(name)
        begin = next(each["timestamp"] for each in told if each["status"] == "RUNNING")
        spans.append((begin, told[-1]["timestamp"]))
    first, second = sorted(spans)
    return bool(second[0] < first[1])


async def test_two_jobs_with_one_lock_run_one_after_the_other(hearing: Client) -> None:
    """The second waits, is told for what and behind whom, and runs when the first has ended."""
    await hearing.submit("slow", "pair-1", {"seconds": 1.0}, locks=[lock("pair/42")])
    await hearing.until(lambda: "RUNNING" in hearing.statuses("pair-1"))
    await hearing.submit("slow", "pair-2", {"seconds": 0.1}, locks=[lock("pair/42")])
    await hearing.submit("slow", "pair-3", {"seconds": 0.1}, locks=[lock("pair/43")])
    await hearing.end_of("pair-2")
    assert (await hearing.end_of("pair-3"))["status"] == "COMPLETED"
    assert hearing.statuses("pair-2")[:3] == ["QUEUED", "WAITING_FOR_LOCK", "RUNNING"]
    waiting = hearing.of("pair-2")[1]
    assert waiting["waitingFor"] == {
        "resource": "pair/42",
        "mode": "EXCLUSIVE",
        "position": 1,
        "holders": ["pair-1"],
    }
    assert not overlaps(hearing, "pair-1", "pair-2")
    assert "WAITING_FOR_LOCK" not in hearing.statuses("pair-3")


# --- waiting -------------------------------------------------------------------------------------------------


async def test_those_that_wait_are_told_when_the_queue_moves(hearing: Client) -> None:
    """Each position once, with who holds it now; then they run, first in, first out."""
    for number in range(4):
        await hearing.submit("locked", f"place-{number}", {"seconds": 0.8}, locks=[lock("place/1")])
        await hearing.until(lambda name=f"place-{number}": len(hearing.of(name)) > 1)  # type: ignore[misc]
    assert (await hearing.end_of("place-3"))["status"] == "COMPLETED"
    assert places(hearing, "place-0") == []
    for number in (1, 2, 3):
        told = places(hearing, f"place-{number}")
        assert (told[0], told[-1]) == (number, 1)
        assert told == sorted(set(told), reverse=True)
    holders = [told["waitingFor"]["holders"] for told in hearing.of("place-3") if told.get("waitingFor")]
    assert (holders[0], holders[-1]) == (["place-0"], ["place-2"])
    tokens = [
        hearing.of(f"place-{number}")[-1]["jobContextVariables"]["tokens"]["place/1"][1]
        for number in range(4)
    ]
    assert tokens == [1, 2, 3, 4]


async def test_a_queue_that_moves_fast_is_told_now_and_then(hearing: Client) -> None:
    """Not with every step: the last of many hears a few of its places, each lower."""
    await hearing.submit("locked", "fast-first", {"seconds": 2.0}, locks=[lock("fast/1")])
    await is_told(hearing, "fast-first", "RUNNING")
    for number in range(40):
        await hearing.submit("locked", f"fast-{number}", {"seconds": 0}, locks=[lock("fast/1")])
    await hearing.end_of("fast-39")
    told = places(hearing, "fast-39")
    assert told[0] == 40
    assert told == sorted(set(told), reverse=True)
    assert len(told) < 25


async def test_shared_run_together_and_exclusive_alone(hearing: Client) -> None:
    """Also those that wait behind it."""
    for name, mode in (
        ("shared-s1", "SHARED"),
        ("shared-s2", "SHARED"),
        ("shared-e", "EXCLUSIVE"),
        ("shared-s3", "SHARED"),
        ("shared-s4", "SHARED"),
    ):
        await hearing.submit("locked", name, {"seconds": 1.0}, locks=[lock("shared/1", mode)])
        await hearing.until(lambda name=name: len(hearing.of(name)) > 1)  # type: ignore[misc]
    for name in ("shared-e", "shared-s3", "shared-s4"):
        await hearing.end_of(name)
    assert overlaps(hearing, "shared-s1", "shared-s2")
    assert overlaps(hearing, "shared-s3", "shared-s4")
    assert not any(
        overlaps(hearing, "shared-e", name) for name in ("shared-s1", "shared-s2", "shared-s3", "shared-s4")
    )


async def test_several_locks_are_held_together_or_not_at_all(hearing: Client) -> None:
    """Who waits for one of them leaves the other to those that can use it."""
    await hearing.submit("locked", "several-a", {"seconds": 1.5}, locks=[lock("several/1")])
    await is_told(hearing, "several-a", "RUNNING")
    await hearing.submit("locked", "several-b", {}, locks=[lock("several/2"), lock("several/1", "SHARED")])
    await is_told(hearing, "several-b", "WAITING_FOR_LOCK")
    await hearing.submit("locked", "several-c", {}, locks=[lock("several/2")])
    await hearing.end_of("several-c")
    assert hearing.statuses("several-b") == ["QUEUED", "WAITING_FOR_LOCK"]
    end = await hearing.end_of("several-b")
    assert end["jobContextVariables"]["tokens"] == {"several/1": ["SHARED", 2], "several/2": ["EXCLUSIVE", 2]}
    assert not overlaps(hearing, "several-a", "several-b")


async def test_a_request_beyond_the_limits_fails_the_job(hearing: Client) -> None:
    """With the service's sentence, which names the limit."""
    await hearing.submit("locked", "limit-1", {}, locks=[lock(f"limit/{number}") for number in range(65)])
    end = await hearing.end_of("limit-1")
    assert (end["status"], end["error"]["type"]) == ("FAILED", "LockRefused")
    assert "64" in end["error"]["message"]


# --- holding -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("action", ["locked", "locked-blocking"])
async def test_an_executor_sees_its_fencing_tokens(hearing: Client, action: str) -> None:
    """Resource, mode and number; the next job's is higher."""
    for number in (1, 2):
        locks = [lock(f"{action}/1"), lock(f"{action}/2", "SHARED")]
        await hearing.submit(action, f"{action}-{number}", {}, locks=locks)
        end = await hearing.end_of(f"{action}-{number}")
        tokens = {f"{action}/1": ["EXCLUSIVE", number], f"{action}/2": ["SHARED", number]}
        assert end["jobContextVariables"] == {"tokens": tokens, "lost": False}


async def test_a_command_has_its_fencing_tokens_in_the_environment(hearing: Client, tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    await hearing.submit("locked-command", "command-1", {"path": str(path)}, locks=[lock("command/1")])
    assert (await hearing.end_of("command-1"))["status"] == "COMPLETED"
    assert json.loads(path.read_text()) == {"command/1": 1}


async def test_a_job_whose_lock_is_taken_away_is_stopped(hearing: Client, shared: DaemonProcess) -> None:
    """FAILED, with who did it and why; its `finally` blocks know; the next has the lock."""
    await hearing.submit("locked", "taken-1", {"seconds": 60}, locks=[lock("taken/1")])
    await hearing.submit("locked-blocking", "taken-2", {"seconds": 60}, locks=[lock("taken/2")])
    await is_told(hearing, "taken-1", "RUNNING")
    await is_told(hearing, "taken-2", "RUNNING")
    await hearing.submit("locked", "taken-3", {}, locks=[lock("taken/1")])
    for resource in ("taken/1", "taken/2"):
        locks = [{"resource": resource}]
        await ask_service(hearing, operation="force-release", locks=locks, reason="stuck", by="ann")
    for name in ("taken-1", "taken-2"):
        end = await hearing.end_of(name)
        assert (end["status"], end.get("error", {}).get("type")) == ("FAILED", "LockLost"), hearing.of(name)
        assert "ann" in end["error"]["message"]
    assert (await hearing.end_of("taken-3"))["jobContextVariables"]["tokens"] == {"taken/1": ["EXCLUSIVE", 2]}
    assert Path(f"{shared.trace}.taken-1.lost").exists()


async def test_a_job_may_rather_be_told_that_it_lost_its_lock(daemon: DaemonProcess, client: Client) -> None:
    """`on_lost = "tell"`: it goes on and sees `context.lock_lost`, in whatever process it runs."""
    daemon.configure(ACTIONS, locks={**LOCKS, "on_lost": "tell"})
    daemon.start()
    for name, action in (("1", "locked"), ("2", "locked-blocking")):
        await client.submit(action, name, {"seconds": 60}, locks=[lock(f"asset/{name}")])
        await is_told(client, name, "RUNNING")
        locks = [{"resource": f"asset/{name}"}]
        await ask_service(client, operation="force-release", locks=locks, reason="stuck")
        end = await client.end_of(name)
        assert (end["status"], end["jobContextVariables"]["lost"]) == ("COMPLETED", True)


async def test_a_job_is_stopped_when_nobody_renews_its_lease(
    daemon: DaemonProcess, client: Client, another: Another
) -> None:
    """By the daemon's own clock: a lock service that says nothing may have given the lock to others."""
    service = another("service", "--role", "locks")
    service.start()
    daemon.arguments = ("--role", "worker")
    daemon.configure(ACTIONS, locks={**LOCKS, "lease_s": 5.0})
    daemon.start()
    await client.submit("locked", "1", {"seconds": 60}, locks=[lock("asset/1")])
    await is_told(client, "1", "RUNNING")
    service.signal(signal.SIGSTOP)
    end = await client.end_of("1", 20)
    assert (end["status"], end["error"]["type"]) == ("FAILED", "LockLost")
    assert "no word from the lock service" in end["error"]["message"]


async def test_a_running_job_keeps_its_lock_beyond_the_lease(daemon: DaemonProcess, client: Client) -> None:
    """Renewed long before it ends; a job that waits meanwhile goes on waiting."""
    daemon.configure(ACTIONS, locks={**LOCKS, "lease_s": 5.0, "start_within_s": 1.0})
    daemon.start()
    await client.submit("locked", "1", {"seconds": 5.5}, locks=[lock("asset/1")])
    await is_told(client, "1", "RUNNING")
    await client.submit("locked", "2", {}, locks=[lock("asset/1")])
    assert (await client.end_of("2"))["status"] == client.of("1")[-1]["status"] == "COMPLETED"
    assert not overlaps(client, "1", "2")


# --- daemons that end, several daemons -----------------------------------------------------------------------


async def test_after_kill_9_locks_go_on(daemon: DaemonProcess, client: Client, tmp_path: Path) -> None:
    """What ran gives its lock up or runs again behind the others; what waited runs in its order, one at a time."""
    daemon.configure(ACTIONS, locks=LOCKS)
    daemon.start()
    store = {"store": str(tmp_path / "store")}
    await client.submit("again", "1", {"seconds": 2}, locks=[lock("asset/1")])
    await client.submit("slow", "2", {"seconds": 60}, locks=[lock("asset/2")])
    await is_told(client, "1", "RUNNING")
    await is_told(client, "2", "RUNNING")
    for name in ("3", "4"):
        await client.submit("locked", name, {"seconds": 0.3, **store}, locks=[lock("asset/1")])
        await is_told(client, name, "WAITING_FOR_LOCK")
    await client.submit("locked", "5", {}, locks=[lock("asset/2")])
    await is_told(client, "5", "WAITING_FOR_LOCK")
    daemon.kill()
    daemon.start()
    assert (await client.end_of("2"))["error"]["type"] == "Interrupted"
    ends = [await client.end_of(name) for name in ("1", "3", "4", "5")]
    assert [end["status"] for end in ends] == ["COMPLETED"] * 4
    assert ends[0]["attempt"] == 2
    tokens = [end["jobContextVariables"]["tokens"] for end in ends[1:]]
    assert tokens == [
        {"asset/1": ["EXCLUSIVE", 2]},
        {"asset/1": ["EXCLUSIVE", 3]},
        {"asset/2": ["EXCLUSIVE", 2]},
    ]
    assert [name for name, _ in daemon.starts() if name != "5"] == ["1", "2", "3", "4", "1"]


async def test_sigterm_hands_waiting_jobs_to_another_daemon(
    daemon: DaemonProcess, client: Client, another: Another
) -> None:
    """Their places are given up, and taken anew where they go; nothing is left behind that holds others up."""
    another("service", "--role", "locks").start()
    daemon.arguments = ("--role", "worker")
    daemon.configure(ACTIONS, locks=LOCKS, shutdown={"drain_s": 0.5, "flush_s": 5.0})
    daemon.start()
    await client.submit("locked", "1", {"seconds": 60}, locks=[lock("asset/1")])
    await is_told(client, "1", "RUNNING")
    for name in ("2", "3"):
        await client.submit("locked", name, {}, locks=[lock("asset/1")])
        await is_told(client, name, "WAITING_FOR_LOCK")
    assert await asyncio.to_thread(daemon.stop) == 0
    assert (await client.end_of("1"))["error"]["type"] == "Interrupted"
    second = another("second", "--role", "worker")
    second.start()
    for name in ("2", "3"):
        end = await client.end_of(name)
        assert end["status"] == "COMPLETED"
        sequences = [told["sequence"] for told in client.told if told["executionId"] == name]
        assert sequences == sorted(set(sequences))
    assert sorted(name for name, _ in second.starts()) == ["2", "3"]
    assert [name for name, _ in daemon.starts()] == ["1"]


async def test_two_daemons_contend_through_one_lock_service(
    daemon: DaemonProcess, client: Client, another: Another, tmp_path: Path
) -> None:
    """The second's ledger is not where the locks are kept: it asks the first; no two ever write at a time."""
    few: dict[str, Any] = {"total": 3, "backlog": 4}
    daemon.configure(ACTIONS, locks=LOCKS, slots=few)
    daemon.start()
    second = another("second", slots=few)
    second.start()
    second.wait_for("locks_kept_elsewhere")
    assert not [event for event in daemon.events() if event["event"] == "locks_kept_elsewhere"]
    names = [f"job-{number}" for number in range(40)]
    for number, name in enumerate(names):
        resource = f"asset-{number % 3}"
        configuration = {"seconds": 0.05, "store": str(tmp_path / resource)}
        await client.submit("locked", name, configuration, locks=[lock(resource)])
    ends = [await client.end_of(name, 60) for name in names]
    assert [end.get("error") for end in ends if end["status"] != "COMPLETED"] == []
    started = [name for process in (daemon, second) for name, _ in process.starts()]
    assert sorted(started) == sorted(names)
    assert daemon.starts()
    assert second.starts()
    for number in range(3):
        mine = ends[number::3]
        tokens = [end["jobContextVariables"]["tokens"][f"asset-{number}"][1] for end in mine]
        assert len(set(tokens)) == len(mine)


# --- answers to others --------------------------------------------------------------------------------------


async def test_answers_to_others_leave_the_outbox(daemon: DaemonProcess, client: Client) -> None:
    """A transaction that tells nobody but a foreign client is confirmed as any other, and not told again."""
    daemon.start()
    answers = await client.channel.declare_queue(exclusive=True)
    request = aio_pika.Message(b'{"operation": "inspect"}', reply_to=answers.name, correlation_id="1")
    await client.channel.default_exchange.publish(request, f"{client.prefix}.locks")
    async with asyncio.timeout(20):
        while (answer := await answers.get(fail=False)) is None:
            await asyncio.sleep(0.05)
    assert answer.correlation_id == "1"
    assert await asyncio.to_thread(daemon.stop) == 0
    assert not {"not_all_told", "replies_lost"} & {event["event"] for event in daemon.events()}
