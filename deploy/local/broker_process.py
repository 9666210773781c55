"""Processes and ports: what a private broker needs to know of its machine. Standard library only."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import time
from pathlib import Path

_PROC = Path("/proc")
_PORTS = range(20_000, 32_000)
"""Below the ports that systems give to outgoing connections (32768 on Linux, 49152 on macOS). A client that
tries again and again while the broker is down would now and then be given the broker's own port, connect to
itself, and keep the broker from coming back."""


def answers(port: int) -> bool:
    """Whether an AMQP broker greets on a port: listening is not enough."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=2) as connection:
            connection.sendall(b"AMQP\x00\x00\x09\x01")
            connection.settimeout(5)
            # The first byte of a method frame, connection.start; a refusal would begin with "A".
            return connection.recv(1) == b"\x01"
    except OSError:
        return False


def free_ports(count: int) -> list[int]:
    """Ports of the loopback interface that nobody listens on."""
    found: list[int] = []
    for port in random.sample(_PORTS, len(_PORTS)):
        if _is_free(port):
            found.append(port)
            if len(found) == count:
                return found
    raise OSError(f"no {count} free ports from {_PORTS.start} to {_PORTS.stop - 1}")


def is_free(port: int, within_s: float = 0) -> bool:
    """Whether one can listen on a port, or can before long."""
    until = time.monotonic() + within_s
    while not (free := _is_free(port)) and time.monotonic() < until:
        time.sleep(0.05)
    return free


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # As the broker does: connections of its last life in TIME_WAIT do not matter.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def birth(pid: int) -> str:
    """When a process began, in the system's words; empty if there is none, or only its zombie.

    With the id it names one process for ever: ids are used again.
    """
    if _PROC.is_dir():
        try:
            fields = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            return ""
        # A zombie with more than one thread still closes its sockets: the first thread ended before others.
        return "" if fields[0] in "ZX" and int(fields[17]) <= 1 else fields[19]
    command = ["ps", "-o", "stat=,lstart=", "-p", str(pid)]
    state, _, began = subprocess.run(command, capture_output=True, text=True, check=False).stdout.partition(
        " "
    )
    return "" if state.startswith("Z") else began.strip()


def wait_gone(pid: int, born: str, within_s: float) -> bool:
    """Wait for the end of a process; whether it came."""
    until = time.monotonic() + within_s
    while True:
        # Ours to reap if this very process started it.
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)
        if birth(pid) != born:
            return True
        if time.monotonic() > until:
            return False
        time.sleep(0.05)


def kill_group(pid: int) -> None:
    """Kill -9 a process and its group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def kill_all_at_home(home: Path, within_s: float = 5.0) -> None:
    """Kill -9 whatever has this folder as its HOME, and wait for its end; only Linux can tell."""
    until = time.monotonic() + within_s
    while (found := _at_home(home)) and time.monotonic() < until:
        for pid in found:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def _at_home(home: Path) -> list[int]:
    wanted = f"HOME={home}".encode()
    found = []
    for entry in _PROC.glob("[0-9]*"):
        # Processes of others cannot be read, and may end while we look; a zombie's environment is empty.
        with contextlib.suppress(OSError):
            if wanted in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found


def stop_port_mapper(port: int) -> None:
    """Ask Erlang's port mapper (epmd) to end: its own protocol, as its program may be on no path."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=2) as connection:
        connection.sendall(b"\x00\x01k")
        connection.recv(2)
