"""A warm pool of processes for executors that block or may crash: each can be killed, none hurts another.

Each seat is a standard `ProcessPoolExecutor` with one worker, so that a crash (segfault, `os._exit`, out of
memory) breaks only the pool of that one job, and nothing is shared that a killed process could leave
locked.

Progress comes back as datagrams over a Unix socket: no lock, no thread, and a killed sender harms nobody.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import FrameType
from typing import Any

import structlog

from jef_daemon.events import Event, Failed, Progressed
from jef_daemon.run.boundary import JobInput, perform_blocking
from jef_daemon.run.catalogue import ActionSpec, load
from jef_daemon.run.forking import context
from jef_daemon.sdk import CHECKPOINT_BYTES, Save

log = structlog.get_logger()

_DATAGRAM_BYTES = 2 * CHECKPOINT_BYTES + 4096
"""A checkpoint is JSON within JSON: each of its characters may take two."""
_REPORT_EVERY_S = 0.1
"""A worker sends at most so often; what it did not send comes back with the outcome."""

_SAVE_S = 30.0
"""So long a checkpoint waits for the daemon to take it."""

Report = Callable[[int | None, str | None], None]


_Answer = tuple[Progressed | None, Event | None, list[str]]
"""Of a call: progress and spans that were not sent, and what it means."""


class Crashed(Exception):
    """The process ended without an answer."""


class ProcessPool:
    """Runs blocking executors.

    Args:
        most: processes at the same time; more jobs than that are not to be given to it.
        warm: how many are started ahead.
        kill_grace_s: between SIGTERM and SIGKILL.
        python_path: folders where executors are looked for too.
        on_spans: takes the spans that executors make, as `tracing` writes them; None: there are none.
    """

    def __init__(
        self,
        most: int,
        warm: int,
        kill_grace_s: float,
        python_path: list[Path],
        on_spans: Callable[[Sequence[str]], None] | None = None,
    ) -> None:
        self._on_spans = on_spans
        self._most = most
        self._warm = min(warm, most)
        self._kill_grace_s = kill_grace_s
        self._python_path = [str(path) for path in python_path]
        self._context = context(is_traced=on_spans is not None)
        self._idle: list[_Seat] = []
        self._all: set[_Seat] = set()
        self._reports: dict[str, tuple[Report, Save | None]] = {}
        self._folder = Path(tempfile.mkdtemp(prefix="jef-"))
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.restarts: Counter[str] = Counter()
        """Processes that have to be replaced, by why: they `crashed` or were `stopped` in the middle of a job, or are
        `renewed`."""

    async def start(self) -> None:
        """Listen for progress and warm up."""
        self._socket.setblocking(False)
        self._socket.bind(str(self._folder / "progress"))
        asyncio.get_running_loop().add_reader(self._socket.fileno(), self._receive)
        for seat in await asyncio.gather(*(self._new_seat() for _ in range(self._warm))):
            self._idle.append(seat)

    async def renew(self, most: int, warm: int, kill_grace_s: float, python_path: list[Path]) -> None:
        """Have other limits, and new processes: executors are imported as they are now.

        Those that run a job do so to its end, and take no other.
        """
        self._most, self._warm, self._kill_grace_s = most, min(warm, most), kill_grace_s
        self._python_path = [str(path) for path in python_path]
        for seat in self._all:
            seat.is_stale = True
        self.restarts["renewed"] += len(self._all)
        idle, self._idle = self._idle, []
        for seat in idle:
            self._all.discard(seat)
            seat.kill()
        # One that cannot be started now is started, or fails, with the job that needs it.
        started = await asyncio.gather(*(self._new_seat() for _ in range(self._warm)), return_exceptions=True)
        for warm_one in started:
            if isinstance(warm_one, _Seat):
                self._return_seat(warm_one)

    async def perform(
        self, spec: ActionSpec, job: JobInput, report: Report, save: Save | None = None
    ) -> Event | None:
        """Call an executor in a process. Cancelling the caller stops the process: SIGTERM, grace, SIGKILL."""
        key = f"{job.execution_id}#{job.attempt}#{job.call}"
        seat = await self._take_seat()
        self._reports[key] = report, save
        try:
            last, outcome, spans = await seat.run(spec, job, key)
        except Crashed as crash:
            self.restarts["crashed"] += 1
            return Failed(actor="daemon", error_type="ExecutorCrashed", error_message=str(crash))
        except asyncio.CancelledError:
            self.restarts["stopped"] += 1
            await seat.stop(self._kill_grace_s)
            raise
        else:
            if last is not None:
                report(last.progress, last.message)
            if spans and self._on_spans is not None:
                self._on_spans(spans)
            return outcome
        finally:
            self._receive()  # what it sent before it ended may be there unread: a checkpoint must not be lost
            self._reports.pop(key, None)
            self._return_seat(seat)

    async def close(self) -> None:
        """Kill what still runs."""
        asyncio.get_running_loop().remove_reader(self._socket.fileno())
        self._socket.close()
        for seat in list(self._all):
            seat.kill()
        await asyncio.to_thread(shutil.rmtree, self._folder, ignore_errors=True)

    # --- seats -------------------------------------------------------------------------------------------

    async def _take_seat(self) -> _Seat:
        while self._idle:
            seat = self._idle.pop()
            if seat.is_alive:
                return seat
            self._all.discard(seat)
        return await self._new_seat()

    async def _new_seat(self) -> _Seat:
        seat = _Seat(self._context, str(self._folder / "progress"), self._python_path)
        self._all.add(seat)
        try:
            await seat.start()
        except BaseException:  # cancelled above all: whoever wanted it has gone, nobody else knows of it
            self._all.discard(seat)
            seat.kill()
            raise
        return seat

    def _return_seat(self, seat: _Seat) -> None:
        if seat.is_alive and not seat.is_stale and len(self._idle) < self._most:
            self._idle.append(seat)
        else:
            self._all.discard(seat)
            seat.kill()

    def _receive(self) -> None:
        for _ in range(1000):
            try:
                told = json.loads(self._socket.recv(_DATAGRAM_BYTES))
            except BlockingIOError:
                return
            except (OSError, ValueError):
                continue
            report, save = self._reports.get(told["key"], (None, None))
            if "span" in told:
                if self._on_spans is not None:
                    self._on_spans([told["span"]])
            elif report is not None and "checkpoint" not in told:
                report(told["percent"], told["message"])
            elif save is not None:
                save(told["checkpoint"])


class _Seat:
    """One process, one job at a time."""

    def __init__(self, context: Any, address: str, python_path: list[str]) -> None:
        self._pool = ProcessPoolExecutor(1, context, initializer=_settle_in, initargs=(address, python_path))
        self._pid = 0
        self._answer: asyncio.Future[Any] | None = None
        self.is_alive = True
        self.is_stale = False
        """Whether it holds code or settings of before a reload."""

    async def start(self) -> None:
        """Start the process; it is warm once this returns."""
        self._pid = await asyncio.wrap_future(self._pool.submit(os.getpid))

    async def run(self, spec: ActionSpec, job: JobInput, key: str) -> _Answer:
        """Have a job done.

        Raises:
            Crashed: the process ended without an answer; the seat is of no use any more.
        """
        try:
            self._answer = asyncio.wrap_future(self._pool.submit(_work, spec, job, key))
            # Shielded: a cancelled future would leave the process running and us without its end.
            answer: _Answer = await asyncio.shield(self._answer)
        except BrokenProcessPool:
            self.is_alive = False
            raise Crashed(
                "the executor's process ended without an answer (crash, os._exit or out of memory)"
            ) from None
        return answer

    async def stop(self, grace_s: float) -> None:
        """Ask the job to stop, then make it: the process and all that it started."""
        answer = self._answer
        self._signal(signal.SIGTERM)
        try:
            if answer is not None:
                await asyncio.wait({answer}, timeout=grace_s)
                if answer.done() and not answer.cancelled():
                    answer.exception()
        finally:  # cancelled once more: a seat that lives on would be given to the next job
            self.kill()

    def kill(self) -> None:
        """End the process and all that it started, at once."""
        self.is_alive = False
        self._signal(signal.SIGKILL)
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _signal(self, number: int) -> None:
        if self._pid:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._pid, number)


# --- in the process --------------------------------------------------------------------------------------

_out: socket.socket
_address: str
_working = False


class _Stop(BaseException):
    """SIGTERM while a job runs: its `finally` blocks get their chance."""


def _settle_in(address: str, python_path: list[str]) -> None:
    global _out, _address
    # A group of its own: killed together with whatever the job starts, untouched by a terminal's Ctrl-C.
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _on_term)
    sys.path[:0] = [path for path in python_path if path not in sys.path]
    _address = address
    _out = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    _out.setblocking(False)


def _on_term(number: int, frame: FrameType | None) -> None:
    if _working:
        raise _Stop
    os._exit(0)


def _work(spec: ActionSpec, job: JobInput, key: str) -> _Answer:
    global _working
    report = _Reporter(key)
    spans: Collection[str] = ()
    if job.is_traced:
        from jef_daemon.tracing.executor import hand_over  # its library: only where tracing is on

        spans = hand_over(report.span)
    _working = True
    try:
        outcome = perform_blocking(load(spec), job, report, report.save)
    finally:
        _working = False
    return report.unsent, outcome, list(spans)


class _Reporter:
    """Sends reports to the daemon; never blocks, never fails a job."""

    def __init__(self, key: str) -> None:
        self._key = key
        self._next_at = 0.0
        self.unsent: Progressed | None = None

    def __call__(self, percent: int | None, message: str | None) -> None:
        self.unsent = Progressed(progress=percent, message=message)
        now = time.monotonic()
        if now < self._next_at:
            return
        told = json.dumps({"key": self._key, "percent": percent, "message": message and message[:1000]})
        try:
            _out.sendto(told.encode(), _address)
        except OSError:
            return  # the daemon is slow or gone; the next report or the outcome tells it
        self.unsent = None
        self._next_at = now + _REPORT_EVERY_S

    def span(self, dumped: str) -> bool:
        """Send a span; False: the daemon does not take it now, or it is too long."""
        told = json.dumps({"key": self._key, "span": dumped}).encode()
        if len(told) > _DATAGRAM_BYTES:
            return False
        try:
            _out.sendto(told, socket.MSG_DONTWAIT, _address)
        except OSError:
            return False
        return True

    def save(self, checkpoint: str) -> None:
        """Send a checkpoint; unlike progress it waits for a slow daemon, and fails the job where there is none."""
        told = json.dumps({"key": self._key, "checkpoint": checkpoint}).encode()
        _out.settimeout(_SAVE_S)
        try:
            _out.sendto(told, _address)
        finally:
            _out.setblocking(False)
