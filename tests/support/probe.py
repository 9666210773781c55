"""Run as a job by the packaged daemon: does what executors do, and tries what the unit should refuse. Plain Python."""

from __future__ import annotations

import ctypes
import mmap
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path


def run_made_code() -> None:
    """As compilers at run time do: memory that is written, then run."""
    memory = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    memory.write(b"\xc3")  # ret
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if os.uname().machine == "x86_64":
        ctypes.CFUNCTYPE(None)(address)()


def listen_and_connect() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
        pass


def ask_for_addresses() -> None:
    socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0).close()


def be_nice() -> None:
    subprocess.run(["nice", "-n", "5", "ionice", "-c", "3", "true"], check=True)
    os.sched_setaffinity(0, os.sched_getaffinity(0))


def share_work() -> None:
    with multiprocessing.Pool(2) as pool:
        if sum(pool.map(abs, [-1, -2])) != 3:
            raise OSError("the pool is wrong")


def write(folder: str) -> Callable[[], None]:
    def attempt() -> None:
        with tempfile.NamedTemporaryFile(dir=folder):
            pass

    return attempt


def look(path: str) -> Callable[[], object]:
    return lambda: next(Path(path).iterdir())


ALLOWED: dict[str, Callable[[], object]] = {
    "a pipeline of a shell": lambda: subprocess.run("true | cat", shell=True, check=True),
    "a pool of processes": share_work,
    "code that was just made": run_made_code,
    "sockets": listen_and_connect,
    "the machine's addresses": ask_for_addresses,
    "nice, ionice, taskset": be_nice,
    "a file in its folder": write("/var/lib/jef-daemon/files"),
    "a temporary file": write("/tmp"),
    "how many processors there are": lambda: Path("/proc/cpuinfo").read_text(),
}
REFUSED: dict[str, Callable[[], object]] = {
    "a file in /usr": write("/usr/lib"),
    "a file where everybody may write": write("/opt/open"),
    "a file in /etc": write("/etc/jef-daemon"),
    "the broker's password": lambda: Path("/etc/jef-daemon/amqp-url").read_text(),
    "people's files": look("/home"),
    "root's files": look("/root"),
    "the first process": lambda: Path("/proc/1/cmdline").read_text(),
    "another host name": lambda: socket.sethostname("x"),
    "a namespace": lambda: subprocess.run(
        ["unshare", "--user", "true"], check=True, stderr=subprocess.DEVNULL
    ),
    "a raw socket": lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1),
    "a packet socket": lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW),
    "a set-uid program": lambda: Path(tempfile.mkstemp()[1]).chmod(0o4755),
}


def works(attempt: Callable[[], object]) -> bool:
    try:
        attempt()
    except (OSError, StopIteration, subprocess.CalledProcessError) as error:
        print(repr(error), file=sys.stderr)
        return False
    return True


if __name__ == "__main__":
    wrong = [f"refused: {what}" for what, attempt in ALLOWED.items() if not works(attempt)]
    wrong += [f"allowed: {what}" for what, attempt in REFUSED.items() if works(attempt)]
    sys.exit("; ".join(wrong) or 0)
