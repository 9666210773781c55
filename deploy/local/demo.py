#!/usr/bin/env python3
"""The main job, to look at: real work through a real broker, in a live table. `make demo` runs it.

A private RabbitMQ and a daemon are started under `.jef/demo/`; a producer that speaks plain AMQP publishes
requests and subscribes to the status notifications. In the end what was told is compared with what this file
says should happen, and everything that was started is stopped. Exit codes: 0 all as said, 1 something was
not, 130 interrupted.

    demo.py [--picture FILE.svg]      also draw the table, in the midst of it, into a file
"""

from __future__ import annotations

import argparse
import asyncio
import filecmp
import json
import os
import re
import shutil
import sys
import sysconfig
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aio_pika
import film
from aio_pika.abc import AbstractChannel
from broker import URL_VARIABLE, BrokerError
from playground import ROOT, Playground, PlaygroundError
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from jef_daemon.cli.table import JobTable, line
from jef_daemon.cli.words import styled
from jef_daemon.names import Names

FOLDER = ROOT / ".jef" / "demo"
FILES = FOLDER / "data" / "files"
FILM = FILES / "film"
LIBRARY = Path(sysconfig.get_paths()["purelib"]) / "sqlalchemy"
"""An installed package: hundreds of real files, tens of megabytes."""
_WITHIN_S = 50.0
_ENDS = {"COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT"}

_CONFIGURATION = """\
amqp_url_file = {url_file}
data_dir = {data}
python_path = [{examples}]
prefix = "PREFIX"

[logging]
format = "json"

[slots]
total = 6

[jobs]
progress_interval_s = 0.1

[actions.word-count]
executor = "word_count:WordCount"

[actions.greet]
executor = "greet:greet"

[actions.greet-slowly]
executor = "greet:greet_slowly"

[actions.nap]
command = ["sleep", "{{configuration.seconds}}"]

[actions.archive]
command = ["sh", "archive.sh", "{{configuration.folder}}", "{{configuration.target}}"]
working_directory = {examples}
progress_pattern = 'packed (?P<done>\\d+) of (?P<total>\\d+)'
message_pattern = 'packed .*'

[actions.compare]
command = ["diff", "-q", "{{configuration.one}}", "{{configuration.other}}"]
working_directory = {root}

[actions.checksum]
roots = [{root}]

[actions.copy]
roots = [{files}, LIBRARY]
"""

_TOUR = "tour"
_WORKFLOW = """\
name: tour
variables: {guest: nobody}
stages:
  - name: guests
    action: greet
    forEach: [Ann, Bob]
    configuration: {name: "{{ item }}"}
  - name: both
    action: greet
    configuration: {name: "{{ workflow.guest }}, after {{ stages.guests.result | join(' and ') }}"}
  - {name: goodbye, action: greet-slowly, always: true, configuration: {name: goodbye}}
"""

_REGRET = "changed my mind"


@dataclass
class Job:
    """A request, and what must come of it."""

    execution_id: str
    action: str
    configuration: Mapping[str, Any]
    status: str = "COMPLETED"
    says: str = ""
    """Part of the last message, or of the error's."""
    why: str = ""
    """What it shows."""
    lock: str = ""
    """A resource that it wants for itself."""
    is_stage: bool = False
    """A workflow asks for it."""
    told: list[dict[str, Any]] = field(default_factory=list)

    @property
    def is_over(self) -> bool:
        """Whether its end was told."""
        return bool(self.told) and self.told[-1]["status"] in _ENDS

    @property
    def words(self) -> str:
        """What its end was told with."""
        last = self.told[-1] if self.told else {}
        return str(last.get("message") or (last.get("error") or {}).get("message") or "").partition("\n")[0]

    def problem(self) -> str | None:
        """What went otherwise than this file says."""
        if not self.is_over:
            return f"has not ended: {self.told[-1]['status'] if self.told else 'never told'}"
        last = self.told[-1]
        if last["status"] != self.status:
            return f"is {last['status']} ({self.words}), not {self.status}"
        if self.says not in json.dumps(last, ensure_ascii=False):
            return f"does not say {self.says!r} but {self.words!r}"
        numbers = [told["sequence"] for told in self.told]
        if numbers != sorted(set(numbers)):
            return "was told in a wrong order"
        if sum(told["status"] in _ENDS for told in self.told) != 1:
            return "ended more than once"
        return None


def jobs() -> list[Job]:
    """The demo."""
    return [
        Job(
            "checksum-library",
            "checksum",
            {"path": str(LIBRARY), "algorithm": "sha3_512"},
            why="a large tree",
        ),
        Job(
            "checksum-project",
            "checksum",
            {"path": str(ROOT / "jef_daemon"), "manifest": str(FILES / "project.sha256")},
            why="with a manifest",
        ),
        Job(
            "copy-library",
            "copy",
            {"source": str(LIBRARY), "destination": str(FILES / "library")},
            why="read back, compared",
        ),
        Job("words", "word-count", {"folder": str(LIBRARY)}, says="words", why="an executor in Python"),
        Job(
            "archive",
            "archive",
            {"folder": str(LIBRARY), "target": str(FILES / "archives")},
            says="archives",
            why="a program, its percentage read from its output",
        ),
        Job("hello", "greet-slowly", {"name": "you", "patience": 1}, says="at last", why="blocking code"),
        Job("twice", "greet", {"name": "once"}, says="Hello once", why="sent twice, runs once"),
        Job("cut-1", "greet-slowly", {"name": "asset", "patience": 1}, why="holds a lock", lock="asset/42"),
        Job("cut-2", "greet-slowly", {"name": "asset", "patience": 0}, why="waits for it", lock="asset/42"),
        Job("unwanted", "nap", {"seconds": 600}, "CANCELLED", _REGRET, "cancelled while it runs"),
        Job(
            "differ",
            "compare",
            {"one": "README.md", "other": "LICENSE"},
            "FAILED",
            "exit code 1",
            "a program fails",
        ),
        Job("no-such-file", "checksum", {"path": str(ROOT / "nothing")}, "FAILED", "nothing", "bad input"),
        Job(
            "no-folder",
            "word-count",
            {"suffix": ".py"},
            "FAILED",
            "folder",
            "the executor's model refuses it",
        ),
        Job(
            "burglar",
            "copy",
            {"source": "/etc/passwd", "destination": "loot"},
            "FAILED",
            "roots",
            "not allowed",
        ),
        Job("stranger", "transmogrify", {}, "FAILED", "transmogrify", "an action that nobody has"),
        *_stages(),
        *(_stages_of_film() if film.is_possible() else ()),
    ]


def _stages_of_film() -> list[Job]:
    return [
        Job(name, action, {}, status, says, why, is_stage=True)
        for name, action, status, says, why in film.STAGES
    ]


def _stages() -> list[Job]:
    """Of the workflow."""
    told = (
        ("guests.0", "greet", "Hello Ann", "a workflow: a list side by side"),
        ("guests.1", "greet", "Hello Bob", "and its other item"),
        ("both", "greet", "Hello you, after Hello Ann and Hello Bob", "a stage with their results"),
        ("goodbye", "greet-slowly", "goodbye", "a stage that always comes last"),
    )
    return [
        Job(f"{_TOUR}:{stage}:1", action, {}, says=says, why=why, is_stage=True)
        for stage, action, says, why in told
    ]


class Demo:
    """The producer, who is its own watcher."""

    def __init__(self, url: str, names: Names, console: Console) -> None:
        self._url = url
        self._names = names
        self._console = console
        self._jobs = {job.execution_id: job for job in jobs()}
        self._changed = asyncio.Event()
        self._table = JobTable("jef_daemon at work", rows=40)
        self._picture: tuple[int, JobTable] = (-1, self._table)
        self.dead: list[str] = []
        self._channel: AbstractChannel

    async def run(self) -> list[str]:
        """Publish, watch, compare; returns what went wrong."""
        connection = await aio_pika.connect(self._url)
        async with connection:
            channel = self._channel = await connection.channel()
            # A queue of our own on the exchange of notifications: all that a watcher needs.
            told = await channel.declare_queue(exclusive=True)
            for each in (self._names.status, self._names.workflow_status):
                await told.bind(each, "#")
            await told.consume(self._take, no_ack=True)
            exchange = await channel.get_exchange(self._names.jobs)
            for routing_key, body in self._requests():
                message = aio_pika.Message(body, delivery_mode=aio_pika.DeliveryMode.PERSISTENT)
                await exchange.publish(message, routing_key)
            await self._send(
                self._names.workflows, {"workflowId": _TOUR, "workflow": _TOUR, "variables": {"guest": "you"}}
            )
            if film.is_possible():
                for request in await asyncio.to_thread(film.requests, FILM):
                    await self._send(self._names.workflows, request)
            await self._watch()
            letters = await channel.get_queue(self._names.dead_letters)
            while letter := await letters.get(fail=False, no_ack=True):
                self.dead.append(str(letter.headers.get("x-jef-reason")))
        return [*self._problems(), *(film.problems(FILM) if film.is_possible() else ())]

    async def _send(self, queue: str, body: Mapping[str, Any]) -> None:
        message = aio_pika.Message(json.dumps(body).encode(), delivery_mode=aio_pika.DeliveryMode.PERSISTENT)
        await self._channel.default_exchange.publish(message, queue)

    def _requests(self) -> Iterator[tuple[str, bytes]]:
        for job in self._jobs.values():
            if job.is_stage:
                continue
            locks = [{"resource": job.lock, "mode": "EXCLUSIVE"}] if job.lock else []
            request = {"executionId": job.execution_id, "configuration": job.configuration, "locks": locks}
            body = json.dumps(request).encode()
            yield job.action, body
            if job.execution_id == "twice":
                yield job.action, body
        yield "greet", b"Dear daemon, please greet my mother."

    async def _take(self, message: aio_pika.abc.AbstractIncomingMessage) -> None:
        told = json.loads(message.body)
        if (command := film.command(told)) is not None:
            await self._send(self._names.control, command | {"by": "the demo"})
        job = self._jobs.get(told.get("executionId", ""))
        if job is None:
            return
        before: dict[str, Any] = job.told[-1] if job.told else {"status": None, "progress": 0}
        job.told.append(told)
        self._table.put(told)
        moved = told["status"] != before["status"] or told["progress"] // 20 > before["progress"] // 20
        if moved and not self._console.is_terminal:
            self._console.print(line(told), markup=False, highlight=False, soft_wrap=True)
        self._changed.set()
        if (told["executionId"], told["status"], before["status"]) == ("unwanted", "RUNNING", "QUEUED"):
            regret = {"command": "cancel", "executionId": "unwanted", "reason": _REGRET, "by": "the demo"}
            await self._send(self._names.control, regret)

    async def _watch(self) -> None:
        with Live(self._table, console=self._console, auto_refresh=False) as live:
            until = time.monotonic() + _WITHIN_S
            while time.monotonic() < until and not all(job.is_over for job in self._jobs.values()):
                await asyncio.sleep(0.1)
                if self._console.is_terminal:
                    live.update(self._table, refresh=True)
                self._keep_best()
            if not self._console.is_terminal:
                live.transient = True

    def _keep_best(self) -> None:
        """For the picture: the moment with the most to see."""
        last = [job.told[-1] for job in self._jobs.values() if job.told]
        seen = sum(told["status"] == "RUNNING" and 0 < told["progress"] < 100 for told in last)
        if seen >= self._picture[0]:
            kept = JobTable("jef_daemon at work", rows=40)
            for told in last:
                kept.put(told | {"message": told["message"].replace(str(ROOT), "~/jef_daemon")})
            self._picture = (seen, kept)

    def picture(self, file: Path) -> None:
        """Draw the table as it was at its best moment."""
        console = Console(record=True, width=118, file=Path(os.devnull).open("w"))  # noqa: SIM115
        console.print(self._picture[1])
        # The fonts that rich would load from elsewhere are left out: any monospaced one does.
        drawn = re.sub(r"@font-face \{.*?\}\s*", "", console.export_svg(title="make demo"), flags=re.DOTALL)
        file.write_text(drawn)

    def _problems(self) -> Iterator[str]:
        for job in self._jobs.values():
            problem = job.problem()
            if problem:
                yield f"{job.execution_id} {problem}"
        if sorted(self.dead) != ["not-json", "unroutable"]:
            yield f"the dead letters are {self.dead}, not one that is no JSON and one that nobody serves"
        ends_of_list = max(
            self._jobs[f"{_TOUR}:guests.{number}:1"].told[-1]["timestamp"] for number in (0, 1)
        )
        if self._jobs[f"{_TOUR}:both:1"].told[0]["timestamp"] < ends_of_list:
            yield "a stage began before what it needs had ended"
        starts = [told for told in self._jobs["twice"].told if told["status"] == "RUNNING"]
        if len({told["attempt"] for told in starts}) != 1:
            yield "the job that was sent twice ran twice"
        first, second = self._jobs["cut-1"].told, self._jobs["cut-2"].told
        if "WAITING_FOR_LOCK" not in {told["status"] for told in (*first, *second)}:
            yield "of two jobs with one lock, neither waited"
        begins = [
            next((each["timestamp"] for each in told if each["status"] == "RUNNING"), "")
            for told in (first, second)
        ]
        ends = [told[-1]["timestamp"] for told in (first, second)]
        if max(begins) < min(ends):
            yield "two jobs with one lock ran at the same time"
        if not any(0 < told["progress"] < 100 for told in self._jobs["checksum-library"].told):
            yield "the large checksum told no progress"
        copied = filecmp.cmpfiles(LIBRARY, FILES / "library", ["types.py", "orm/session.py"], shallow=False)
        if copied[1] or copied[2]:
            yield f"the copy differs: {copied[1] + copied[2]}"

    def summary(self, problems: list[str], took_s: float) -> None:
        """Say what came of it, and what to try next."""
        table = Table(title="what happened", title_style="bold", expand=True)
        table.add_column("job", no_wrap=True, min_width=18)
        table.add_column("shows", no_wrap=True, overflow="ellipsis", max_width=30)
        table.add_column("status", no_wrap=True, min_width=9)
        table.add_column("in the end", no_wrap=True, overflow="ellipsis", ratio=1)
        for job in self._jobs.values():
            status = job.told[-1]["status"] if job.told else "-"
            mark = "[red]✗[/] " if job.problem() else "[green]✓[/] "
            table.add_row(mark + job.execution_id, job.why, styled(status), escape(job.words))
        self._console.print(table)
        self._console.print(f"dead letters, kept for their sender: {', '.join(sorted(self.dead))}")
        for problem in problems:
            self._console.print(f"[bold red]otherwise than said:[/] {problem}")
        if not problems:
            self._console.print(
                f"[bold green]all as it should be[/], {took_s:.0f} s of work\n{_NEXT}", highlight=False
            )


_NEXT = """
What to try next
  make run                         leave a daemon running, to play with
  less examples/word_count.py      an executor: copy it, change it, name it in .jef/jef.toml
  less .jef/demo/daemon.log        what the daemon logged just now
  .venv/bin/jef workflows draw tour --folder .jef/demo/data/workflows
  less config/workflows/ingest.yaml    a workflow for real films, with ffmpeg
  make test                        see that all of it holds
"""


async def show(playground: Playground, names: Names, console: Console, picture: Path | None) -> int:
    """Run it all; returns the exit code."""
    console.print("[bold]==>[/] starting a private RabbitMQ and a daemon …")
    definitions = FOLDER / "data" / "workflows"
    definitions.mkdir(parents=True)
    (definitions / f"{_TOUR}.yaml").write_text(_WORKFLOW)
    if film.is_possible():
        shutil.copy(film.DEFINITION, definitions)
    else:
        console.print(
            "[bold]==>[/] there is no ffmpeg here: the demo goes without its film; install it to see that"
        )
    began = time.monotonic()
    pid, url = playground.start()
    console.print(
        f"[bold]==>[/] broker and daemon (process {pid}) are up after {time.monotonic() - began:.1f} s"
    )
    began = time.monotonic()
    demo = Demo(url, names, console)
    problems = await demo.run()
    demo.summary(problems, time.monotonic() - began)
    if picture:
        demo.picture(picture)
    return 1 if problems else 0


async def clean_up(url: str, names: Names, actions: set[str]) -> None:
    """Delete what the demo made on a broker that is not ours."""
    connection = await aio_pika.connect(url)
    async with connection:
        channel = await connection.channel()
        own = (names.dead_letters, names.unroutable, names.workflows, names.coordinator)
        for queue in (*own, *(names.job_queue(action) for action in actions)):
            await channel.queue_delete(queue)
        exchanges = (names.jobs, names.status, names.dead, names.unroutable, names.workflow_status)
        for exchange in (*exchanges, names.workflow_keeper):
            await channel.exchange_delete(exchange)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--picture", type=Path, help="draw the table into this SVG file")
    options = parser.parse_args()
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    foreign = os.environ.get(URL_VARIABLE)
    names = Names(f"demo-{os.getpid()}" if foreign else "jef")
    template = _CONFIGURATION.replace("PREFIX", names.prefix).replace("LIBRARY", json.dumps(str(LIBRARY)))
    if film.is_possible():
        template += film.configuration()
    playground = Playground(FOLDER, template)
    playground.remove()  # what an interrupted one left
    try:
        return asyncio.run(show(playground, names, console, options.picture))
    except (BrokerError, PlaygroundError) as error:
        console.print(f"make demo: {error}", style="red", markup=False)
        return 1
    except KeyboardInterrupt:
        console.print("interrupted; stopping what was started")
        return 130
    finally:
        playground.stop()
        if foreign:
            asyncio.run(clean_up(foreign, names, {job.action for job in jobs()}))


if __name__ == "__main__":
    sys.exit(main())
