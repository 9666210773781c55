"""`python -m jef_daemon` without the time that each would spend importing: forked from one that has imported it all.

From there it goes on as Python itself runs a module. A forked one is a process like any: its own id, signals, streams,
environment, end. What it is not is a proof that the program starts from nothing; `tests/acceptance` has those (the
demo, the README, the wheel, the packages).

    python -m tests.support.forked FD     the process to fork from, for who holds the other end of this socket
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
_IMPORTED = (
    "jef_daemon.cli",
    "jef_daemon.daemon",
    "jef_daemon.rabbitmq.client",
    "jef_daemon.workflow.coordinator",
    "jef_daemon.workflow.library",
    "rich.console",
    "rich.table",
    "typer.rich_utils",
    "uvloop",
)
"""What a daemon and most commands import anyway."""
_NUMBER = struct.Struct("q")
_MESSAGE_BYTES = 128 * 1024


class Forked:
    """One that runs; of `subprocess.Popen`'s methods, those that tests need.

    Args:
        arguments: of `jef`.
        environment: all of it.
        stdout: where it writes; a descriptor.
        stderr: likewise.
    """

    def __init__(
        self, arguments: Sequence[str], environment: Mapping[str, str], stdout: int, stderr: int
    ) -> None:
        self.returncode: int | None = None
        self._told, its = os.pipe()
        request = json.dumps([list(arguments), dict(environment)]).encode()
        with Path(os.devnull).open("rb") as nothing:
            socket.send_fds(_server(), [request], [nothing.fileno(), stdout, stderr, its])
        os.close(its)
        self.pid = _number(self._told)

    def poll(self) -> int | None:
        """How it ended; None: it runs."""
        return self._look(0)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end.

        Raises:
            subprocess.TimeoutExpired: it does not come.
        """
        until = None if timeout is None else time.monotonic() + timeout
        while (code := self._look(None if until is None else max(0.0, until - time.monotonic()))) is None:
            if until is not None and time.monotonic() >= until:
                raise subprocess.TimeoutExpired(["jef"], timeout or 0)
        return code

    def send_signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        """SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def _look(self, within_s: float | None) -> int | None:
        if self.returncode is None and select.select([self._told], [], [], within_s)[0]:
            self.returncode = os.waitstatus_to_exitcode(_number(self._told))
            os.close(self._told)
        return self.returncode


def _number(descriptor: int) -> int:
    data = os.read(descriptor, _NUMBER.size)
    if not data:
        raise AssertionError("the process that tests fork daemons from has died; see its standard error")
    return int(_NUMBER.unpack(data)[0])


_first = threading.Lock()


def _server() -> socket.socket:
    """The other end of ours; it ends with us."""
    # Of two threads that come first at once each would start one, and one of them would end under its children.
    with _first:
        return _start_server()


@functools.cache
def _start_server() -> socket.socket:
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with its:
        subprocess.Popen(
            [sys.executable, "-m", __name__, str(its.fileno())],
            stdin=subprocess.DEVNULL,
            pass_fds=[its.fileno()],
            cwd=_ROOT,
            start_new_session=True,
        )
    return ours


# --- in the process that is forked ---------------------------------------------------------------------------


def main() -> None:
    """Fork for whoever asks, tell how each ends; in each, be `python -m jef_daemon`."""
    control = socket.socket(fileno=int(sys.argv[1]))
    os.set_inheritable(control.fileno(), False)
    for name in _IMPORTED:
        importlib.import_module(name)
    gc.freeze()
    arguments = _serve(control)
    if arguments is not None:
        sys.argv = ["jef", *arguments]
        runpy.run_module("jef_daemon", run_name="__main__", alter_sys=True)


def _serve(control: socket.socket) -> list[str] | None:
    """Returns in each child, with its arguments, and at the end, with None."""
    ended, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    running: dict[int, int] = {}
    while True:
        ready, _, _ = select.select([control.fileno(), ended], [], [])
        if ended in ready:
            os.read(ended, 4096)
            _tell_ends(running)
        if control.fileno() not in ready:
            continue
        request, descriptors, _, _ = socket.recv_fds(control, _MESSAGE_BYTES, 4)
        if not request:
            return None
        *streams, told = descriptors
        pid = os.fork()
        if not pid:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for descriptor in (control.detach(), ended, wake, told, *running.values()):
                os.close(descriptor)
            return _settle_in(request, streams)
        for descriptor in streams:
            os.close(descriptor)
        os.write(told, _NUMBER.pack(pid))
        running[pid] = told


def _tell_ends(running: dict[int, int]) -> None:
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            with contextlib.suppress(BrokenPipeError), os.fdopen(running.pop(pid), "wb", buffering=0) as told:
                told.write(_NUMBER.pack(status))


def _settle_in(request: bytes, streams: list[int]) -> list[str]:
    """The streams and the environment are this process' own from here."""
    for number, descriptor in enumerate(streams):
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    arguments, environment = json.loads(request)
    os.environ.clear()
    os.environ.update(environment)
    time.tzset()
    return list(arguments)


if __name__ == "__main__":
    main()
