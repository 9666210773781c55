"""The command line as people use it: a process of its own, a real broker, a real daemon, a real ledger."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import aio_pika
import pytest
from aio_pika.abc import AbstractIncomingMessage, AbstractQueue

from jef_daemon.errors import ExitCode
from jef_daemon.names import Names
from jef_daemon.rabbitmq.dead_letters import dead_letters, take_dead_letters
from tests.support.amqp import Client
from tests.support.process import ROOT, DaemonProcess

NOWHERE = "amqp://guest:hidden@127.0.0.1:1/"
"""Nobody listens there."""

Finished = subprocess.CompletedProcess[str]


@pytest.fixture
async def running(daemon: DaemonProcess, client: Client) -> DaemonProcess:
    """The daemon, consuming, and a client that hears it."""
    daemon.start()
    return daemon


def fine(finished: Finished) -> str:
    """A command that worked; returns what it printed."""
    assert finished.returncode == ExitCode.OK, finished
    assert "Traceback" not in finished.stderr
    return finished.stdout


def refused(finished: Finished, code: int, *words: str) -> str:
    """A command that did not; one sentence with these words, nothing else."""
    assert finished.returncode == code, finished
    assert "Traceback" not in finished.stdout + finished.stderr
    assert finished.stdout == "", finished
    assert len(finished.stderr.strip().splitlines()) == 1 or code == ExitCode.USAGE, finished.stderr
    assert code == ExitCode.USAGE or finished.stderr.startswith("jef: "), finished.stderr
    for word in words:
        assert word in finished.stderr, finished.stderr
    assert "hidden" not in finished.stderr
    return finished.stderr


def lines(text: str) -> list[dict[str, Any]]:
    """JSON lines."""
    return [json.loads(line) for line in text.splitlines()]


def with_password(url: str, password: str) -> str:
    """The same broker, another password."""
    parts = urlsplit(url)
    user = parts.username or "guest"
    return urlunsplit(parts._replace(netloc=f"{user}:{password}@{parts.hostname}:{parts.port}"))


def with_port(url: str, port: int) -> str:
    """The same broker by another door."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=f"{parts.netloc.rpartition('@')[0]}@127.0.0.1:{port}"))


def together(daemon: DaemonProcess, commands: Iterable[Sequence[str]]) -> list[Finished]:
    """Several commands at once, in their order: starting Python is what takes the time."""
    with ThreadPoolExecutor(4) as threads:
        return list(threads.map(lambda command: daemon.jef(*command), commands))


# --- submit ----------------------------------------------------------------------------------------------


async def test_submit_takes_a_configuration_in_every_form(
    running: DaemonProcess, client: Client, tmp_path: Path
) -> None:
    """key=value, key:=JSON, --json, --file, standard input; the nearer to the command's end, the stronger."""
    file = tmp_path / "configuration.json"
    file.write_text('{"result": "from the file", "kept": [1, {"a": null}]}')
    typed = fine(
        running.jef(
            "submit", "quick", "a=text", "b=7", "c=true", "d=1.5", "e:=[1, 2]", "f==x=y", "g=NaN", "--id", "1"
        )
    )
    assert typed == "1\n"
    fine(running.jef("submit", "quick", "--json", '{"result": "typed", "a": {"b": 1}}', "a=2", "--id", "2"))
    fine(running.jef("submit", "quick", "--file", str(file), "--json", '{"more": 1}', "--id", "3"))
    piped = subprocess.run(
        [sys.executable, "-m", "jef_daemon", "-c", running.configuration, "submit", "quick", "--file", "-"],
        input='{"result": "piped"}',
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    new = fine(piped).strip()
    wanted: dict[str, dict[str, Any]] = {
        "1": {"a": "text", "b": 7, "c": True, "d": 1.5, "e": [1, 2], "f": "=x=y", "g": "NaN"},
        "2": {"result": "typed", "a": 2},
        "3": {"result": "from the file", "kept": [1, {"a": None}], "more": 1},
        new: {"result": "piped"},
    }
    for name, configuration in wanted.items():
        end = await client.end_of(name)
        assert end["status"] == "COMPLETED", end
        assert end["result"] == configuration.get("result", "done")
        assert running.reader().request(name)["configuration"] == configuration


async def test_submit_takes_all_that_a_request_may_hold(running: DaemonProcess, client: Client) -> None:
    """Identifiers, locks of both modes, priority, instants, clocks, variables."""
    command = (
        "submit quick --id 1 --workflow-id flow --lock asset/42 --lock disk:SHARED --priority 5 "
        "--not-before 2024-01-01T00:00:00Z --timeout execution=60 --timeout queue=3600 "
        "--variable a=b --variable n:=[1]"
    )
    fine(running.jef(*command.split()))
    await client.until(lambda: bool(client.of("1")))
    shown = json.loads(fine(running.jef("show", "1", "--json")))
    assert (shown["workflowId"], shown["priority"], shown["action"]) == ("flow", 5, "quick")
    assert shown["request"] == {
        "executionId": "1",
        "workflowId": "flow",
        "configuration": {},
        "jobContextVariables": {"a": "b", "n": [1]},
        "locks": [
            {"resource": "asset/42", "mode": "EXCLUSIVE"},
            {"resource": "disk", "mode": "SHARED"},
        ],
        "priority": 5,
        "notBefore": "2024-01-01T00:00:00Z",
        "timeouts": {"execution": 60.0, "queue": 3600.0},
    }


async def test_submit_waits_and_tells_the_end(running: DaemonProcess, client: Client) -> None:
    """0 for COMPLETED with result and variables, 1 for any other end; the same for a job that has ended."""
    for _ in range(2):  # the second time it is a repetition
        done = running.jef("submit", "quick", "result=fine", "--variable", "a=b", "--id", "done", "--wait")
        assert fine(done).partition("\n")[0] == "fine"
        assert json.loads(fine(done).partition("\n")[2]) == {"attempt": 1, "a": "b"}
    assert running.starts() == [("done", 1)]
    slow = running.jef("submit", "slow", "seconds=1", "steps=5", "--id", "slow", "-w")
    told = [line.split()[3] for line in slow.stderr.splitlines()]
    assert (told[0], told[1], told[-1]) == ("QUEUED", "RUNNING", "COMPLETED")
    assert "step 3" in slow.stderr
    failed = running.jef("submit", "misbehave", "how=raise", "--wait")
    assert (failed.returncode, failed.stdout) == (ExitCode.FAILED, "")
    assert failed.stderr.splitlines()[-1] == "FAILED: RuntimeError: on purpose"
    assert "Traceback" not in failed.stderr
    unknown = running.jef("submit", "no-such-action", "--wait")
    assert unknown.returncode == ExitCode.FAILED
    assert "no daemon has served it" in unknown.stderr


async def test_mistakes_are_one_sentence(daemon: DaemonProcess, tmp_path: Path) -> None:
    """The user's before anything is sent, the configuration's, the ledger's; each with its exit code."""
    not_json = tmp_path / "not.json"
    not_json.write_text("{")
    expected: list[tuple[tuple[str, ...], int, tuple[str, ...]]] = []
    for arguments, words in {
        ("submit", "quick", "no-sign"): ("'no-sign'", "key=value"),
        ("submit", "quick", "--json", "{"): ("--json is no JSON",),
        ("submit", "quick", "--file", "/no/such/file"): ("/no/such/file", "No such file"),
        ("submit", "quick", "--file", str(not_json)): ("not.json is no JSON",),
        ("submit", "quick", "--file", sys.executable): (sys.executable, "no text in UTF-8"),
        ("submit", "quick", "--id", ""): ("executionId is required",),
        ("submit", "quick", "--id", "with space"): ("executionId",),
        ("submit", "quick", "--priority", "5000"): ("priority",),
        ("submit", "quick", "--not-before", "tomorrow"): ("notBefore", "RFC 3339"),
        ("submit", "quick", "--timeout", "execution"): ("execution=3600",),
        ("submit", "quick", "--timeout", "lunch=3"): ("lunch", "queue, lock, update, execution"),
        ("submit", "quick", "--timeout", "queue=nan"): ("queue=nan",),
        ("submit", "quick", "x:=NaN"): ("NaN",),
        ("list", "--status", "DONE"): ("DONE", "COMPLETED"),
        ("list", "--since", "yesterday"): ("yesterday", "2h"),
        ("purge", "--older-than", "soon"): ("soon", "30d"),
        ("--set", "nonsense", "list"): ("nonsense", "key=value"),
        ("--set", "slots.totl=8", "list"): ("slots.totl", "slots.total"),
        ("--config", "/no/such.toml", "list"): ("/no/such.toml",),
        ("--amqp-url", "http://example.org", "submit", "quick"): ("amqp_url", "amqp://"),
    }.items():
        expected.append((arguments, ExitCode.SETTINGS, words))
    for arguments, words in {
        ("submit",): ("action",),
        ("nonsense",): ("nonsense",),
        ("list", "--limit", "0"): ("limit",),
        ("submit", "quick", "--priority", "high"): ("priority",),
    }.items():
        expected.append((arguments, ExitCode.USAGE, words))
    garbage = tmp_path / "garbage.db"
    garbage.write_bytes(b"this is no database at all" * 100)
    for command in ("list", "show 1", "history 1", "purge --yes"):
        arguments = tuple(command.split())
        expected.append((arguments, ExitCode.LEDGER, ("ledger",)))
        if command != "history 1":
            on_garbage = ("--ledger-url", f"sqlite:///{garbage}", *arguments)
            expected.append((on_garbage, ExitCode.LEDGER, ("no ledger",)))
    expected.append((("--ledger-url", "postgresql://a/b", "list"), ExitCode.LEDGER, ("sqlite",)))
    finished = together(daemon, [arguments for arguments, _, _ in expected])
    for (_, code, words), done in zip(expected, finished, strict=True):
        refused(done, code, *words)
    assert not (daemon.folder / "data").exists(), "looking makes nothing"


# --- looking ---------------------------------------------------------------------------------------------


async def test_list_filters_and_pages(running: DaemonProcess, client: Client) -> None:
    """By status, action, workflow and age; every job on exactly one page, newest first."""
    for number in range(7):
        await client.submit("quick", f"q{number}", workflowId="even" if number % 2 == 0 else "odd")
        await client.end_of(f"q{number}")
    await client.submit("misbehave", "bad", {"how": "raise"})
    await client.submit("slow", "long", {"seconds": 60})
    await client.end_of("bad")
    await client.until(lambda: "RUNNING" in client.statuses("long"))

    quick = [f"q{number}" for number in reversed(range(7))]
    wanted = {
        "": ["long", "bad", *quick],
        "--status FAILED": ["bad"],
        "--status failed --status running": ["long", "bad"],
        "--action quick": quick,
        "--action quick --workflow odd": ["q5", "q3", "q1"],
        "--since 1h": ["long", "bad", *quick],
        "--since 1h --workflow nobody": [],
        "--since 2999-01-01T00:00:00Z": [],
    }
    listed = together(running, [["list", "--json", *options.split()] for options in wanted])
    for options, done in zip(wanted, listed, strict=True):
        assert [job["executionId"] for job in lines(fine(done))] == wanted[options], options
    pages, before = [], ["--limit", "4"]
    while True:
        page = running.jef("list", "--json", *before)
        pages.append([job["executionId"] for job in lines(fine(page))])
        if not page.stderr:
            break
        assert page.stderr.startswith("more: jef list --before ")
        before = ["--limit", "4", "--before", page.stderr.split()[-1]]
    assert [len(page) for page in pages] == [4, 4, 1]
    assert [name for page in pages for name in page] == ["long", "bad", *quick]
    rows = fine(running.jef("list")).splitlines()
    assert len(rows) == 10
    assert rows[0].split()[:3] == ["job", "action", "status"]
    assert rows[2].split()[:3] == ["bad", "misbehave", "FAILED"]
    assert "RuntimeError: on purpose" in rows[2]


async def test_show_and_history_find_a_job_by_either_name(running: DaemonProcess, client: Client) -> None:
    """All about it, for people and for programs; a stack trace where it failed; 6 where there is none."""
    await client.submit("quick", "1", {"external_id": "render-77"}, jobContextVariables={"a": 1})
    await client.submit("misbehave", "2", {"how": "raise"})
    await client.end_of("1")
    await client.end_of("2")
    for name in ("1", "render-77"):
        done = together(running, [["show", name, "--json"], ["history", name, "--json"], ["history", name]])
        shown = json.loads(fine(done[0]))
        assert (shown["executionId"], shown["externalId"], shown["status"]) == ("1", "render-77", "COMPLETED")
        assert shown["request"]["configuration"] == {"external_id": "render-77"}
        assert shown["outcome"]["jobContextVariables"] == {"attempt": 1, "a": 1}
        assert shown["queuedAt"] <= shown["startedAt"] <= shown["finishedAt"]
        entries = lines(fine(done[1]))
        assert [entry["status"] for entry in entries][-2:] == ["RUNNING", "COMPLETED"]
        assert [entry["at"] for entry in entries] == sorted(entry["at"] for entry in entries)
        assert "RUNNING -> COMPLETED" in fine(done[2])
    text = fine(running.jef("show", "render-77"))
    assert [line.split() for line in text.splitlines()][:2] == [
        ["executionId", "1"],
        ["externalId", "render-77"],
    ]
    told = fine(running.jef("history", "2"))
    assert "Traceback (most recent call last)" in told
    assert "RuntimeError: on purpose" in told
    for command in ("show", "history"):
        refused(running.jef(command, "nobody"), ExitCode.NOT_FOUND, "nobody", "jef list")


async def test_what_nobody_serves_is_said_when_it_is_submitted(
    running: DaemonProcess, client: Client
) -> None:
    """It is a dead letter already: without a word, who submits it would wait for ever."""
    done = running.jef("submit", "nope", "a=b", "--id", "lost")
    assert (done.returncode, done.stdout) == (ExitCode.FAILED, "lost\n")
    assert "'nope'" in done.stderr
    assert "jef dead-letters list" in done.stderr
    [letter] = await client.dead_letters(1)
    assert letter.headers["x-jef-reason"] == "unroutable"


async def test_watch_sees_what_happens(
    running: DaemonProcess, client: Client, start: Callable[..., subprocess.Popen[str]]
) -> None:
    """Each notification a line, JSON or not, of all actions or one, for a while."""
    watchers = {
        "json": start("watch", "--json", "--for", "5"),
        "slow": start("watch", "--for", "5", "--action", "slow"),
    }
    number = 0
    while any(watcher.poll() is None for watcher in watchers.values()):
        number += 1
        await client.submit("quick", f"q{number}")
        await client.submit("slow", f"s{number}")
        await asyncio.sleep(0.5)
    said = {}
    for name, watcher in watchers.items():
        said[name], complaints = watcher.communicate()
        assert (watcher.returncode, complaints) == (ExitCode.OK, "")
    told = lines(said["json"])
    assert all(one in client.told for one in told)
    # Which of them it saw from beginning to end depends on when it came.
    seen = {one["executionId"]: dict[str, None]() for one in told}
    for one in told:
        seen[one["executionId"]][one["status"]] = None
    assert ["QUEUED", "RUNNING", "COMPLETED"] in [list(statuses) for statuses in seen.values()]
    assert {line.split()[2] for line in said["slow"].splitlines()} == {"slow"}
    assert re.search(r"s\d+ slow COMPLETED 100% slept", said["slow"])


def test_actions_and_schema(daemon: DaemonProcess) -> None:
    """What is served and what it wants; an executor that cannot be loaded says why; messages' schemas."""
    daemon.configure(
        '[actions.held]\nexecutor = "no_such_module:X"\n[actions.copy]\nenabled = false\n'
        '[actions.watchful]\ncommand = ["echo", "{configuration.text}"]\n'
        f'[actions.{"x" * 30}]\nexecutor = "tests.support.executors:Undescribed"\n'
    )
    listed, as_json, checksum = together(
        daemon, [["actions"], ["actions", "--json"], ["actions", "checksum"]]
    )
    told = {line.split()[0]: line for line in fine(listed).splitlines()}
    assert {"quick", "slow", "blocking", "checksum", "nap", "held"} <= set(told)
    assert "copy" not in told
    assert "there is no module no_such_module" in told["held"]
    assert "(needs path)" in told["checksum"]
    assert told["x" * 30].split() == [
        "x" * 30,
        "tests.support.executors:Undescribed,",
        *["which", "has", "no", "docstring."],
    ]
    everything = json.loads(fine(as_json))
    assert set(everything) == set(told)
    one = json.loads(fine(checksum))
    assert one == everything["checksum"]
    assert one["configuration"]["properties"]["path"]["type"] == "string"
    assert (one["runs"], one["mayRunAgain"], one["problem"]) == ("in a process", True, None)
    assert everything["watchful"]["configuration"]["required"] == ["text"]
    refused(daemon.jef("actions", "nonsense"), ExitCode.NOT_FOUND, "nonsense", "jef actions")
    names = [line.split()[0] for line in fine(daemon.jef("schema")).splitlines()]
    assert {"JobRequest", "StatusNotification"} <= set(names)
    chosen = ("JobRequest", "StatusNotification", "--asyncapi")
    *schemas, document = [
        json.loads(fine(done)) for done in together(daemon, [["schema", name] for name in chosen])
    ]
    for schema in schemas:
        assert schema["$schema"].startswith("https://json-schema.org/")
        assert schema["type"] == "object"
        assert "executionId" in schema["properties"]
    assert document["asyncapi"].startswith("3.")
    refused(daemon.jef("schema", "Nonsense"), ExitCode.NOT_FOUND, "Nonsense", "JobRequest")


# --- check -----------------------------------------------------------------------------------------------


async def test_check_says_what_is_wrong_and_the_remedy(daemon: DaemonProcess, amqp_url: str) -> None:
    """All ok: 0. A broker away, a wrong password, a missing module, a folder: 1, and what to do."""
    told = fine(daemon.jef("check"))
    assert "WRONG" not in told
    for word in (
        "configuration",
        "folder",
        "ledger",
        "broker",
        "declare",
        "publish",
        "consume",
        "action quick",
    ):
        assert word in told

    def wrong(finished: Finished, *words: str) -> None:
        assert finished.returncode == ExitCode.FAILED, finished
        assert "Traceback" not in finished.stdout + finished.stderr
        assert finished.stdout.count("WRONG") == 1, finished.stdout
        behind = finished.stdout.partition("WRONG")[2]
        for word in words:
            assert word in behind, finished.stdout
        assert "hidden" not in finished.stdout

    no_host = urlunsplit(urlsplit(amqp_url)._replace(path="/nowhere"))
    expected = {
        ("--amqp-url", NOWHERE): (
            "no broker answers at amqp://guest:***@127.0.0.1:1/",
            "start RabbitMQ or set JEF_AMQP_URL",
        ),
        ("--amqp-url", with_password(amqp_url, "hidden")): ("refuses user or password", "JEF_AMQP_URL"),
        ("--amqp-url", no_host): ("no such virtual host", "add_vhost"),
        ("--set", "slots.totl=8"): ("slots.total",),
        ("--set", "data_dir=/proc/nowhere"): ("/proc/nowhere",),
    }
    checked = together(daemon, [[*options, "check"] for options in expected])
    for words, done in zip(expected.values(), checked, strict=True):
        wrong(done, *words)
    daemon.configure('[actions.held]\nexecutor = "no_such_module:X"\n')
    wrong(daemon.jef("check"), "action held", "no module no_such_module", "python_path")
    daemon.configure('[actions."*"]\ncommand = ["true"]\n')
    wrong(daemon.jef("check"), "action *", "can be no action's name")
    daemon.configure('[actions.held]\ncommand = ["no-such-program"]\n')
    wrong(daemon.jef("check"), "action held", "no program no-such-program in", "install it")


async def test_a_broker_that_cannot_be_used_is_exit_code_4(daemon: DaemonProcess, amqp_url: str) -> None:
    """Every command that needs it says within seconds why; so does one before any daemon has run."""
    commands = (
        "submit quick",
        "submit quick --wait",
        "watch --for 5",
        "dead-letters list",
        "dead-letters drop 1",
    )
    begin = time.monotonic()
    for done in together(daemon, [["--amqp-url", NOWHERE, *command.split()] for command in commands]):
        refused(done, ExitCode.BROKER, "no broker answers")
    assert time.monotonic() - begin < 20
    wrong = with_password(amqp_url, "hidden")
    refused(daemon.jef("--amqp-url", wrong, "submit", "quick"), ExitCode.BROKER, "user or password")
    for done in together(daemon, [command.split() for command in commands[:3]]):
        refused(done, ExitCode.BROKER, "start one with `jef run`")
    refused(daemon.jef("dead-letters", "list"), ExitCode.NOT_FOUND, "no daemon with this prefix")


# --- keeping house ---------------------------------------------------------------------------------------


async def test_dead_letters_are_looked_at_replayed_and_dropped(
    running: DaemonProcess, client: Client
) -> None:
    """Looking leaves all where it is; replaying sends the same bytes to where they were; dropping takes the named."""
    await client.publish("quick", b"this is no JSON")
    await client.publish("held", b'{"executionId": "early", "configuration": {"text": "hello"}}')
    await client.publish("quick", b'{"executionId": "bad", "priority": "high"}')
    command = aio_pika.Message(b'{"command": "dance", "executionId": "c"}')
    await client.channel.default_exchange.publish(command, f"{client.prefix}.control")

    async def found(count: int) -> list[dict[str, Any]]:
        async with asyncio.timeout(30):
            while True:
                told = lines(fine(running.jef("dead-letters", "list", "--json")))
                if len(told) == count:
                    return told

    told = await found(4)
    assert [letter["number"] for letter in told] == [1, 2, 3, 4]
    by_reason = {letter["reason"]: letter for letter in told}
    assert set(by_reason) == {"not-json", "unroutable", "field-invalid"}
    assert by_reason["unroutable"]["executionId"] == "early"
    assert by_reason["field-invalid"]["detail"]
    assert by_reason["unroutable"]["routingKey"] == "held"
    # One after the other: whoever looks holds the letters, and others do not see them meanwhile.
    commands = ("list", "show bad", "show 99", "replay 99", "drop")
    done = [running.jef("dead-letters", *rest.split()) for rest in commands]
    assert len(fine(done[0]).splitlines()) == 4
    assert '"executionId": "bad", "priority": "high"' in fine(done[1]).splitlines()[-1]
    assert "x-jef-reason" in fine(done[1])
    refused(done[2], ExitCode.NOT_FOUND, "99")
    refused(done[3], ExitCode.NOT_FOUND, "99")
    refused(done[4], ExitCode.SETTINGS, "--all")
    await found(4)

    assert fine(running.jef("dead-letters", "drop", "bad")) == "1 dropped\n"
    assert {letter["reason"] for letter in await found(3)} == {"not-json", "unroutable", "field-invalid"}
    running.stop()
    running.configure('[actions.held]\ncommand = ["echo", "{configuration.text}"]\n')
    running.start()
    assert fine(running.jef("dead-letters", "replay", "--reason", "unroutable")) == "1 sent again\n"
    await client.until(lambda: any(one.get("result") for one in client.told if one["executionId"] == "early"))
    assert client.told[-1]["jobContextVariables"]["output"] == "hello\n"
    await found(2)
    assert fine(running.jef("dead-letters", "replay", "--all")) == "2 sent again\n"
    # No better than before: the command, which came to the queue of commands again.
    assert {letter["reason"] for letter in await found(2)} == {"not-json", "field-invalid"}
    assert fine(running.jef("dead-letters", "drop", "--all")) == "2 dropped\n"
    assert await found(0) == []


async def test_a_dead_letter_is_known_by_what_it_holds(running: DaemonProcess, client: Client) -> None:
    """Between the look and the taking, others took the first and hold the second: the right one goes."""
    for number in range(4):
        await client.publish("quick", f"no JSON {number}".encode())
    names = Names(client.prefix)
    async with asyncio.timeout(20):
        while len(found := await dead_letters(client.url, names)) < 4:
            await asyncio.sleep(0.05)
    queue = await client.channel.get_queue(names.dead_letters, ensure=False)
    first, second = await queue.get(timeout=10), await queue.get(timeout=10)
    assert first is not None
    assert second is not None
    await first.ack()
    asyncio.get_running_loop().call_later(0.5, lambda: asyncio.ensure_future(second.reject(requeue=True)))
    assert await take_dead_letters(client.url, names, found[1:3], replay=False) == 2
    left = await dead_letters(client.url, names)
    assert [letter.body for letter in left] == [b"no JSON 3"]
    assert await take_dead_letters(client.url, names, found, replay=False) == 1


async def test_a_replayed_letter_goes_on_where_it_was(running: DaemonProcess, client: Client) -> None:
    """Who is to be answered, and how far a daemon that handed it back had counted, go along with it."""
    answers = await client.channel.declare_queue(exclusive=True)
    counted = {"x-jef-sequence": 6, "x-jef-attempt": 2, "traceparent": "00-1-2-01"}
    body = b'{"executionId": "back", "configuration": {"text": "hello"}}'
    await client.publish("held", body, headers=counted, reply_to=answers.name, correlation_id="c-1")
    await client.until(lambda: bool(client.of("back")))
    assert fine(running.jef("dead-letters", "list")).split()[:4] == ["1", "unroutable", "held", "back"]
    long = "k" * 60  # columns never grow together
    await client.publish(long, b'{"executionId": "%s"}' % (b"e" * 60))
    await client.until(lambda: bool(client.of("e" * 60)))
    while len(listed := fine(running.jef("dead-letters", "list")).splitlines()) < 2:
        await asyncio.sleep(0.1)
    assert listed[1].split()[:5] == ["2", "unroutable", long, "e" * 60, "no"]
    running.stop()
    running.configure('[actions.held]\ncommand = ["echo", "{configuration.text}"]\n')
    running.start()
    assert fine(running.jef("dead-letters", "replay", "back")) == "1 sent again\n"
    answer = await _next(answers)
    told = json.loads(answer.body)
    assert (told["status"], told["sequence"], told["attempt"]) == ("COMPLETED", 9, 2)
    assert (answer.correlation_id, answer.headers) == ("c-1", {"traceparent": "00-1-2-01"})


async def _next(queue: AbstractQueue) -> AbstractIncomingMessage:
    async with asyncio.timeout(20):
        while (message := await queue.get(fail=False)) is None:
            await asyncio.sleep(0.05)
    return message


async def test_purge_deletes_what_has_ended(running: DaemonProcess, client: Client) -> None:
    """Asked first; only what is old enough; a running job stays, and the daemon goes on."""
    for name in ("a", "b", "c"):
        await client.submit("quick", name)
        await client.end_of(name)
    await client.submit("slow", "long", {"seconds": 60})
    await client.until(lambda: "RUNNING" in client.statuses("long"))
    assert "nothing finished" in fine(running.jef("purge", "--older-than", "1h", "--yes"))
    asked = running.jef("purge", "--older-than", "0s")  # nobody answers
    assert asked.returncode == ExitCode.FAILED
    assert "delete 3 executions" in asked.stdout + asked.stderr
    assert len(fine(running.jef("list", "--json")).splitlines()) == 4
    assert "3 executions deleted" in fine(running.jef("purge", "--older-than", "0s", "--yes"))
    assert [job["executionId"] for job in lines(fine(running.jef("list", "--json")))] == ["long"]
    refused(running.jef("history", "a"), ExitCode.NOT_FOUND)
    await client.submit("quick", "d")
    assert (await client.end_of("d"))["status"] == "COMPLETED"


# --- interrupted -----------------------------------------------------------------------------------------


async def test_ctrl_c_is_130_and_no_traceback(
    running: DaemonProcess, client: Client, start: Callable[..., subprocess.Popen[str]]
) -> None:
    """The command ends, the job goes on."""
    waiting = start("submit", "slow", "seconds=60", "--id", "long", "--wait")
    watching = start("watch", "--json")
    assert watching.stdout is not None
    await client.until(lambda: "RUNNING" in client.statuses("long"))
    first = asyncio.create_task(asyncio.to_thread(watching.stdout.readline))
    while not first.done():
        await client.submit("quick", f"q{time.monotonic()}")
        await asyncio.sleep(0.2)
    for process in (waiting, watching):
        process.send_signal(signal.SIGINT)
    for process in (waiting, watching):
        said = await asyncio.to_thread(process.communicate, timeout=20)
        assert process.returncode == ExitCode.INTERRUPTED, said
        assert "Traceback" not in said[1]
    assert client.statuses("long")[-1] == "RUNNING"
    assert json.loads(await asyncio.to_thread(lambda: fine(running.jef("show", "long", "--json"))))[
        "status"
    ] == ("RUNNING")


def test_a_reader_that_leaves_is_nobody_s_error(daemon: DaemonProcess) -> None:
    """`jef schema | head -1`: no traceback, no complaint."""
    command = f"{sys.executable} -m jef_daemon schema --asyncapi | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.stdout, done.stderr) == ("{\n", "")


async def test_a_broker_that_goes_ends_the_waiting(
    running: DaemonProcess, client: Client, start: Callable[..., subprocess.Popen[str]]
) -> None:
    """`submit --wait` and `watch` would hear no more: one sentence and exit code 4, never silence."""
    broker = urlsplit(client.url)
    pipes: list[asyncio.StreamWriter] = []

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while chunk := await reader.read(65536):
                writer.write(chunk)

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        to_broker = await asyncio.open_connection(broker.hostname, broker.port)
        pipes.extend((writer, to_broker[1]))
        await asyncio.gather(pass_on(reader, to_broker[1]), pass_on(to_broker[0], writer))

    between = await asyncio.start_server(connected, "127.0.0.1")
    port = between.sockets[0].getsockname()[1]
    url = with_port(client.url, port)
    waiting = start("--amqp-url", url, "submit", "slow", "seconds=60", "--id", "long", "--wait")
    watching = start("--amqp-url", url, "watch")
    assert watching.stdout is not None
    await client.until(lambda: "RUNNING" in client.statuses("long"))
    first = asyncio.create_task(asyncio.to_thread(watching.stdout.readline))
    while not first.done():
        await client.submit("quick", f"q{time.monotonic()}")
        await asyncio.sleep(0.2)
    between.close()
    for pipe in pipes:
        pipe.transport.abort()
    for process in (waiting, watching):
        _, complaints = await asyncio.to_thread(process.communicate, timeout=20)
        assert process.returncode == ExitCode.BROKER, complaints
        assert "Traceback" not in complaints
        assert complaints.splitlines()[-1].startswith("jef: the broker")
    assert client.statuses("long")[-1] == "RUNNING"
