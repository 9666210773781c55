"""The actions that come with the daemon, on real files and with real programs, told over a real broker."""

from __future__ import annotations

import asyncio
import filecmp
import hashlib
import json
import os
import re
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aio_pika
import psutil
import pytest

from tests.support.amqp import Client
from tests.support.process import DaemonProcess

MIB = 1024 * 1024
COMMANDS = ("say", "env", "where", "codes", "steps", "long", "family", "film", "absent")
"""Actions of this file alone; their queues go with the test."""


@pytest.fixture
async def commands(client: Client) -> AsyncIterator[Client]:
    """The client; the queues of this file's own actions are deleted afterwards."""
    yield client
    connection = await aio_pika.connect(client.url)
    async with connection:
        channel = await connection.channel()
        for name in COMMANDS:
            await channel.queue_delete(f"{client.prefix}.jobs.{name}")


@pytest.fixture
def files(daemon: DaemonProcess) -> Path:
    """The default root, there before the daemon."""
    folder = daemon.folder / "data" / "files"
    folder.mkdir(parents=True)
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    """Files with names that make lists difficult, in folders; returns contents by relative name."""
    contents = {
        "plain.txt": b"plain",
        "empty": b"",
        "with space": b"space",
        "ünïcode.bin": bytes(range(256)) * 5000,
        "line\nbreak": b"broken",
        "back\\slash": b"slashed",
        "deep/er/file": b"deep",
        "deep/other": b"other",
    }
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return contents


def sparse(path: Path, size: int) -> Path:
    """A big file that needs no disk."""
    with path.open("wb") as stream:
        stream.write(b"begin")
        stream.truncate(size)
    return path


def percentages(client: Client, execution_id: str) -> list[int]:
    """What was told while it ran."""
    return [told["progress"] for told in client.of(execution_id) if told["status"] == "RUNNING"]


def byte_messages(client: Client, execution_id: str, total: str) -> list[str]:
    """The messages that tell bytes; nothing else is told by who counts bytes."""
    found = [told["message"] for told in client.of(execution_id) if told["status"] == "RUNNING"]
    told = [message for message in found if message]
    assert all(re.match(rf"[\d.]+ \w+ of {re.escape(total)}", message) for message in told), told
    return told


async def refusal(client: Client, action: str, name: str, configuration: dict[str, Any]) -> dict[str, Any]:
    """Submit what must fail; returns the end."""
    await client.submit(action, name, configuration)
    end = await client.end_of(name)
    assert end["status"] == "FAILED", end
    return end


# --- checksum --------------------------------------------------------------------------------------------


async def test_checksum_of_a_file_tells_its_bytes(daemon: DaemonProcess, client: Client, files: Path) -> None:
    """By the wanted algorithm, with rising percentages and human sizes."""
    daemon.configure(jobs={"progress_interval_s": 0.05})
    daemon.start()
    big = sparse(files / "big.bin", 256 * MIB)
    (files / "a").write_bytes(b"abc")
    await client.submit("checksum", "default", {"path": "a"})
    await client.submit("checksum", "md5", {"path": "a", "algorithm": "md5"})
    await client.submit("checksum", "big", {"path": "big.bin", "algorithm": "sha3_512"})
    for name in ("sha256", "md5"):
        end = await client.end_of("default" if name == "sha256" else name)
        assert end["jobContextVariables"]["digest"] == hashlib.new(name, b"abc").hexdigest()
        assert end["jobContextVariables"]["algorithm"] == name
        assert (end["jobContextVariables"]["bytes"], end["jobContextVariables"]["manifest"]) == (3, None)
    end = await client.end_of("big", 60)
    with big.open("rb") as stream:
        assert end["jobContextVariables"]["digest"] == hashlib.file_digest(stream, "sha3_512").hexdigest()
    told = percentages(client, "big")
    assert told == sorted(told)
    assert len(set(told)) >= 4, told
    assert max(told) < 100
    assert len(byte_messages(client, "big", "256.0 MiB")) >= 3


async def test_checksum_of_a_tree_writes_a_manifest_that_sha256sum_takes(
    daemon: DaemonProcess, client: Client, files: Path
) -> None:
    """Every regular file, links left out; the manifest may lie in the tree, and is not in itself."""
    daemon.start()
    contents = tree(files / "tree")
    (files / "tree" / "link").symlink_to("/etc/passwd")
    (files / "tree" / "loop").symlink_to(".")
    os.mkfifo(files / "tree" / "fifo")

    def check(*options: str) -> subprocess.CompletedProcess[bytes]:
        command = ["sha256sum", "--check", *options, "SHA256SUMS"]
        return subprocess.run(command, cwd=files / "tree", capture_output=True, check=False)

    wanted = {"path": "tree", "manifest": "tree/SHA256SUMS"}
    digests = set()
    for name in ("first", "second"):
        await client.submit("checksum", name, wanted)
        end = await client.end_of(name)
        assert end["status"] == "COMPLETED", end
        found = end["jobContextVariables"]
        assert (found["files"], found["bytes"]) == (len(contents), sum(map(len, contents.values())))
        manifest = files / "tree" / "SHA256SUMS"
        assert found["manifest"] == str(manifest)
        digests.add(found["digest"])
        assert digests == {hashlib.sha256(manifest.read_bytes()).hexdigest()}
        checked = check("--strict")
        assert checked.returncode == 0, checked
        assert checked.stdout.count(b": OK\n") == len(contents)
    (files / "tree" / "deep" / "other").write_bytes(b"othex")
    assert b"deep/other: FAILED" in check().stdout
    assert not [path for path in files.rglob("*") if "jef-part" in path.name]


async def test_checksum_refuses(daemon: DaemonProcess, client: Client, files: Path, tmp_path: Path) -> None:
    """What lies outside, is not there, is no file, no algorithm; a manifest never replaces what it lists."""
    daemon.start()
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"secret")
    (files / "a").write_bytes(b"abc")
    (files / "out").symlink_to(outside)
    os.mkfifo(files / "fifo")
    for number, path in enumerate(["out/secret", "out", "../../../outside/secret", str(outside)]):
        end = await refusal(client, "checksum", f"out{number}", {"path": path})
        assert (end["error"]["type"], "outside the roots" in end["message"]) == ("ConfigurationRefused", True)
    end = await refusal(client, "checksum", "list", {"path": "a", "manifest": "out/list"})
    assert "outside the roots" in end["message"]
    assert sorted(path.name for path in outside.iterdir()) == ["secret"]
    end = await refusal(client, "checksum", "missing", {"path": "nothing"})
    assert "No such file" in end["message"]
    assert "nothing" in end["message"]
    end = await refusal(client, "checksum", "fifo", {"path": "fifo"})
    assert "no regular file" in end["message"]
    end = await refusal(client, "checksum", "algorithm", {"path": "a", "algorithm": "crc7"})
    assert "sha256" in end["message"]
    end = await refusal(client, "checksum", "typo", {"path": "a", "algoritm": "md5"})
    assert "algoritm" in end["message"]
    end = await refusal(client, "checksum", "itself", {"path": "a", "manifest": "a"})
    assert "manifest" in end["message"]
    assert (files / "a").read_bytes() == b"abc"


# --- copy ------------------------------------------------------------------------------------------------


async def test_copy_of_a_file_and_of_a_tree(daemon: DaemonProcess, client: Client, files: Path) -> None:
    """The same bytes, modes and times; into a folder that exists too; bytes told; links left out."""
    daemon.start()
    big = sparse(files / "big.bin", 300 * MIB)
    big.chmod(0o640)
    os.utime(big, (1_000_000_000, 1_000_000_000))
    contents = tree(files / "tree")
    (files / "tree" / "link").symlink_to("/etc/passwd")
    (files / "tree" / "void").mkdir()
    (files / "folder").mkdir()
    await client.submit("copy", "big", {"source": "big.bin", "destination": "new/folder/copy.bin"})
    await client.submit("copy", "into", {"source": "tree/plain.txt", "destination": "folder"})
    await client.submit("copy", "tree", {"source": "tree", "destination": "copied"})
    end = await client.end_of("into")
    assert end["jobContextVariables"]["destination"] == str(files / "folder" / "plain.txt")
    assert (files / "folder" / "plain.txt").read_bytes() == b"plain"
    end = await client.end_of("tree")
    assert end["jobContextVariables"]["files"] == len(contents)
    copied = files / "copied"
    assert {
        str(path.relative_to(copied)): path.read_bytes() for path in copied.rglob("*") if path.is_file()
    } == contents
    assert (copied / "void").is_dir()
    assert not (copied / "link").is_symlink()
    end = await client.end_of("big", 60)
    copy = files / "new" / "folder" / "copy.bin"
    assert "verified" in end["result"]
    assert (copy.stat().st_mode & 0o777, copy.stat().st_mtime) == (0o640, 1_000_000_000)
    assert filecmp.cmp(big, copy, shallow=False)
    told = percentages(client, "big")
    assert told == sorted(told)
    assert len(set(told)) >= 3, told
    # Written and read back: twice the file.
    assert len(byte_messages(client, "big", "600.0 MiB")) >= 2
    assert not list(files.rglob("*.part"))


async def test_copy_refuses(daemon: DaemonProcess, client: Client, files: Path, tmp_path: Path) -> None:
    """An existing target unless told to, itself, what lies outside, what is not there."""
    daemon.start()
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"secret")
    (files / "a").write_bytes(b"new")
    (files / "b").write_bytes(b"old")
    (files / "out").symlink_to(outside)
    (files / "tree").mkdir()
    (files / "tree" / "file").write_bytes(b"in the tree")
    (files / "same").symlink_to("a")

    def wanted(source: str, destination: str, **more: Any) -> dict[str, Any]:
        return {"source": source, "destination": destination, **more}

    end = await refusal(client, "copy", "exists", wanted("a", "b"))
    assert "set overwrite" in end["message"]
    assert (files / "b").read_bytes() == b"old"
    for number, (source, destination) in enumerate(
        [("a", "a"), ("a", "same"), ("a", "./tree/../a"), ("tree", "tree/inner"), ("tree/file", "tree/file")]
    ):
        end = await refusal(client, "copy", f"self{number}", wanted(source, destination, overwrite=True))
        assert "lie within each other" in end["message"], end
    for number, (source, destination) in enumerate(
        [("out/secret", "c"), ("a", "out/c"), ("a", "out"), ("a", "../../../outside/c"), ("/etc/passwd", "c")]
    ):
        end = await refusal(client, "copy", f"out{number}", wanted(source, destination))
        assert "outside the roots" in end["message"], end
    assert "there is no such file" in (await refusal(client, "copy", "missing", wanted("no", "c")))["message"]
    assert [path.name for path in outside.iterdir()] == ["secret"]
    assert (files / "a").read_bytes() == b"new"
    await client.submit("copy", "replace", wanted("a", "b", overwrite=True))
    assert (await client.end_of("replace"))["status"] == "COMPLETED"
    assert (files / "b").read_bytes() == b"new"
    (files / "tree2").mkdir()
    (files / "tree2" / "stale").write_bytes(b"")
    await client.submit("copy", "replaced", wanted("tree", "tree2", overwrite=True))
    assert (await client.end_of("replaced"))["status"] == "COMPLETED"
    assert [path.name for path in (files / "tree2").iterdir()] == ["file"]
    assert sorted(path.name for path in files.iterdir()) == ["a", "b", "out", "same", "tree", "tree2"]


async def test_a_killed_copy_leaves_no_half_file(daemon: DaemonProcess, client: Client, files: Path) -> None:
    """Kill -9 in the middle: nothing under the name; run again: the whole, and no remains."""
    daemon.configure(jobs={"progress_interval_s": 0.05})
    daemon.start()
    big = sparse(files / "big.bin", 768 * MIB)
    await client.submit("copy", "1", {"source": "big.bin", "destination": "target.bin"})
    await client.until(lambda: bool(byte_messages(client, "1", "1.5 GiB")))
    daemon.kill()
    assert not (files / "target.bin").exists()
    assert [path.name for path in files.glob(".*.part")], "it was killed before it began"
    daemon.start()
    end = await client.end_of("1", 60)
    assert (end["status"], end["attempt"]) == ("COMPLETED", 2)
    assert sorted(path.name for path in files.iterdir()) == ["big.bin", "target.bin"]
    assert (files / "target.bin").stat().st_size == big.stat().st_size
    with (files / "target.bin").open("rb") as stream:
        assert stream.read(10) == b"begin\0\0\0\0\0"


async def test_a_limit_and_a_rival_leave_nothing_behind(
    daemon: DaemonProcess, client: Client, files: Path
) -> None:
    """Stopped by its limit: no remains. Who puts a name there meanwhile keeps it, file or tree."""
    daemon.configure(jobs={"progress_interval_s": 0.05})
    daemon.start()
    (files / "tree").mkdir()
    sparse(files / "big.bin", 1024 * MIB)
    sparse(files / "tree" / "big.bin", 300 * MIB)
    await client.submit(
        "copy", "limit", {"source": "big.bin", "destination": "slow"}, timeouts={"execution": 0.3}
    )
    assert (await client.end_of("limit"))["error"]["type"] == "ExecutionTimeout"
    assert sorted(path.name for path in files.iterdir()) == ["big.bin", "tree"]
    wanted = {"tree": "tree", "file": "tree/big.bin"}
    for name, source in wanted.items():
        await client.submit("copy", name, {"source": source, "destination": f"to-{name}"})
    await client.until(lambda: all(byte_messages(client, name, "600.0 MiB") for name in wanted))
    (files / "to-tree").mkdir()
    (files / "to-tree" / "mine").write_bytes(b"mine")
    (files / "to-file").write_bytes(b"mine")
    for name in wanted:
        end = await client.end_of(name, 60)
        assert (end["status"], end.get("error", {}).get("type")) == ("FAILED", "FileExistsError")
    assert [path.name for path in (files / "to-tree").iterdir()] == ["mine"]
    assert (files / "to-file").read_bytes() == b"mine"
    assert sorted(path.name for path in files.iterdir()) == ["big.bin", "to-file", "to-tree", "tree"]


async def test_a_copy_killed_at_its_very_end_is_not_made_twice(
    daemon: DaemonProcess, client: Client, files: Path
) -> None:
    """Killed after the rename and before its end was recorded: the next attempt finds its own work.

    The instant itself is too short to hit: the copies are put there after the kill, as it would have left them.
    """
    daemon.configure(slots={"blocking_processes": 6, "warm_processes": 6})
    daemon.start()
    (files / "tree").mkdir()
    (files / "folder").mkdir()
    sparse(files / "tree" / "big.bin", 400 * MIB)
    (files / "lost").mkdir()
    sparse(files / "lost" / "big.bin", 400 * MIB)
    (files / "kept").mkdir()
    (files / "kept" / "old").write_bytes(b"old")
    wanted = {
        "tree": ("tree", "target", False),
        "overwritten": ("tree", "again", True),
        "file": ("tree/big.bin", "file.bin", False),
        "placed": ("tree/big.bin", "folder", False),
        "other": ("tree/big.bin", "other.bin", False),
        "lost": ("lost", "kept", True),
    }
    for name, (source, destination, overwrite) in wanted.items():
        configuration = {"source": source, "destination": destination, "overwrite": overwrite}
        await client.submit("copy", name, configuration)
    async with asyncio.timeout(30):
        while len(list(files.rglob(".*.part"))) < len(wanted):
            await asyncio.sleep(0.01)
    daemon.kill()
    made = {"tree": "target", "overwritten": "again", "file": "file.bin", "placed": "folder/big.bin"}
    for name, path in made.items():
        copying = ["cp", "--archive", "--sparse=always", wanted[name][0], path]
        subprocess.run(copying, cwd=files, check=True)
    sparse(files / "other.bin", 10)
    (part,) = files.glob(".kept.*.part")
    (files / "kept").rename(part.with_suffix(".old"))  # killed between its two renames
    (files / "lost" / "big.bin").unlink()
    (files / "lost").rmdir()
    daemon.start()
    for name, path in made.items():
        end = await client.end_of(name, 60)
        assert (end["status"], end["attempt"]) == ("COMPLETED", 2), end
        assert end["jobContextVariables"]["destination"] == str(files / path)
    end = await client.end_of("other", 60)
    assert (end["status"], end["attempt"]) == ("FAILED", 2), end
    assert "set overwrite" in end["message"]
    assert "there is no such file" in (await client.end_of("lost", 60))["message"]
    assert sorted(str(path.relative_to(files)) for path in files.rglob("*")) == [
        "again",
        "again/big.bin",
        "file.bin",
        "folder",
        "folder/big.bin",
        "kept",
        "kept/old",
        "other.bin",
        "target",
        "target/big.bin",
        "tree",
        "tree/big.bin",
    ]


# --- command ---------------------------------------------------------------------------------------------


async def test_a_command_is_filled_and_never_a_shell(
    daemon: DaemonProcess, commands: Client, tmp_path: Path
) -> None:
    """Placeholders of all kinds, each one argument whatever is in it; a list becomes several."""
    daemon.configure("""
[actions.say]
command = ["printf", "<%s>", "{configuration.text}", "a-{configuration.number}-{{b}}", "{configuration.list}",
           "{executionId}", "{workflowId}", "{attempt}", "{jobContextVariables.from}", "{configuration.deep.er}"]
""")
    daemon.start()
    victim = tmp_path / "victim"
    victim.write_text("alive")
    texts = [
        f"; rm {victim}",
        f"$(rm {victim})",
        f"`rm {victim}`",
        f"| tee {victim}",
        f"> {victim}",
        "* ?",
        'it\'s "quoted" \\ $HOME',
        "{configuration.number}",
        "line\nbreak",
        "",
    ]
    for number, text in enumerate(texts):
        await commands.submit(
            "say",
            f"say-{number}",
            {"text": text, "number": 7, "list": ["x y", True, 1.5], "deep": {"er": "in"}},
            workflowId="flow",
            jobContextVariables={"from": "before"},
        )
    for number, text in enumerate(texts):
        end = await commands.end_of(f"say-{number}")
        assert end["jobContextVariables"] == {
            "exitCode": 0,
            "output": f"<{text}><a-7-{{b}}><x y><true><1.5><say-{number}><flow><1><before><in>",
        }
    assert victim.read_text() == "alive"
    for name, wrong in {
        "missing": {"text": "a", "list": [], "deep": {"er": 1}},
        "deep": {"text": "a", "number": 1, "list": [], "deep": {}},
        "object": {"text": {"a": 1}, "number": 1, "list": [], "deep": {"er": 1}},
        "nul": {"text": "a\0b", "number": 1, "list": [], "deep": {"er": 1}},
    }.items():
        await commands.submit("say", name, wrong, workflowId="f", jobContextVariables={"from": "b"})
        end = await commands.end_of(name)
        assert end["error"]["type"] == "ConfigurationRefused", end


async def test_a_command_s_surroundings(daemon: DaemonProcess, commands: Client, tmp_path: Path) -> None:
    """Its variables, none of the daemon's secrets, its folder; exit codes that mean success."""
    leaving = tmp_path / "leaving"
    leaving.touch(mode=0o755)
    daemon.configure(f"""
[actions.env]
command = ["env"]
environment = {{GREETING = "hello {{configuration.name}}"}}
inherit_environment = ["CHOSEN"]
[actions.where]
command = ["pwd"]
working_directory = "{tmp_path}"
[actions.held]
command = ["pwd"]
[actions.codes]
command = ["sh", "-c", "echo before; echo wrong >&2; exit $0", "{{configuration.code}}"]
success_exit_codes = [0, 3]
[actions.absent]
command = ["{leaving}"]
""")
    daemon.start(CHOSEN="passed on", OTHER_SECRET="hunter2")
    await commands.submit("env", "env", {"name": "$USER"}, workflowId="flow")
    output = (await commands.end_of("env"))["jobContextVariables"]["output"]
    found = dict(line.partition("=")[::2] for line in output.splitlines())
    assert found["GREETING"] == "hello $USER"
    assert (found["JEF_EXECUTION_ID"], found["JEF_ATTEMPT"], found["JEF_WORKFLOW_ID"]) == ("env", "1", "flow")
    assert (found["CHOSEN"], found["PATH"]) == ("passed on", os.environ["PATH"])
    assert "hunter2" not in output
    assert "amqp" not in output
    await commands.submit("where", "where")
    assert (await commands.end_of("where"))["jobContextVariables"]["output"] == f"{tmp_path}\n"
    await commands.submit("held", "scratch")
    scratch = Path((await commands.end_of("scratch"))["jobContextVariables"]["output"].strip())
    assert scratch.parent == daemon.folder / "data" / "scratch"
    await commands.submit("codes", "fine", {"code": 3})
    assert (await commands.end_of("fine"))["jobContextVariables"] == {
        "exitCode": 3,
        "output": "before\nwrong\n",
    }
    end = await refusal(commands, "codes", "bad", {"code": 4})
    assert end["error"]["type"] == "CommandFailed"
    assert "exit code 4" in end["message"]
    assert "before\nwrong" in end["message"]
    leaving.unlink()
    end = await refusal(commands, "absent", "absent", {})
    assert f"there is no program {leaving}; install it" in end["message"]


async def test_a_command_tells_by_patterns_and_keeps_its_end(daemon: DaemonProcess, commands: Client) -> None:
    """Progress and message as they come, also behind carriage returns; the output's end, no more."""
    daemon.configure(r"""
[actions.steps]
command = ["sh", "-c", 'for i in 1 2 3 4; do printf "part %d of 5: chapter %d\r" $i $i; sleep 0.4; done; seq 20000']
progress_pattern = 'part (?P<done>\d+) of (?P<total>\d+)'
message_pattern = ': (chapter \d+)'
output_tail_bytes = 50
[actions.long]
command = ["sh", "-c", "seq 20000; echo; echo the last words; exit 1"]
output_tail_bytes = 30
""")
    daemon.start()
    await commands.submit("steps", "1")
    end = await commands.end_of("1")
    told = [(one["progress"], one["message"]) for one in commands.of("1") if one["status"] == "RUNNING"]
    for number in (2, 3, 4):
        assert (20 * number, f"chapter {number}") in told
    assert end["result"] == "chapter 4"
    everything = "".join(f"{number}\n" for number in range(1, 20001))
    assert end["jobContextVariables"] == {"exitCode": 0, "output": everything[-50:]}
    end = await refusal(commands, "long", "2", {})
    assert end["message"].endswith("the last words")
    assert "17000" not in end["message"]


async def test_a_limit_ends_the_whole_family_of_a_command(
    daemon: DaemonProcess, commands: Client, tmp_path: Path
) -> None:
    """The child's child too, deaf to SIGTERM; the same when the program ends and leaves somebody."""
    notes = tmp_path / "pids"
    child = f"trap '' TERM; echo $$ >> {notes}; while :; do sleep 0.2; done"
    daemon.configure("""
[actions.family]
command = ["sh", "-c", '''sh -c "sh -c \\"$0\\" & wait" "$0" "$1" & eval "$1"''', "{configuration.child}",
           "{configuration.then}"]
""")
    daemon.start()

    async def pids() -> list[int]:
        async with asyncio.timeout(10):
            while not (notes.exists() and notes.read_text().endswith("\n")):
                await asyncio.sleep(0.05)
        return [int(line) for line in notes.read_text().splitlines()]

    await commands.submit("family", "limit", {"child": child, "then": "wait"}, timeouts={"execution": 1.5})
    (deaf,) = await pids()
    assert psutil.pid_exists(deaf)
    end = await commands.end_of("limit")
    assert end["error"]["type"] == "ExecutionTimeout"
    assert not _lives(deaf)
    notes.unlink()
    await commands.submit("family", "left", {"child": child, "then": f"while [ ! -s {notes} ]; do :; done"})
    assert (await commands.end_of("left"))["status"] == "COMPLETED"
    (deaf,) = await pids()
    assert not _lives(deaf)


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def ffmpeg(*arguments: str) -> bytes:
    """Run it; returns its complaints."""
    command = ["ffmpeg", "-nostdin", "-v", "error", *arguments]
    return subprocess.run(command, stderr=subprocess.PIPE, check=True).stderr


async def test_ffmpeg_tells_its_percentage(daemon: DaemonProcess, commands: Client, tmp_path: Path) -> None:
    """A real transcode: the input's duration and ffmpeg's own progress make the percentage."""
    source, target = tmp_path / "in.mkv", tmp_path / "out.mp4"
    made = ["-f", "lavfi", "-i", "testsrc=duration=20:size=320x240:rate=25", "-c:v", "mpeg4", str(source)]
    assert ffmpeg(*made) == b""
    daemon.configure(
        r"""
[actions.film]
command = ["ffmpeg", "-hide_banner", "-nostdin", "-nostats", "-stats_period", "0.1", "-progress", "pipe:1", "-y",
           "-readrate", "8", "-i", "{configuration.source}", "-c:v", "libx264", "-preset", "ultrafast",
           "-s", "{configuration.size}", "{configuration.target}"]
duration_pattern = 'Duration: (?P<duration>[\d:.]+)'
progress_pattern = '^out_time=(?P<time>[\d:.]+)'
message_pattern = '^(frame=\d+)'
"""
    )
    daemon.start()
    await commands.submit("film", "1", {"source": str(source), "target": str(target), "size": "160x120"})
    end = await commands.end_of("1", 60)
    assert end["status"] == "COMPLETED", end
    assert "progress=end" in end["jobContextVariables"]["output"]
    told = percentages(commands, "1")
    assert told == sorted(told)
    assert len({percent for percent in told if 0 < percent < 100}) >= 4, told
    assert [one for one in commands.of("1") if one["message"].startswith("frame=")]
    looked = [
        "ffprobe",
        "-v",
        "error",
        "-show_entries",
        "format=duration:stream=width,codec_name",
        "-of",
        "json",
    ]
    found = json.loads(subprocess.run([*looked, str(target)], capture_output=True, check=True).stdout)
    assert 19.5 < float(found["format"]["duration"]) < 20.5
    assert (found["streams"][0]["codec_name"], found["streams"][0]["width"]) == ("h264", 160)
    assert ffmpeg("-i", str(target), "-f", "null", "-") == b""  # every frame of it can be decoded
    end = await refusal(commands, "film", "2", {"source": "/nowhere", "target": str(target), "size": "9x9"})
    assert "No such file" in end["message"]
