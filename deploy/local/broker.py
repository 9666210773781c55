#!/usr/bin/env python3
"""A RabbitMQ to work with, from the first of: JEF_AMQP_URL; an installed rabbitmq-server; Docker; apt.

An installed server is run as a private node: own data, log, ports, cookie and port mapper under one folder,
loopback only, as whatever user calls this, without systemd. Nothing of the system's is touched.

    broker.py start [--folder .jef/broker]    start it (again: says where it is), print its URL
    broker.py stop | kill | status | url      the rest
    broker.py remove                          stop it and drop its data
    broker.py install                         only make sure that there is a server to start

Standard library only: it runs before anything is installed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from broker_kinds import Container, Kind, Node, State
from broker_process import answers
from broker_source import PREFIX_VARIABLE, URL_VARIABLE, BrokerError, install, scripts

__all__ = ["PREFIX_VARIABLE", "URL_VARIABLE", "BrokerError", "PrivateBroker", "install"]

_START_S = 90.0
_ATTEMPTS = 3


class PrivateBroker:
    """A broker of our own in a folder.

    Starting it twice finds the one that runs, also from two processes at once. After `kill` or `stop`,
    `start` goes on with the same data on the same port. Where `JEF_AMQP_URL` is set, that broker is meant:
    it is neither started nor stopped.

    Args:
        folder: keeps data, log and state; made when needed.
    """

    def __init__(self, folder: Path | str) -> None:
        self._folder = Path(folder).resolve()
        self._state_file = self._folder / "state.json"
        self._kind: Kind | None = None
        self._state: State | None = None

    @property
    def url(self) -> str:
        """The AMQP URL.

        Raises:
            BrokerError: it was never started.
        """
        if external := os.environ.get(URL_VARIABLE):
            return external
        self._read()
        if self._state is None:
            raise BrokerError(f"no broker was started in {self._folder}")
        return f"amqp://guest:guest@127.0.0.1:{self._state.port}/"

    def is_running(self) -> bool:
        """Whether it runs and answers AMQP. One that is not ours is taken to run."""
        if os.environ.get(URL_VARIABLE):
            return True
        kind = self._read()
        # Its process too: on its port there may be somebody else's broker by now.
        return kind is not None and self._state is not None and kind.is_alive() and answers(self._state.port)

    def start(self) -> str:
        """Start it unless it runs; returns its URL once it answers.

        Raises:
            BrokerError: it does not come up; the text has the end of its log.
        """
        if external := os.environ.get(URL_VARIABLE):
            return external
        self._folder.mkdir(parents=True, exist_ok=True)
        with self._alone():
            if not self.is_running():
                self._start()
        return self.url

    def stop(self) -> None:
        """Stop it in good order, its port mapper too. Data stay."""
        self._end("stop")

    def remove(self) -> None:
        """Stop it and drop its data."""
        self._end("stop", "remove")
        if not os.environ.get(URL_VARIABLE):
            shutil.rmtree(self._folder, ignore_errors=True)

    def kill(self) -> None:
        """Kill -9 it, as a power failure would; for tests.

        Raises:
            BrokerError: it is not ours to kill.
        """
        if os.environ.get(URL_VARIABLE):
            raise BrokerError(f"the broker in {URL_VARIABLE} is not ours to kill")
        self._end("kill")

    def restart(self) -> str:
        """Stop and start again; returns the URL, the same."""
        self.stop()
        return self.start()

    def ctl(self, *arguments: str) -> str:
        """Run `rabbitmqctl`; returns what it prints.

        Raises:
            BrokerError: it failed, with what it said; or there is no broker of ours.
        """
        kind = None if os.environ.get(URL_VARIABLE) else self._read()
        if kind is None:
            raise BrokerError(
                f"rabbitmqctl works on a broker of our own only, and none was started in {self._folder}"
            )
        return kind.ctl(*arguments)

    def _start(self) -> None:
        """Start and wait. Two brokers may have chosen one port, so one that ends at once gets another try."""
        install()
        for attempt in range(1, _ATTEMPTS + 1):
            state, kind = self._prepare()
            # Before, too: whatever interrupts us now, the next caller knows where to look for remains.
            self._write()
            kind.start()
            self._write()
            why = _wait_until_it_answers(state, kind)
            if not why:
                return
            tail = kind.log_tail()
            kind.stop()
            if attempt == _ATTEMPTS or "eaddrinuse" not in tail.lower():
                raise BrokerError(f"RabbitMQ {why}. The end of its log ({self._folder}):\n{tail}")

    def _prepare(self) -> tuple[State, Kind]:
        """What was started before, or something new where there is none, or it was of the other kind."""
        wanted = "node" if scripts() else "container"
        kind = self._read()
        if self._state is None or kind is None or self._state.kind != wanted:
            self._state = State.new(wanted)
            kind = self._kind = self._kind_of(self._state)
        return self._state, kind

    def _end(self, *how: str) -> None:
        if os.environ.get(URL_VARIABLE) or not self._state_file.exists():
            return
        with self._alone():
            kind = self._read()
            for each in how if kind else ():
                getattr(kind, each)()

    def _read(self) -> Kind | None:
        """The state as it is now: another process may have started it anew."""
        try:
            found = State(**json.loads(self._state_file.read_text()))
        except (OSError, ValueError, TypeError):
            # None yet, or of another version of this file: then it is as if it had never been.
            self._state = self._kind = None
            return None
        if found != self._state:
            self._state, self._kind = found, self._kind_of(found)
        return self._kind

    def _write(self) -> None:
        """Whole or not at all: others read it without the lock."""
        if self._state is not None:
            new = self._state_file.with_suffix(".new")
            new.write_text(json.dumps(dataclasses.asdict(self._state)))
            new.replace(self._state_file)

    def _kind_of(self, state: State) -> Kind:
        return Node(self._folder, state) if state.kind == "node" else Container(state)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Two callers at once: the second waits and then finds the first one's broker."""
        with (self._folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _wait_until_it_answers(state: State, kind: Kind) -> str:
    """Empty once it answers, else what it did instead."""
    until = time.monotonic() + _START_S
    while not answers(state.port):
        if not kind.is_alive():
            return "ended instead of starting"
        if time.monotonic() > until:
            return f"does not answer on port {state.port} after {_START_S:g} s"
        time.sleep(0.1)
    return ""


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["install", "start", "stop", "remove", "kill", "status", "url"])
    parser.add_argument("--folder", type=Path, default=Path(".jef/broker"))
    options = parser.parse_args()
    broker = PrivateBroker(options.folder)
    try:
        if options.command == "install":
            print(install())
        elif options.command == "start":
            print(broker.start())
        elif options.command == "url":
            print(broker.url)
        elif options.command == "status":
            running = broker.is_running()
            print("running" if running else "stopped")
            return 0 if running else 3
        else:
            getattr(broker, options.command)()
    except BrokerError as error:
        print(f"broker: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
