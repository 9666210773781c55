"""A store as the README asks for: it refuses whoever shows an older fencing number than it has seen.

One append-only file per resource, its last line the state; every write, accepted or not, is a line of it, so that
the file is also the record of who wrote when. Standard library only: run as a program, it is a job's command.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

_TAIL_BYTES = 4096
"""More than the longest line."""


class Line(NamedTuple):
    """A write: by whom, with which number, and what was seen up to now."""

    what: str
    """begin, middle or end"""
    holder: str
    """Who runs the owner: the same execution at two daemons is two."""
    owner: str
    attempt: int
    mode: str
    number: int
    at: float
    """Monotonic: the same clock for all processes of the machine."""
    accepted: bool
    newest: int
    """Highest number that was ever accepted."""
    newest_exclusive: int
    """Highest number of an EXCLUSIVE one."""

    @property
    def grant(self) -> tuple[str, str, int]:
        """Whose write it is."""
        return self.holder, self.owner, self.attempt


class Store:
    """The files.

    Args:
        folder: where they are.
    """

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)

    def write(
        self, resource: str, what: str, holder: str, owner: str, attempt: int, mode: str, number: int
    ) -> bool:
        """Write a line; returns whether the number was accepted."""
        descriptor = os.open(self._file(resource), os.O_RDWR | os.O_APPEND | os.O_CREAT)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            newest, newest_exclusive = _state(descriptor)
            # Readers go beside readers: only an EXCLUSIVE one makes the older ones stale, and they it.
            accepted = number >= (newest if mode == "EXCLUSIVE" else newest_exclusive)
            if accepted:
                newest = max(newest, number)
                newest_exclusive = number if mode == "EXCLUSIVE" else newest_exclusive
            now = time.monotonic()
            line = Line(what, holder, owner, attempt, mode, number, now, accepted, newest, newest_exclusive)
            os.write(descriptor, json.dumps(line).encode() + b"\n")
        finally:
            os.close(descriptor)
        return accepted

    def lines(self, resource: str) -> list[Line]:
        """Everything that was written, in the order in which it was."""
        file = self._file(resource)
        return [Line(*json.loads(line)) for line in file.read_text().splitlines()] if file.exists() else []

    def _file(self, resource: str) -> Path:
        return self._folder / resource.replace("/", "-")


def _state(descriptor: int) -> tuple[int, int]:
    size = os.lseek(descriptor, 0, os.SEEK_END)
    tail = os.pread(descriptor, _TAIL_BYTES, max(0, size - _TAIL_BYTES))
    if not tail:
        return 0, 0
    last = Line(*json.loads(tail.splitlines()[-1]))
    return last.newest, last.newest_exclusive


class Refused(Exception):
    """The store has seen a newer number."""


def hold(
    what: str, holder: str, owner: str, attempt: int, locks: dict[str, tuple[str, int]], folder: str
) -> None:
    """Write to all resources of a job.

    Args:
        what: begin, middle or end.
        holder: who runs it.
        owner: the execution.
        attempt: its number.
        locks: mode and fencing number by resource.
        folder: the store's.

    Raises:
        Refused: by one of them; the others have the line all the same.
    """
    store = Store(folder)
    refused = [
        resource
        for resource, (mode, number) in locks.items()
        if not store.write(resource, what, holder, owner, attempt, mode, number)
    ]
    if refused:
        raise Refused(f"{owner}#{attempt}: {refused} have seen newer numbers than {locks}")


def main(seconds: str, *modes: str) -> None:
    """A job: `store.py SECONDS RESOURCE=MODE ...`, the rest is in the environment."""
    numbers = json.loads(os.environ["JEF_FENCING_TOKENS"])
    locks = {resource: (mode, numbers[resource]) for resource, mode in (each.split("=") for each in modes)}
    job = os.environ["JEF_TEST_HOLDER"], os.environ["JEF_EXECUTION_ID"], int(os.environ["JEF_ATTEMPT"])
    folder = os.environ["JEF_TEST_STORE"]
    hold("begin", *job, locks, folder)
    time.sleep(float(seconds))
    hold("end", *job, locks, folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
