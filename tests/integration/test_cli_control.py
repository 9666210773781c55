"""`jef cancel`, `jef retry`, `jef resume`, and what `jef show` tells of it: as people use them."""

from __future__ import annotations

import getpass
import json
import socket
import subprocess

from jef_daemon.errors import ExitCode
from tests.support.amqp import Client
from tests.support.process import DaemonProcess

WHO = f"operator:{getpass.getuser()}@{socket.gethostname()}"


def words(finished: subprocess.CompletedProcess[str]) -> list[list[str]]:
    """The lines of an output, split."""
    assert "Traceback" not in finished.stderr, finished
    return [line.split(maxsplit=2) for line in finished.stdout.splitlines()]


async def test_one_some_and_the_unknown(daemon: DaemonProcess, client: Client) -> None:
    """One line each, in the order asked; the exit code says whether all were accepted; who asked is told."""
    daemon.start()
    for name in ("1", "2", "3"):
        await client.submit("slow", name, {"seconds": 60})
    await client.until(lambda: all("RUNNING" in client.statuses(name) for name in ("1", "2", "3")))
    one = daemon.jef("cancel", "1", "--reason", "wrong file")
    assert (one.returncode, words(one)) == (ExitCode.OK, [["1", "RUNNING", "asked to stop"]])
    end = await client.end_of("1")
    assert (end["status"], end["message"], end["by"]) == ("CANCELLED", "wrong file", WHO)
    some = daemon.jef("cancel", "2", "1", "later", "3", "--json")
    assert some.returncode == ExitCode.FAILED
    told = [json.loads(line) for line in some.stdout.splitlines()]
    assert [(one["executionId"], one["accepted"], one["status"]) for one in told] == [
        ("2", True, "RUNNING"),
        ("1", False, "CANCELLED"),
        ("later", True, None),
        ("3", True, "RUNNING"),
    ]
    unknown = daemon.jef("retry", "nobody")
    assert unknown.returncode == ExitCode.NOT_FOUND
    assert "no execution nobody is known" in unknown.stdout
    refused = daemon.jef("resume", "1")
    assert (refused.returncode, words(refused)[0][:2]) == (ExitCode.FAILED, ["1", "CANCELLED"])


async def test_a_workflow_and_its_latecomers(daemon: DaemonProcess, client: Client) -> None:
    """All that it has, and all that it will have."""
    daemon.start()
    await client.submit("slow", "1", {"seconds": 60}, workflowId="w")
    await client.until(lambda: "RUNNING" in client.statuses("1"))
    answer = daemon.jef("cancel", "--workflow", "w")
    assert (answer.returncode, words(answer)[0][2].split(";")[0]) == (ExitCode.OK, "1 cancelled")
    await client.submit("quick", "2", workflowId="w")
    for name in ("1", "2"):
        assert (await client.end_of(name))["status"] == "CANCELLED"


async def test_many_by_a_filter(daemon: DaemonProcess, client: Client) -> None:
    """Shown and counted first; nothing is sent unless somebody says yes; then each has its line."""
    daemon.start()
    for number in range(12):
        await client.submit("misbehave", f"job-{number}", {"how": "raise"})
    await client.submit("quick", "other")
    await client.until(lambda: all("FAILED" in client.statuses(f"job-{number}") for number in range(12)))
    asked = daemon.jef("retry", "--action", "misbehave", "--since", "1h")
    assert asked.returncode == ExitCode.FAILED  # nobody answers the question
    assert "retry 12 jobs?" in asked.stderr
    assert "and 2 more" in asked.stderr
    assert asked.stdout.strip() == ""
    assert all(client.statuses(f"job-{number}").count("QUEUED") == 1 for number in range(12))
    done = daemon.jef("retry", "--action", "misbehave", "--yes")
    assert done.returncode == ExitCode.OK
    assert sorted(line[:2] for line in words(done)) == sorted(
        [f"job-{number}", "QUEUED"] for number in range(12)
    )
    await client.until(
        lambda: all(client.statuses(f"job-{number}").count("FAILED") == 2 for number in range(12))
    )
    nothing = daemon.jef("cancel", "--status", "QUEUED", "--yes")
    assert (nothing.returncode, nothing.stdout) == (ExitCode.OK, "")


async def test_show_tells_of_retries_cancels_and_checkpoints(daemon: DaemonProcess, client: Client) -> None:
    """Attempt of how many, when the next begins, whether somebody wants it stopped, what was saved."""
    daemon.configure("[actions.broken.retry]\nattempts = 3\nfirst_s = 600\njitter = 0\n")
    daemon.start()
    await client.submit("broken", "1", {"how": "raise"})
    await client.submit("farm", "2")
    await client.until(lambda: client.statuses("1")[-1:] == ["QUEUED"] and len(client.of("1")) > 2)
    await client.until(lambda: any(told.get("externalId") for told in client.of("2")))
    shown = daemon.jef("show", "1")
    assert "2 of 3" in shown.stdout
    assert "notBefore" in shown.stdout
    assert daemon.jef("cancel", "2").returncode == ExitCode.OK
    told = json.loads(daemon.jef("show", "2", "--json").stdout)
    assert (told["cancelRequested"], told["checkpoint"], told["notBefore"]) == (True, {"polls": 0}, None)


def test_what_is_asked_wrongly_is_refused_before_anything_is_sent(daemon: DaemonProcess) -> None:
    """One sentence, and the exit code of its kind."""
    for arguments in (
        ["cancel"],
        ["cancel", "1", "--workflow", "w"],
        ["retry", "1", "--status", "FAILED"],
        ["cancel", "not an id"],
        ["cancel", "--status", "NONSENSE"],
        ["cancel", "--since", "yesterday"],
    ):
        refused = daemon.jef(*arguments)
        assert refused.returncode == ExitCode.SETTINGS, refused
        assert refused.stderr.startswith("jef: ")
    nobody = daemon.jef("cancel", "1")
    assert nobody.returncode == ExitCode.BROKER
    assert "start one with `jef run`" in nobody.stderr


async def test_no_daemon_answers(daemon: DaemonProcess, client: Client) -> None:
    """The command waits in its queue, and is carried out by the next that runs."""
    daemon.start()
    await client.submit("slow", "1", {"seconds": 60})
    await client.until(lambda: "RUNNING" in client.statuses("1"))
    await client.submit("quick", "2", notBefore="2100-01-01T00:00:00Z")
    await client.until(lambda: "QUEUED" in client.statuses("2"))
    daemon.kill()
    silent = daemon.jef("cancel", "2")
    assert silent.returncode == ExitCode.BROKER
    assert "no daemon answers" in silent.stderr
    daemon.start()
    assert (await client.end_of("2"))["status"] == "CANCELLED"
