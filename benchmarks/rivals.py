"""What a user of locks might have chosen instead, each as one acquire + release: PostgreSQL, Redis.

Left out where it is absent.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_START_S = 30.0
_LEASE_S = 60


@contextlib.contextmanager
def rivals() -> Iterator[dict[str, Callable[[int], None]]]:
    """What there is on this machine, by name: a call takes a lock of that number and gives it back."""
    found: dict[str, Callable[[int], None]] = {}
    with contextlib.ExitStack() as stack:
        for name, start in (("PostgreSQL advisory lock", _postgres), ("Redis lock (redis-py)", _redis)):
            try:
                found[name] = stack.enter_context(start())
            except (ImportError, FileNotFoundError) as error:
                print(f"left out: {name} ({error})")
        yield found


@contextlib.contextmanager
def _postgres() -> Iterator[Callable[[int], None]]:
    import psycopg

    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not programs:
        raise FileNotFoundError("no PostgreSQL under /usr/lib/postgresql")
    port = _free_port()
    with _folder("postgres") as (folder, user):
        data = str(folder / "data")
        _run([programs[-1] / "initdb", "-D", data, "-A", "trust", "-U", "bench"], user)
        server = _start(
            [programs[-1] / "postgres", "-D", data, "-p", str(port), "-k", str(folder), "-h", "127.0.0.1"],
            user,
        )
        try:
            where = f"host=127.0.0.1 port={port} user=bench dbname=postgres"
            connection: Any = _when_up(
                lambda: psycopg.connect(where, autocommit=True), psycopg.OperationalError
            )

            def lock(number: int) -> None:
                connection.execute("SELECT pg_advisory_lock(%s)", (number,))
                connection.execute("SELECT pg_advisory_unlock(%s)", (number,))

            yield lock
            connection.close()
        finally:
            _end(server)


@contextlib.contextmanager
def _redis() -> Iterator[Callable[[int], None]]:
    import redis

    program = shutil.which("redis-server")
    if program is None:
        raise FileNotFoundError("no redis-server in the PATH")
    port = _free_port()
    with _folder(None) as (folder, _):
        # As careful as the others: on disk before it is answered.
        durable = ["--appendonly", "yes", "--appendfsync", "always", "--save", ""]
        server = _start(
            [program, "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder), *durable], None
        )
        try:
            client: Any = redis.Redis(port=port)
            _when_up(client.ping, redis.ConnectionError)

            def lock(number: int) -> None:
                with client.lock(f"asset/{number}", timeout=_LEASE_S):
                    pass

            yield lock
            client.close()
        finally:
            _end(server)


@contextlib.contextmanager
def _folder(user: str | None) -> Iterator[tuple[Path, str | None]]:
    """A folder for a server's data, and the user it runs as: PostgreSQL refuses to be root."""
    path = Path(tempfile.mkdtemp(prefix="jef-bench-rival-"))
    other = user if user and os.geteuid() == 0 else None
    try:
        if other:
            shutil.chown(path, other)
        yield path, other
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _run(command: list[Any], user: str | None) -> None:
    subprocess.run(command, user=user, check=True, stdout=subprocess.DEVNULL, cwd="/")


def _start(command: list[Any], user: str | None) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, user=user, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/")


def _end(server: subprocess.Popen[bytes]) -> None:
    server.terminate()
    server.wait()


def _when_up(attempt: Callable[[], Any], refused: type[Exception]) -> Any:
    until = time.monotonic() + _START_S
    while True:
        try:
            return attempt()
        except refused:
            if time.monotonic() > until:
                raise
            time.sleep(0.1)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
