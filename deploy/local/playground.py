#!/usr/bin/env python3
"""A daemon to play with, on a private broker: `make run` leaves it running, `make stop` ends both.

Everything is under `.jef/`: the broker, the daemon's data, its log, and `jef.toml`, which is written once
and then yours to change.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import broker_process as process
from broker import BrokerError, PrivateBroker

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".jef"
_READY_S = 60.0
_STOP_S = 60.0
"""More than the daemon gives its jobs at a shutdown (`shutdown.drain_s` and `shutdown.flush_s`)."""

_CONFIGURATION = """\
# The playground's configuration. Change what you like, then: make stop run
amqp_url_file = {url_file}
data_dir = {data}
python_path = [{examples}]

[logging]
format = "json"

# An executor of your own: a class in a file of examples/ (or of any folder in python_path).
[actions.thumbnail]
executor = "thumbnail:Thumbnail"

[actions.greet]
executor = "greet:greet"

[actions.word-count]
executor = "word_count:WordCount"

# A program as an action: no code, and never a shell.
[actions.nap]
command = ["sleep", "{{configuration.seconds}}"]

[actions.checksum]
roots = [{root}]

# Writes nowhere but into the daemon's own folder, {files}
[actions.copy]
roots = [{files}]
"""
_LEAD = """
A daemon runs (process {pid}) on a private RabbitMQ at {url}

Try, in this folder:

  export JEF_CONFIG=.jef/jef.toml
  .venv/bin/jef check                                          is everything as it should be?
  .venv/bin/jef actions                                        what it can do
  .venv/bin/jef submit greet name=you --wait                   a first job
  .venv/bin/jef submit checksum path="$PWD/docs" --wait        real work, with progress
  .venv/bin/jef submit nap seconds=20 && .venv/bin/jef list    a program, while it runs
  .venv/bin/jef watch                                          a live table, in a second terminal

  tail -f .jef/daemon.log        its log
  $EDITOR .jef/jef.toml          its configuration; then: make stop run
  make stop                      end the daemon and its broker; jobs and data stay
"""


class PlaygroundError(Exception):
    """The daemon does not come up; the text has the end of its log."""


class Playground:
    """The broker and one daemon.

    Args:
        folder: of all that is theirs.
        template: the daemon's configuration, written once.
    """

    def __init__(self, folder: Path = FOLDER, template: str = _CONFIGURATION) -> None:
        self._folder = folder
        self._template = template
        self._broker = PrivateBroker(folder / "broker")
        self._configuration = folder / "jef.toml"
        self._log = folder / "daemon.log"
        self._state_file = folder / "daemon.json"

    def start(self) -> tuple[int, str]:
        """Start what does not run yet; returns the daemon's process id and the broker's URL.

        Raises:
            BrokerError: there is no broker.
            PlaygroundError: the daemon does not start.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        url = self._broker.start()
        self._configure(url)
        pid, born = self._daemon()
        if not born:
            pid = self._start_daemon()
        return pid, url

    def stop(self) -> None:
        """Ask the daemon to end, wait for its jobs, then stop the broker."""
        pid, born = self._daemon()
        if born:
            os.kill(pid, signal.SIGTERM)
            if not process.wait_gone(pid, born, _STOP_S):
                # What it had begun, the next one settles: a daemon may be killed at any moment.
                process.kill_group(pid)
        self._state_file.unlink(missing_ok=True)
        self._broker.stop()

    def remove(self) -> None:
        """Stop both and drop what they kept."""
        self.stop()
        self._broker.remove()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _configure(self, url: str) -> None:
        """The URL anew each time, as the port may change; the rest only once."""
        url_file = self._folder / "amqp-url"
        url_file.touch(mode=0o600)
        url_file.write_text(url + "\n")
        if not self._configuration.exists():
            data = self._folder / "data"
            text = self._template.format(
                url_file=_quoted(url_file),
                data=_quoted(data),
                examples=_quoted(ROOT / "examples"),
                root=_quoted(ROOT),
                files=_quoted(data / "files"),
            )
            self._configuration.write_text(text)

    def _start_daemon(self) -> int:
        # Settings of the caller's for another daemon must not lead this one elsewhere.
        environment = {key: value for key, value in os.environ.items() if not key.startswith("JEF_")}
        with self._log.open("wb") as log:
            daemon = subprocess.Popen(
                [sys.executable, "-m", "jef_daemon", "run", "--config", str(self._configuration)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd=ROOT,
                env=environment,
            )
        self._state_file.write_text(json.dumps([daemon.pid, process.birth(daemon.pid)]))
        until = time.monotonic() + _READY_S
        while not self._is_ready():
            if daemon.poll() is not None or time.monotonic() > until:
                daemon.kill()
                tail = self._log.read_text(errors="replace")[-3000:].strip()
                raise PlaygroundError(f"the daemon does not start. The end of its log ({self._log}):\n{tail}")
            time.sleep(0.1)
        return daemon.pid

    def _is_ready(self) -> bool:
        return any(line.startswith('{"event": "ready"') for line in self._log.read_text().splitlines())

    def _daemon(self) -> tuple[int, str]:
        """Process id and birth of the daemon that runs; the birth is empty if none does."""
        try:
            pid, born = json.loads(self._state_file.read_text())
        except (OSError, ValueError):
            return 0, ""
        return (pid, born) if born and process.birth(pid) == born else (0, "")


def _quoted(path: Path) -> str:
    """As TOML writes it: JSON's strings are TOML's too."""
    return json.dumps(str(path), ensure_ascii=False)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=["start", "stop"])
    command = parser.parse_args().command
    playground = Playground()
    try:
        if command == "start":
            pid, url = playground.start()
            print(_LEAD.format(pid=pid, url=url), end="")
        else:
            playground.stop()
    except (BrokerError, PlaygroundError) as error:
        print(f"make run: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
