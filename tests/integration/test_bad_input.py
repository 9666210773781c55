"""Bad input: each kind is told in a sentence, nothing is lost, nothing stops."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sqlite3
from collections import Counter
from pathlib import Path
from typing import Any, cast

import pika
import pytest
from broker import PrivateBroker

from tests.support.amqp import Client
from tests.support.process import DaemonProcess

BAD_MESSAGES = {
    "not-json": b"this is no JSON",
    "not-json (cut)": b'{"executionId": "1"',
    "not-json (NaN)": b'{"executionId": "1", "configuration": {"x": NaN}}',
    "not-json (infinite)": b'{"executionId": "1", "configuration": {"x": [1e999]}}',
    "not-json (bytes)": b"\xff\xfe\x00",
    "not-an-object": b'["executionId"]',
    "execution-id-missing": b'{"configuration": {}}',
    "execution-id-malformed": b'{"executionId": "with space"}',
    "execution-id-malformed (number)": b'{"executionId": 624}',
    "field-invalid": b'{"executionId": "bad-1", "priority": "high"}',
    "field-invalid (mode)": b'{"executionId": "bad-2", "locks": [{"resource": "a", "mode": "MINE"}]}',
    "field-invalid (time)": b'{"executionId": "bad-3", "notBefore": "tomorrow"}',
    "field-invalid (clock)": b'{"executionId": "bad-4", "timeouts": {"execution": -1}}',
    "body-too-long": b'{"executionId": "long", "configuration": {"x": "' + b"y" * 1_100_000 + b'"}}',
}


async def test_wrong_messages_become_dead_letters_unharmed(daemon: DaemonProcess, client: Client) -> None:
    """Body and order kept, a stable code, a sentence; where the id can be read, FAILED is told."""
    daemon.start()
    for body in BAD_MESSAGES.values():
        await client.publish("quick", body, headers={"mine": "kept"})
    letters = await client.dead_letters(len(BAD_MESSAGES))
    assert [letter.headers["x-jef-reason"] for letter in letters] == [
        code.split()[0] for code in BAD_MESSAGES
    ]
    assert [letter.body for letter in letters] == list(BAD_MESSAGES.values())
    assert all(letter.headers["x-jef-detail"] and letter.headers["mine"] == "kept" for letter in letters)
    for number, field in enumerate(("priority", "mode", "notBefore", "execution"), 1):
        end = await client.end_of(f"bad-{number}")
        assert (end["status"], end["action"]) == ("FAILED", "quick")
        assert field in end["message"]
    await client.submit("quick", "good")
    assert (await client.end_of("good"))["status"] == "COMPLETED"


NO_TEXT = b"\xff\xfe"
NANOSECONDS = 1_764_000_000_000_000_000
STRANGE: dict[str, tuple[str | bytes, bytes, dict[str, Any]]] = {
    "key of 250 bytes": ("k" * 250, b'{"executionId": "far"}', {}),
    "key that is no text": (NO_TEXT, b'{"executionId": "none"}', {}),
    "correlation id that is no text": ("quick", b'{"executionId": "1"}', {"correlation_id": NO_TEXT}),
    "reply_to that is no text": ("quick", b'{"executionId": "2"}', {"reply_to": NO_TEXT}),
    "time in nanoseconds": ("quick", b'{"executionId": "3"}', {"timestamp": NANOSECONDS}),
    "sequence without end": ("quick", b'{"executionId": "4"}', {"headers": {"x-jef-sequence": 2**63 - 1}}),
    "a frame full of traceparent": (
        "quick",
        b'{"executionId": "5"}',
        {"headers": {"traceparent": "x" * 131_000}},
    ),
    "a frame full of headers": ("quick", b"{", {"headers": {"note": "x" * 131_000, "mine": "kept"}}),
}


async def test_whatever_a_producer_writes_beside_the_body_stops_nothing(
    daemon: DaemonProcess, client: Client, amqp_url: str
) -> None:
    """Each kept or run, and the daemon works on."""
    daemon.start()
    with pika.BlockingConnection(pika.URLParameters(amqp_url)) as connection:
        channel = connection.channel()
        for key, body, properties in STRANGE.values():
            channel.basic_publish(
                f"{client.prefix}.jobs", cast("str", key), body, pika.BasicProperties(**properties)
            )
    await client.submit("quick", "good")
    for name in ("1", "2", "3", "4", "5", "good"):
        assert (await client.end_of(name))["status"] == "COMPLETED"
    for name in ("far", "none"):
        assert (await client.end_of(name))["status"] == "FAILED"
    letters = await client.dead_letters(3)
    reasons = Counter(letter.headers["x-jef-reason"] for letter in letters)
    assert reasons == {"unroutable": 2, "not-json": 1}
    [full] = [letter for letter in letters if letter.headers["x-jef-reason"] == "not-json"]
    assert (full.body, full.headers["mine"]) == (b"{", "kept")
    assert not [event for event in daemon.events() if event["event"] == "broker_lost"]


async def test_an_unknown_action_is_kept_and_told(daemon: DaemonProcess, client: Client) -> None:
    """Unroutable: a dead letter, and FAILED with the reason; replayed once a daemon serves it."""
    daemon.start()
    await client.submit("held", "1", {"text": "hi"})
    end = await client.end_of("1")
    assert "no daemon has served it" in end["message"]
    daemon.stop()
    daemon.configure('[actions.held]\ncommand = ["echo", "{configuration.text}"]\n')
    daemon.start()
    listed = daemon.jef("dead-letters", "list")
    assert "unroutable" in listed.stdout
    assert "1 sent again" in daemon.jef("dead-letters", "replay", "--reason", "unroutable").stdout
    await client.until(lambda: client.statuses("1")[-1:] == ["COMPLETED"])
    assert daemon.jef("dead-letters", "list").stdout == ""


MISBEHAVIOUR = {
    "raise": ("RuntimeError", "on purpose"),
    "exit": ("SystemExit", "3"),
    "cancel": ("CancelledError", ""),
    "nonsense": ("ResponseRefused", "int"),
    "object": ("ResponseRefused", "job_context_variables.x"),
    "nan": ("ResponseRefused", "job_context_variables.x"),
    "deep": ("ResponseRefused", "job_context_variables nest deeper than 100 levels"),
    "huge": ("ResponseRefused", "max_variables_bytes"),
    "os-exit": ("ExecutorCrashed", "process"),
    "segfault": ("ExecutorCrashed", "process"),
}


async def test_executors_that_misbehave_fail_alone(daemon: DaemonProcess, client: Client) -> None:
    """In a coroutine and in a process; the jobs beside them are not disturbed."""
    daemon.configure(slots={"blocking_processes": 2})
    daemon.start()
    await client.submit("blocking", "beside", {"seconds": 3})
    for action in ("misbehave", "broken"):
        for how, (kind, words) in MISBEHAVIOUR.items():
            if action == "misbehave" and kind == "ExecutorCrashed":
                continue  # a coroutine that kills the interpreter kills the daemon; isolation = "process" is for that
            name = f"{action}-{how}"
            await client.submit(action, name, {"how": how})
            end = await client.end_of(name)
            assert end["error"]["type"].rpartition(".")[2] == kind, end
            assert words in end["error"]["message"]
    assert (await client.end_of("beside"))["status"] == "COMPLETED"


async def test_progress_is_always_a_whole_number_from_0_to_100(daemon: DaemonProcess, client: Client) -> None:
    """250, NaN and -5 are cut, not told, and fail nobody."""
    daemon.start()
    await client.submit("misbehave", "1", {"how": "progress"})
    assert (await client.end_of("1"))["status"] == "COMPLETED"
    assert all(isinstance(told["progress"], int) and 0 <= told["progress"] <= 100 for told in client.of("1"))


async def test_a_refused_configuration_names_field_and_reason(daemon: DaemonProcess, client: Client) -> None:
    """QUEUED, RUNNING (the configuration is being processed), FAILED."""
    daemon.start()
    await client.submit("slow", "1", {"seconds": "soon"})
    end = await client.end_of("1")
    assert client.statuses("1") == ["QUEUED", "RUNNING", "FAILED"]
    assert end["error"]["type"] == "ConfigurationRefused"
    assert "seconds" in end["error"]["message"]


async def test_an_executor_that_does_not_import_stops_only_its_action(
    daemon: DaemonProcess, client: Client, tmp_path: Path
) -> None:
    """It is named at the start; its requests wait in their queue until it is mended."""
    (tmp_path / "mending.py").write_text("import nothing_of_that_name\n")
    more = '[actions.held]\nexecutor = "mending:Mended"\n'
    daemon.configure(more)
    text = daemon.configuration.read_text().replace("python_path = [", f'python_path = ["{tmp_path}", ')
    daemon.configuration.write_text(text)
    daemon.start()
    assert "nothing_of_that_name" in daemon.wait_for("action_not_served")["problem"]
    await client.submit("held", "1")
    await client.submit("quick", "2")
    assert (await client.end_of("2"))["status"] == "COMPLETED"
    assert client.of("1") == []
    daemon.stop()
    (tmp_path / "mending.py").write_text("from tests.support.executors import Quick as Mended\n")
    daemon.start()
    assert (await client.end_of("1"))["status"] == "COMPLETED"


def refused(daemon: DaemonProcess, **environment: str) -> tuple[int, str]:
    """Start a daemon that cannot work; its exit code and what it said last."""
    daemon.start(ready=False, **environment)
    code = daemon.wait(60)
    # Behind it Python's own tracker of semaphores may complain that a process which never worked has gone.
    return code, [line for line in daemon.log.read_text().splitlines() if line.startswith("jef: ")][-1]


def tracebacks(daemon: DaemonProcess) -> list[str]:
    """Lines of tracebacks in its log, but for those of Python's tracker of semaphores."""
    lines = daemon.log.read_text().splitlines()
    return [
        line
        for line in lines
        if line.startswith('  File "') and "/multiprocessing/resource_tracker.py" not in line
    ]


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("amqp://guest:wrong@{host}/", "refuses user or password"),
        ("amqp://guest:guest@{host}/nowhere", "no such virtual host"),
    ],
)
def test_a_wrong_login_is_one_sentence(daemon: DaemonProcess, amqp_url: str, url: str, words: str) -> None:
    """Exit code 4, no traceback, no password."""
    host = amqp_url.rpartition("@")[2].rstrip("/")
    code, said = refused(daemon, JEF_AMQP_URL=url.format(host=host))
    assert (code, said.startswith("jef: "), words in said) == (4, True, True), said
    assert "wrong@" not in daemon.log.read_text()
    assert tracebacks(daemon) == []


def test_a_missing_permission_is_one_sentence(
    daemon: DaemonProcess, broker: PrivateBroker, prefix: str
) -> None:
    """What is lacking, on what, and how to grant it."""
    host = broker.url.rpartition("@")[2].rstrip("/")
    broker.ctl("add_user", prefix, "secret")
    try:
        broker.ctl("set_permissions", prefix, "^$", "^$", "^$")
        code, said = refused(daemon, JEF_AMQP_URL=f"amqp://{prefix}:secret@{host}/")
        assert code == 4
        assert "set_permissions" in said
        assert "secret" not in said
    finally:
        broker.ctl("delete_user", prefix)


async def test_a_queue_with_other_arguments_is_named(daemon: DaemonProcess, client: Client) -> None:
    """Which argument, which queue, and the remedy."""
    name = f"{client.prefix}.jobs.quick"
    theirs: dict[str, Any] = {"x-queue-type": "classic", "x-dead-letter-exchange": f"{client.prefix}.dead"}
    await client.channel.declare_queue(name, durable=True, arguments=theirs)
    code, said = await asyncio.to_thread(refused, daemon)
    assert code == 4
    assert name in said
    assert "x-queue-type" in said
    assert 'queue_type = "classic"' in said


async def test_a_broker_that_comes_late_is_waited_for(own_broker: PrivateBroker, tmp_path: Path) -> None:
    """At the start too: one line for the state, not one for each try."""
    own_broker.stop()
    daemon = DaemonProcess(own_broker.url, "late", tmp_path / "late")
    daemon.configure(bus={"reconnect_max_s": 0.3})
    try:
        daemon.start(ready=False)
        await asyncio.to_thread(daemon.wait_for, "broker_unreachable")
        await asyncio.sleep(3)
        await asyncio.to_thread(own_broker.start)
        await asyncio.to_thread(daemon.wait_for, "ready", 0, 60)
        assert len([event for event in daemon.events() if event["event"] == "broker_unreachable"]) <= 4
    finally:
        daemon.kill()


def test_an_operator_bounds_the_wait(daemon: DaemonProcess) -> None:
    """connect_for_s: then one sentence and exit code 4."""
    daemon.configure(bus={"connect_for_s": 1.0, "reconnect_max_s": 0.3})
    code, said = refused(daemon, JEF_AMQP_URL="amqp://127.0.0.1:9/")
    assert code == 4
    assert "no broker answers at amqp://127.0.0.1:9/" in said


def test_a_wrong_setting_is_one_sentence(daemon: DaemonProcess) -> None:
    """The nearest key is named."""
    code, said = refused(daemon, JEF_SLOTS__TOTL="3")
    assert code == 3
    assert "did you mean `slots.total`" in said


def test_a_ledger_that_cannot_be_used_is_one_sentence(daemon: DaemonProcess, tmp_path: Path) -> None:
    """No database, a newer version, a folder that is a file, owned by another daemon."""
    broken = tmp_path / "broken.db"
    broken.write_bytes(b"no database" * 1000)
    code, said = refused(daemon, JEF_LEDGER_URL=f"sqlite:///{broken}")
    assert (code, "no ledger" in said) == (5, True), said
    code, said = refused(daemon, JEF_LEDGER_URL=f"sqlite:///{broken}/inside/ledger.db")
    assert (code, "ledger" in said) == (5, True), said
    daemon.start()
    other = DaemonProcess(daemon.url, daemon.prefix, tmp_path / "other")
    code, said = refused(other, JEF_LEDGER_URL=daemon.ledger_url)
    assert (code, "belongs to the daemon" in said) == (5, True), said
    daemon.stop()
    with sqlite3.connect(daemon.folder / "data" / "ledger.db") as database:
        database.execute("UPDATE alembic_version SET version_num = '9999'")
    code, said = refused(daemon)
    assert (code, "newer" in said) == (5, True), said


def _fill(filler: Path) -> None:
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as stream:
        while stream.write(b"x" * 65536):
            pass


async def test_a_full_disk_stalls_and_loses_nothing(
    daemon: DaemonProcess, client: Client, tmp_path: Path
) -> None:
    """A real full file system under the ledger: told once, waited out, every job ends."""
    mount = tmp_path / "small"
    mount.mkdir()
    if os.geteuid() != 0 or os.system(f"mount -t tmpfs -o size=8m tmpfs {mount} 2>/dev/null") != 0:
        pytest.skip("mounting a small file system takes root")
    try:
        daemon.start(JEF_LEDGER_URL=f"sqlite:///{mount}/ledger.db")
        filler = mount / "filler"
        _fill(filler)
        for number in range(20):
            await client.submit("quick", str(number), {"result": "y" * 20_000})
        problem = await asyncio.to_thread(daemon.wait_for, "ledger_unavailable")
        assert "disk is full" in problem["detail"]
        filler.unlink()
        for number in range(20):
            assert (await client.end_of(str(number)))["status"] == "COMPLETED"
        assert len([event for event in daemon.events() if event["event"] == "ledger_unavailable"]) <= 3
        assert sorted(daemon.starts()) == sorted((str(number), 1) for number in range(20))
    finally:
        daemon.kill()
        os.system(f"umount -l {mount}")


async def test_a_locked_ledger_is_waited_out(daemon: DaemonProcess, client: Client) -> None:
    """Another program holds the write lock longer than SQLite waits."""
    daemon.start()
    other = sqlite3.connect(daemon.folder / "data" / "ledger.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    await client.submit("quick", "1")
    await asyncio.to_thread(daemon.wait_for, "ledger_unavailable")
    assert client.of("1") == []
    other.execute("ROLLBACK")
    assert (await client.end_of("1"))["status"] == "COMPLETED"
    assert daemon.starts() == [("1", 1)]


@pytest.mark.parametrize("signals", [1, 2])
async def test_a_locked_ledger_does_not_keep_a_daemon_from_stopping(
    daemon: DaemonProcess, client: Client, signals: int
) -> None:
    """It ends in its time, sooner when hastened; the next life settles what could not be recorded."""
    patience_s = {1: 0.5, 2: 600.0}[signals]
    daemon.configure(shutdown={"drain_s": patience_s, "flush_s": patience_s})
    daemon.start()
    await client.submit("slow", "1", {"seconds": 600})
    await client.submit("blocking", "2", {"seconds": 600})
    await client.until(lambda: all("RUNNING" in client.statuses(name) for name in ("1", "2")))
    with contextlib.closing(
        sqlite3.connect(daemon.folder / "data" / "ledger.db", isolation_level=None)
    ) as other:
        other.execute("BEGIN IMMEDIATE")
        await client.submit("quick", "3")
        await asyncio.to_thread(daemon.wait_for, "ledger_unavailable")
        for _ in range(signals):
            daemon.signal(signal.SIGTERM)
            await asyncio.to_thread(daemon.wait_for, "stopping")
        assert await asyncio.to_thread(daemon.wait, 60) == 0
    assert "never retrieved" not in daemon.log.read_text()
    daemon.start()
    for name in ("1", "2"):
        assert (await client.end_of(name))["error"]["type"] == "Interrupted"
    assert (await client.end_of("3"))["status"] == "COMPLETED"
    assert Counter(daemon.starts()) == {("1", 1): 1, ("2", 1): 1, ("3", 1): 1}


def test_a_read_only_ledger_is_one_sentence(daemon: DaemonProcess, tmp_path: Path) -> None:
    """A ledger on a file system that is mounted read-only."""
    mount = tmp_path / "ro"
    mount.mkdir()
    if os.geteuid() != 0 or os.system(f"mount -t tmpfs -o size=8m tmpfs {mount} 2>/dev/null") != 0:
        pytest.skip("mounting a file system takes root")
    try:
        daemon.start(JEF_LEDGER_URL=f"sqlite:///{mount}/ledger.db")
        assert daemon.stop() == 0
        os.system(f"mount -o remount,ro {mount}")
        code, said = refused(daemon, JEF_LEDGER_URL=f"sqlite:///{mount}/ledger.db")
        assert code == 5, said
        assert json.dumps(said)
        assert "ledger" in said
    finally:
        os.system(f"umount -l {mount}")
