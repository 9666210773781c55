"""A daemon as operators run it: a process of its own, configured by a file."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from jef_daemon.ledger import Reader
from tests.support.forked import Forked

ROOT = Path(__file__).resolve().parents[2]
_ACTIONS = """
[actions.quick]
executor = "tests.support.executors:Quick"
[actions.staged]
executor = "tests.support.executors:Staged"
[actions.slow]
executor = "tests.support.executors:Slow"
[actions.again]
executor = "tests.support.executors:Again"
[actions.blocking]
executor = "tests.support.executors:Blocking"
[actions.misbehave]
executor = "tests.support.executors:Misbehave"
[actions.broken]
executor = "tests.support.executors:Broken"
[actions.tidy]
executor = "tests.support.executors:Tidy"
[actions.tidy-blocking]
executor = "tests.support.executors:TidyBlocking"
[actions.stubborn]
executor = "tests.support.executors:Stubborn"
update_timeout_s = 3.0
timeout_grace_s = 0.0
[actions.stubborn.retry]
attempts = 2
first_s = 0.0
on_timeout = true
[actions.fixed]
executor = "tests.support.executors:Fixed"
[actions.farm]
executor = "tests.support.executors:Farm"
[actions.resumed]
executor = "tests.support.executors:Resumed"
[actions.polled]
executor = "tests.support.executors:Polled"
[actions.nap]
command = ["sleep", "{configuration.seconds}"]
"""


class DaemonProcess:
    """`jef run` with a folder of its own.

    Args:
        url: the broker's.
        prefix: of its names.
        folder: configuration, data, log.
    """

    def __init__(self, url: str, prefix: str, folder: Path) -> None:
        self.url = url
        self.prefix = prefix
        self.folder = folder
        self.configuration = folder / "jef.toml"
        self.log = folder / "log.jsonl"
        self.trace = folder / "trace"
        self.python = sys.executable
        self.cwd = ROOT
        self.arguments: tuple[str, ...] = ()
        """Of `jef run`, beside the configuration."""
        self.process: subprocess.Popen[bytes] | Forked | None = None
        folder.mkdir(parents=True, exist_ok=True)
        self.configure()

    def configure(self, more: str = "", **sections: dict[str, Any]) -> None:
        """Write the configuration: sections by name, and raw TOML."""
        base: dict[str, dict[str, Any]] = {
            "logging": {"format": "json", "level": "debug"},
            "jobs": {"progress_interval_s": 0.2, "kill_grace_s": 1.0},
            "shutdown": {"drain_s": 5.0, "flush_s": 5.0},
        }
        lines = [
            f'amqp_url = "{self.url}"',
            f'prefix = "{self.prefix}"',
            f'data_dir = "{self.folder / "data"}"',
            f'python_path = ["{ROOT}"]',
        ]
        for name in {**base, **sections}:
            lines.append(f"[{name}]")
            values = base.get(name, {}) | sections.get(name, {})
            lines += [f"{key} = {json.dumps(value)}" for key, value in values.items()]
        self.configuration.write_text("\n".join(lines) + "\n" + _ACTIONS + more)

    def start(self, *, ready: bool = True, **environment: str) -> None:
        """Start it, and wait until it consumes."""
        begin = self.log.stat().st_size if self.log.exists() else 0
        kept = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith("JEF_") or key.startswith("JEF_TEST")
        }
        kept |= {"JEF_TEST_TRACE": str(self.trace), "PYTHONUNBUFFERED": "1", **environment}
        arguments = ["run", "--config", str(self.configuration), *self.arguments]
        with self.log.open("ab") as log:
            if self._is_as_ever(environment):
                self.process = Forked(arguments, kept, log.fileno(), log.fileno())
            else:
                self.process = subprocess.Popen(
                    [self.python, "-m", "jef_daemon", *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    cwd=self.cwd,
                    env=kept,
                )
        if ready:
            self.wait_for("ready", begin)

    def wait_for(self, event: str, begin: int = 0, within_s: float = 60) -> dict[str, Any]:
        """Wait for a log event behind a position of the log."""
        until = time.monotonic() + within_s
        while time.monotonic() < until:
            for line in self.events(begin):
                if line.get("event") == event:
                    return line
            if self.process is not None and self.process.poll() is not None:
                break
            time.sleep(0.02)
        raise AssertionError(f"no {event!r} in the log:\n{self.log.read_text()[-4000:]}")

    def events(self, begin: int = 0) -> list[dict[str, Any]]:
        """The log, as far as it is JSON."""
        found = []
        for line in self.log.read_bytes()[begin:].splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
        return found

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)

    def kill(self) -> None:
        """Kill -9, and reap it."""
        if self.process is not None:
            self.signal(signal.SIGKILL)
            self.process.wait()

    def stop(self, within_s: float = 60) -> int:
        """SIGTERM; returns the exit code."""
        self.signal(signal.SIGTERM)
        return self.wait(within_s)

    def wait(self, within_s: float = 60) -> int:
        """Wait for its end; returns the exit code."""
        if self.process is None:
            raise AssertionError("it was not started")
        return self.process.wait(within_s)

    @property
    def ledger_url(self) -> str:
        """Its ledger."""
        return f"sqlite:///{self.folder / 'data' / 'ledger.db'}"

    def reader(self) -> Reader:
        """Look into its ledger."""
        return Reader(self.ledger_url)

    def starts(self) -> list[tuple[str, int]]:
        """(execution id, attempt) of everything that was really started, in order."""
        if not self.trace.exists():
            return []
        return [(line.split()[0], int(line.split()[1])) for line in self.trace.read_text().splitlines()]

    def jef(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run the command line with its configuration."""
        environment = {**os.environ, "COLUMNS": "160", **environment}
        whole = ["--config", str(self.configuration), *arguments]
        with TemporaryFile() as out, TemporaryFile() as err:
            process = Forked(whole, environment, out.fileno(), err.fileno())
            try:
                code = process.wait(60)
            finally:
                process.kill()
            out.seek(0)
            err.seek(0)
            return subprocess.CompletedProcess(whole, code, out.read().decode(), err.read().decode())

    def _is_as_ever(self, environment: Mapping[str, str]) -> bool:
        """Whether nothing has to be another one from its first instruction."""
        different = any(name.startswith(("LD_", "PYTHON")) for name in environment)
        return (self.python, self.cwd, different) == (sys.executable, ROOT, False)
