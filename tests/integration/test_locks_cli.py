"""`jef locks` as operators and scripts use it: processes of their own, a real broker, a real lock service."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import psutil
import pytest
from broker import PrivateBroker

from jef_daemon.errors import ExitCode
from tests.integration.test_cli import NOWHERE, fine, lines, refused, together, with_port
from tests.support.amqp import Client
from tests.support.process import ROOT, DaemonProcess

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def service(daemon: DaemonProcess) -> DaemonProcess:
    """A daemon that is the lock service, and gives up leases as soon as they end."""
    daemon.configure(locks={"takeover_grace_s": 0.0, "tell_places_every_s": 0.2})
    daemon.start()
    return daemon


def state(daemon: DaemonProcess, *resources: str) -> dict[str, Any]:
    """What `jef locks list` tells, by resource."""
    listed = fine(daemon.jef("locks", "list", "--json", *resources))
    return {told["resource"]: told for told in lines(listed)}


def holders(daemon: DaemonProcess, resource: str) -> list[str]:
    return [holder["owner"] for holder in state(daemon, resource)[resource]["holders"]]


def acquired(daemon: DaemonProcess, resource: str, owner: str, *options: str) -> int:
    """Acquire a lock that is free; returns its fencing number."""
    done = fine(daemon.jef("locks", "acquire", resource, "--owner", owner, "--json", *options))
    (grant,) = lines(done)
    return int(grant["fencingToken"])


def instant(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def said(process: subprocess.Popen[str], word: str, within_s: float = 20) -> str:
    """The line of standard error that holds a word."""
    assert process.stderr is not None
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        line = process.stderr.readline()
        if not line:
            break
        if word in line:
            return line
    raise AssertionError(f"{word!r} was not said; exit code {process.poll()}")


def ended(process: subprocess.Popen[str], within_s: float = 30) -> tuple[int, str, str]:
    """Exit code, output, complaints."""
    out, complaints = process.communicate(timeout=within_s)
    assert "Traceback" not in complaints, complaints
    return process.returncode, out, complaints


def wait_for(file: Path, within_s: float = 20) -> str:
    """What a command wrote, when it has."""
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        if file.exists() and (text := file.read_text()).endswith("\n"):
            return text.strip()
        time.sleep(0.02)
    raise AssertionError(f"{file} was not written")


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def dead(pid: int, within_s: float = 10) -> bool:
    until = time.monotonic() + within_s
    while is_alive(pid) and time.monotonic() < until:
        time.sleep(0.02)
    return not is_alive(pid)


# --- looking ---------------------------------------------------------------------------------------------


def test_list_shows_who_holds_and_who_waits(service: DaemonProcess, start: Start) -> None:
    """Holders, modes, numbers, leases, the first waiters and how many; only what was named; all on one page each."""
    assert state(service) == {}
    assert acquired(service, "asset/42", "anna", "--lease", "10m") == 1
    for owner in ("ben", "cleo"):
        acquired(service, "disk/[a]:SHARED", owner)
    waiting = [start("locks", "acquire", "asset/42", "--owner", f"w{number}") for number in range(4)]
    for process in waiting:
        said(process, "waiting: asset/42 is held by anna, number")
    told = state(service)
    assert list(told) == ["asset/42", "disk/[a]"]
    (anna,) = told["asset/42"]["holders"]
    assert (anna["owner"], anna["mode"], anna["fencingToken"]) == ("anna", "EXCLUSIVE", 1)
    assert instant(anna["leaseUntil"]) == pytest.approx(instant(anna["grantedAt"]) + 600, abs=0.01)
    assert told["asset/42"]["waiting"] == 4
    assert {waiter["owner"] for waiter in told["asset/42"]["waiters"]} == {"w0", "w1", "w2", "w3"}
    assert [(holder["owner"], holder["mode"]) for holder in told["disk/[a]"]["holders"]] == [
        ("ben", "SHARED"),
        ("cleo", "SHARED"),
    ]
    bare, named, free = together(
        service, [["locks"], ["locks", "list", "disk/[a]"], ["locks", "list", "nothing"]]
    )
    rows = fine(bare).splitlines()
    assert rows[0].split()[:4] == ["resource", "mode", "holder", "number"]
    assert rows[1].split()[:4] == ["asset/42", "EXCLUSIVE", "anna", "1"]
    assert "4: w" in rows[1]
    assert rows[1].rstrip().endswith(", …")
    assert [row.split()[0] for row in rows[2:]] == ["disk/[a]", "SHARED"]
    assert len(fine(named).splitlines()) == 3
    assert fine(free).splitlines()[1].split() == ["nothing", "nobody", "0"]


def test_list_goes_through_all_pages(service: DaemonProcess) -> None:
    """The lock service tells a hundred resources at a time; none is left out, none told twice."""
    names = [f"r{number:03}" for number in range(180)]
    for part in range(3):
        fine(service.jef("locks", "acquire", *names[part * 60 : part * 60 + 60], "--owner", f"o{part}"))
    everything, named = together(service, [["locks", "--json"], ["locks", "list", "--json", *names]])
    assert [told["resource"] for told in lines(fine(everything))] == names
    assert [told["resource"] for told in lines(fine(named))] == names


def test_watch_sees_a_lock_come_and_go(service: DaemonProcess, start: Start) -> None:
    """Lines where there is no terminal, until the time is over."""
    watching = start("locks", "list", "--watch", "--json", "--for", "4")
    number = acquired(service, "asset/42", "anna")
    code, out, complaints = ended(watching)
    assert (code, complaints) == (ExitCode.OK, "")
    seen = lines(out)
    assert seen
    assert {told["holders"][0]["fencingToken"] for told in seen} == {number}


# --- acquire, release ------------------------------------------------------------------------------------


def test_acquire_gives_numbers_and_asking_again_renews(service: DaemonProcess) -> None:
    """All or none; the same question has the same answer with a new lease; a later grant a higher number."""
    text = fine(service.jef("locks", "acquire", "b:SHARED", "a", "--owner", "anna", "--lease", "60"))
    assert [line.split()[:4] for line in text.splitlines()] == [
        ["a", "EXCLUSIVE", "1", "until"],
        ["b", "SHARED", "1", "until"],
    ]
    before = state(service, "a")["a"]["holders"][0]
    assert acquired(service, "a", "anna", "--lease", "1h") == 1
    after = state(service, "a")["a"]["holders"][0]
    assert after["grantedAt"] == before["grantedAt"]
    assert after["leaseUntil"] > before["leaseUntil"]
    at_once = service.jef("locks", "acquire", "c", "a", "--owner", "ben", "--no-wait")
    refused(at_once, ExitCode.FAILED, "not granted: a is held by anna, number 1 in the queue")
    some = service.jef("locks", "acquire", "c", "a", "--owner", "cleo", "--timeout", "1")
    assert some.returncode == ExitCode.FAILED
    assert some.stdout == ""
    waiting, sentence = some.stderr.splitlines()
    assert waiting.startswith("waiting: a is held by anna")
    assert sentence.startswith("jef: not granted within 1 s: a is held by anna")
    told = state(service, "a", "c")
    assert (told["a"]["waiting"], told["c"]["holders"]) == (0, [])
    assert fine(service.jef("locks", "release", "a", "--owner", "anna")) == "a released\n"
    assert acquired(service, "a", "ben") == 2
    assert holders(service, "b") == ["anna"]


def test_waiting_tells_the_place_and_ends_with_the_grant(service: DaemonProcess, start: Start) -> None:
    """Number 2, number 1, granted, in the order of asking."""
    acquired(service, "a", "anna")
    first = start("locks", "acquire", "a", "--owner", "ben", "--json")
    said(first, "waiting: a is held by anna, number 1 in the queue")
    second = start("locks", "acquire", "a", "--owner", "cleo", "--json")
    said(second, "waiting: a is held by anna, number 2 in the queue")
    fine(service.jef("locks", "release", "--all", "--owner", "anna"))
    code, out, _ = ended(first)
    assert (code, lines(out)[0]["fencingToken"]) == (ExitCode.OK, 2)
    said(second, "waiting: a is held by ben, number 1 in the queue")
    fine(service.jef("locks", "release", "a", "--owner", "ben"))
    code, out, _ = ended(second)
    assert (code, lines(out)[0]["fencingToken"]) == (ExitCode.OK, 3)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("command", ["acquire a --owner ben", "run --exclusive a --owner ben -- true"])
def test_who_is_interrupted_leaves_the_queue(
    service: DaemonProcess, start: Start, command: str, number: signal.Signals
) -> None:
    """Exit code 130, and nobody waits any more."""
    acquired(service, "a", "anna")
    waiting = start("locks", *command.split())
    said(waiting, "waiting: a is held by anna")
    assert state(service)["a"]["waiting"] == 1
    waiting.send_signal(number)
    code, out, complaints = ended(waiting)
    assert (code, out, complaints) == (ExitCode.INTERRUPTED, "", "")
    told = state(service)["a"]
    assert (told["waiting"], [holder["owner"] for holder in told["holders"]]) == (0, ["anna"])


def test_release_gives_up_what_the_owner_holds(service: DaemonProcess) -> None:
    """Named ones, or all; again does no harm and says so; nobody else's."""
    fine(service.jef("locks", "acquire", "a", "b", "c", "--owner", "anna"))
    acquired(service, "d", "ben")
    assert fine(service.jef("locks", "release", "a", "b", "--owner", "anna")) == "a released\nb released\n"
    again = service.jef("locks", "release", "a", "d", "--owner", "anna")
    assert fine(again) == ""
    assert again.stderr == "anna did not hold a, d\n"
    assert fine(service.jef("locks", "release", "--all", "--owner", "anna")) == "c released\n"
    assert list(state(service)) == ["d"]


def test_force_takes_a_lock_away_and_says_why(service: DaemonProcess) -> None:
    """From all holders or one of them, with a reason; 6 where nobody holds it."""
    for owner in ("anna", "ben", "cleo"):
        acquired(service, "a:SHARED", owner)
    no_reason, empty, unknown, not_his, nowhere = together(
        service,
        [
            ["locks", "release", "--force", "a"],
            ["locks", "release", "--force", "a", "--reason", "  "],
            ["locks", "release", "--force", "b", "--reason", "typo"],
            ["locks", "release", "--force", "a", "--owner", "dora", "--reason", "typo"],
            ["locks", "release", "--force", "--all", "--reason", "haste"],
        ],
    )
    for done in (no_reason, empty):
        refused(done, ExitCode.SETTINGS, "--reason")
    refused(unknown, ExitCode.NOT_FOUND, "nobody holds b", "jef locks")
    refused(not_his, ExitCode.NOT_FOUND, "dora does not hold a")
    refused(nowhere, ExitCode.SETTINGS, "by name")
    assert len(holders(service, "a")) == 3
    one = service.jef("locks", "release", "--force", "a", "--owner", "ben", "--reason", "stuck")
    assert fine(one) == "a SHARED 2 taken away\n"
    assert holders(service, "a") == ["anna", "cleo"]
    both = fine(service.jef("locks", "release", "--force", "a", "--reason", "maintenance"))
    assert both == "a SHARED 1 taken away\na SHARED 3 taken away\n"
    assert state(service) == {}


# --- run -------------------------------------------------------------------------------------------------


def test_run_holds_the_locks_around_a_command(service: DaemonProcess) -> None:
    """The command knows its fencing numbers, sees them held, has our input and output; then nothing is left."""
    command = 'echo "$JEF_FENCING_TOKENS"; cat; echo complaint >&2; exit 5'
    arguments = ["--exclusive", "a", "--shared", "b:c", "--", "sh", "-c", command]
    done = subprocess.run(
        [sys.executable, "-m", "jef_daemon", "-c", service.configuration, "locks", "run", *arguments],
        input="typed",
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    numbers, typed = done.stdout.splitlines()
    assert json.loads(numbers) == {"a": 1, "b:c": 1}
    assert (typed, done.stderr, done.returncode) == ("typed", "complaint\n", 5)
    assert state(service) == {}
    assert acquired(service, "a", "anna") == 2
    busy = service.jef("locks", "run", "--exclusive", "a", "--no-wait", "--", "echo", "never")
    refused(busy, ExitCode.FAILED, "not granted: a is held by anna")


def test_run_lends_its_terminal_to_the_command(service: DaemonProcess, tmp_path: Path) -> None:
    """The command reads what is typed; Ctrl-C reaches it once; our exit code tells it."""
    file = tmp_path / "interrupts"
    trap = f"trap 'echo interrupted >> {file}; exit 9' INT"
    script = f'{trap}; read line; echo "got $line"; while :; do sleep 0.1; done'
    in_terminal = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"
    jef = [sys.executable, "-m", "jef_daemon", "-c", str(service.configuration)]
    with subprocess.Popen(
        [
            sys.executable,
            "-c",
            in_terminal,
            *jef,
            "locks",
            "run",
            "--exclusive",
            "a",
            "--",
            "sh",
            "-c",
            script,
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
    ) as process:
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(b"hello\n")
            process.stdin.flush()
            while b"got hello" not in (line := process.stdout.readline()):
                assert line, "the command has not read what was typed"
            process.stdin.write(b"\x03")
            process.stdin.flush()
            process.stdout.read()
            assert process.wait(30) == 9
        finally:
            process.kill()
    assert file.read_text() == "interrupted\n"
    assert state(service) == {}


def test_run_renews_for_as_long_as_it_takes(service: DaemonProcess, start: Start, tmp_path: Path) -> None:
    """Three leases long, never lost; signals go to the command, whose end it tells as shells do."""
    file = tmp_path / "pid"
    running = start(
        "locks",
        "run",
        "--exclusive",
        "a",
        "--lease",
        "2",
        "--",
        "sh",
        "-c",
        f"echo $$ > {file}; exec sleep 60",
    )
    pid = int(wait_for(file))
    begin = time.monotonic()
    while time.monotonic() - begin < 6:
        assert len(holders(service, "a")) == 1
    assert state(service)["a"]["fencingToken"] == 1
    running.send_signal(signal.SIGTERM)
    code, _, complaints = ended(running)
    assert (code, complaints) == (128 + signal.SIGTERM, "")
    assert not is_alive(pid)
    assert state(service) == {}


def test_run_stops_its_command_when_the_lock_is_taken_away(
    service: DaemonProcess, start: Start, tmp_path: Path
) -> None:
    """SIGTERM, then SIGKILL to what does not hear it and to all it started; 7 and one sentence; the next has it."""
    file = tmp_path / "pids"
    stubborn = f"trap '' TERM; sleep 300 & echo $$ $! > {file}; while :; do sleep 1; done"
    running = start("locks", "run", "--exclusive", "a", "--shared", "b", "--", "sh", "-c", stubborn)
    pids = [int(text) for text in wait_for(file).split()]
    fine(service.jef("locks", "release", "--force", "a", "--reason", "its machine burns"))
    code, _, complaints = ended(running)
    assert code == ExitCode.LOCK_LOST
    (sentence,) = complaints.splitlines()
    assert sentence.startswith("jef: lost a: released by force by ")
    assert sentence.endswith(": its machine burns; sh was stopped")
    assert not any(is_alive(pid) for pid in pids)
    assert state(service) == {}, "b is given back"
    assert acquired(service, "a", "anna") == 2


def test_a_holder_that_is_killed_loses_its_lock(service: DaemonProcess, start: Start, tmp_path: Path) -> None:
    """Its command dies with it; at the end of the lease, not before, the next has the lock, with a higher number."""
    file = tmp_path / "pid"
    lease_s = 4.0
    begin = time.time()
    running = start(
        "locks", "run", "--exclusive", "a", "--lease", f"{lease_s:g}", "--", "sh", "-c",
        f"echo $$ > {file}; exec sleep 60",
    )  # fmt: skip
    pid = int(wait_for(file))
    begin = time.time()
    running.kill()
    running.wait()
    assert dead(pid)
    assert acquired(service, "a", "ben", "--timeout", "30") == 2
    (ben,) = state(service)["a"]["holders"]
    granted = instant(ben["grantedAt"])
    assert begin + lease_s / 2 < granted < begin + lease_s + 5


def test_two_of_one_name_do_not_share(service: DaemonProcess, start: Start, tmp_path: Path) -> None:
    """A cron job that is started while the last one runs waits, or is refused; it never runs beside it."""
    file = tmp_path / "pid"
    first = start(
        "locks", "run", "--exclusive", "a", "--owner", "nightly", "--", "sh", "-c",
        f"echo $$ > {file}; exec sleep 60",
    )  # fmt: skip
    wait_for(file)
    at_once = service.jef("locks", "run", "--exclusive", "a", "--owner", "nightly", "--no-wait", "--", "true")
    refused(at_once, ExitCode.FAILED, "not granted: the owner")
    second = start("locks", "run", "--exclusive", "a", "--owner", "nightly", "--", "true")
    said(second, "waiting: the owner")
    first.send_signal(signal.SIGINT)
    assert ended(first)[0] == 128 + signal.SIGINT
    assert ended(second)[0] == ExitCode.OK
    assert state(service) == {}


def test_run_goes_on_through_a_restart_of_the_broker(
    own_broker: PrivateBroker, queue_type: str, tmp_path: Path, start: Start
) -> None:
    """The lease outlives the broker's absence: the same number, renewed again, released at the end."""
    daemon = DaemonProcess(own_broker.url, "jef", tmp_path / "own")
    bus = {"reconnect_max_s": 0.5, "queue_type": queue_type}
    daemon.configure(bus=bus, locks={"takeover_grace_s": 0.0})
    daemon.start()
    try:
        file, go_on = tmp_path / "pid", tmp_path / "go-on"
        running = start(
            "--amqp-url", own_broker.url, "--prefix", "jef", "locks", "run", "--exclusive", "a", "--lease", "120",
            "--", "sh", "-c", f"echo $$ > {file}; while [ ! -e {go_on} ]; do sleep 0.1; done; exit 3",
        )  # fmt: skip
        wait_for(file)
        (before,) = state(daemon)["a"]["holders"]
        begin = daemon.log.stat().st_size
        own_broker.kill()
        own_broker.start()
        daemon.wait_for("broker_connected", begin, 90)
        until = time.monotonic() + 60
        while (now := state(daemon)["a"]["holders"][0])["leaseUntil"] == before["leaseUntil"]:
            assert time.monotonic() < until, "not renewed"
        assert now["fencingToken"] == before["fencingToken"] == 1
        assert running.poll() is None
        go_on.touch()
        code, _, complaints = ended(running)
        assert (code, complaints) == (3, "")
        assert state(daemon) == {}
    finally:
        daemon.kill()


@pytest.mark.parametrize("how", ["cut", "silent"])
async def test_run_stops_its_command_when_the_broker_stays_away(
    service: DaemonProcess, tmp_path: Path, start: Start, how: str
) -> None:
    """By its own clock, before the lease is over and others may come, whether connections break or say nothing."""
    file, lease_s = tmp_path / "pid", 12.0
    async with Between(service.url) as between:
        running = start(
            "--amqp-url", between.url, "locks", "run", "--exclusive", "a", "--lease", f"{lease_s:g}",
            "--", "sh", "-c", f"trap '' TERM; echo $$ > {file}; while :; do sleep 0.1; done",
        )  # fmt: skip
        pid = int(await asyncio.to_thread(wait_for, file))
        begin = time.monotonic()
        between.fail(how)
        assert await asyncio.to_thread(dead, pid, lease_s)
        assert time.monotonic() - begin > lease_s / 3
        code, _, complaints = await asyncio.to_thread(ended, running)
    assert code == ExitCode.LOCK_LOST
    assert "jef: lost a: the lease of 12 s could not be renewed: no word from the lock service" in complaints


class Between:
    """A door to the broker that can be closed, or let nothing through any more.

    Args:
        url: the broker's.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._pipes: list[asyncio.StreamWriter] = []
        self._passes = True
        self._server: asyncio.Server

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1")
        self.url = with_port(self._url, self._server.sockets[0].getsockname()[1])
        return self

    async def __aexit__(self, *_: object) -> None:
        self.fail("cut")

    def fail(self, how: str) -> None:
        self._passes = False
        if how == "cut":
            self._server.close()
            for pipe in self._pipes:
                pipe.transport.abort()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        broker = urlsplit(self._url)
        from_broker, to_broker = await asyncio.open_connection(broker.hostname, broker.port)
        self._pipes += [writer, to_broker]
        await asyncio.gather(self._pass_on(reader, to_broker), self._pass_on(from_broker, writer))

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while chunk := await reader.read(65536):
                if self._passes:
                    writer.write(chunk)


# --- histories -------------------------------------------------------------------------------------------


async def test_jobs_and_resources_tell_what_became_of_their_locks(
    service: DaemonProcess, client: Client
) -> None:
    """`show` tells how a job stands, `history` what it was granted and lost, `locks history` both sides of it."""
    wanted = [{"resource": "a", "mode": "EXCLUSIVE"}, {"resource": "b", "mode": "SHARED"}]
    await client.submit("slow", "1", {"seconds": 60}, locks=wanted)
    await client.until(lambda: "RUNNING" in client.statuses("1"))
    await client.submit("quick", "2", locks=[wanted[0]])
    await client.until(lambda: "WAITING_FOR_LOCK" in client.statuses("2"))
    await client.submit("quick", "3")
    await client.end_of("3")
    first, second, third = (
        json.loads(fine(done)) for done in together(service, [["show", name, "--json"] for name in "123"])
    )
    granted = [lock | {"fencingToken": 1} for lock in wanted]
    assert first["locks"] == {"state": "held", "wanted": granted, "waitingFor": None}
    assert second["locks"]["state"] == "waiting"
    assert second["locks"]["waitingFor"]["holders"] == ["1"]
    assert "locks" not in third
    assert "number 1, held by 1" in fine(service.jef("history", "2"))
    fine(service.jef("locks", "release", "--force", "a", "--reason", "its machine burns"))
    assert (await client.end_of("1"))["error"]["type"] == "LockLost"
    await client.end_of("2")
    shown, told, of_a, as_json, nothing, newest = together(
        service,
        [
            ["show", "2", "--json"],
            ["history", "1"],
            ["locks", "history", "a"],
            ["locks", "history", "a", "--json"],
            ["locks", "history", "c"],
            ["locks", "history", "a", "--json", "--limit", "1"],
        ],
    )
    assert json.loads(fine(shown))["locks"]["state"] == "released"
    assert "LockGranted by locks\n    a EXCLUSIVE 1\n    b SHARED 1\n" in fine(told)
    assert ": its machine burns" in fine(told).partition("LockLost by locks: ")[2]
    entries = lines(fine(as_json))
    assert [(entry["event"], entry["owner"], entry["fencing_token"]) for entry in entries] == [
        ("granted", "1", 1),
        ("asked", "2", None),
        ("ended", "1", 1),
        ("granted", "2", 2),
        ("ended", "2", 2),
    ]
    assert entries[2]["reason"].startswith("released by force by ")
    assert entries[2]["reason"].endswith(": its machine burns")
    text = fine(of_a).splitlines()
    assert len(text) == 5
    assert "ended by 1 EXCLUSIVE 1: released by force by " in text[2]
    assert lines(fine(newest)) == entries[-1:]
    refused(nothing, ExitCode.NOT_FOUND, "no history of c", "--ledger-url")


# --- mistakes --------------------------------------------------------------------------------------------


def test_mistakes_are_one_sentence(service: DaemonProcess) -> None:
    """The user's, the limits of the service, a program that is not there."""
    expected: dict[tuple[str, ...], tuple[int, tuple[str, ...]]] = {
        ("locks", "nonsense"): (ExitCode.USAGE, ("nonsense",)),
        ("locks", "acquire", "a"): (ExitCode.USAGE, ("owner",)),
        ("locks", "acquire", "--owner", "anna"): (ExitCode.USAGE, ("resources",)),
        ("locks", "run", "--exclusive", "a"): (ExitCode.USAGE, ("command",)),
        ("locks", "run", "--", "true"): (ExitCode.SETTINGS, ("--exclusive",)),
        ("locks", "run", "--exclusive", "a", "no-such-program"): (
            ExitCode.NO_PROGRAM,
            ("there is no program no-such-program",),
        ),
        ("locks", "acquire", "a", "--owner", "anna", "--lease", "long"): (
            ExitCode.SETTINGS,
            ("'long'", "90s"),
        ),
        ("locks", "acquire", "a", "--owner", "anna", "--lease", "0.1"): (
            ExitCode.FAILED,
            ("a lease must be from 1 to 604800 seconds",),
        ),
        ("locks", "acquire", "x" * 300, "--owner", "anna"): (ExitCode.FAILED, ("limit is 255",)),
        ("locks", "acquire", "", "--owner", "anna"): (ExitCode.FAILED, ("a name is empty",)),
        ("locks", "release", "a"): (ExitCode.SETTINGS, ("--owner",)),
        ("locks", "release", "--owner", "anna"): (ExitCode.SETTINGS, ("--all",)),
        ("locks", "release", "a", "--owner", "anna", "--reason", "x"): (ExitCode.SETTINGS, ("--force",)),
    }
    done = together(service, list(expected))
    for (code, words), finished in zip(expected.values(), done, strict=True):
        refused(finished, code, *words)
    assert state(service) == {}


def test_without_a_lock_service_every_command_says_so(daemon: DaemonProcess) -> None:
    """No broker, no queue, nobody who answers; what nobody took is not granted later to who has gone."""
    commands = [
        ["locks"],
        ["locks", "acquire", "a", "--owner", "anna"],
        ["locks", "release", "a", "--owner", "anna"],
        ["locks", "release", "a", "--force", "--reason", "x"],
        ["locks", "run", "--exclusive", "a", "--", "true"],
    ]
    begin = time.monotonic()
    for done in together(daemon, [["--amqp-url", NOWHERE, *command] for command in commands]):
        refused(done, ExitCode.BROKER, "no broker answers")
    for done in together(daemon, commands):
        refused(done, ExitCode.BROKER, f"no queue {daemon.prefix}.locks", "start one with `jef run`")
    daemon.start()
    daemon.stop()
    for done in together(daemon, commands):
        refused(done, ExitCode.BROKER, f"no lock service answers on the queue {daemon.prefix}.locks")
    assert time.monotonic() - begin < 60
    daemon.start()
    assert state(daemon) == {}
