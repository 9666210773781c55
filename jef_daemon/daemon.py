"""The composition root: picks the adapters, wires the stages, runs and ends them in good order.

bus ── deliveries ──> intake ──> ledger <── worker ──> executors
 ^                                 │
 └───────── notify <── outbox ─────┘
"""

from __future__ import annotations

import asyncio
import gc
import os
import shutil
import signal
import time
from collections.abc import Callable, Coroutine, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import structlog

from jef_daemon import __version__
from jef_daemon.assembly import Parts, assemble, lock_limits, policies
from jef_daemon.errors import JefError, SettingsError
from jef_daemon.intake import UNROUTABLE
from jef_daemon.ledger import SqlLedger
from jef_daemon.names import Names
from jef_daemon.ports import LockTimes
from jef_daemon.rabbitmq import (
    CONTROL,
    COORDINATOR,
    HANDED_ON,
    LOCK_REPLIES,
    LOCKS,
    UPDATES,
    WATCHED,
    WORKFLOWS,
)
from jef_daemon.reload import Reloads, add_folders
from jef_daemon.run.catalogue import Catalogue
from jef_daemon.run.guardian import Guardian
from jef_daemon.run.probe import examine
from jef_daemon.settings import Settings
from jef_daemon.status import Status
from jef_daemon.supervision import Supervision
from jef_daemon.workflow.state import Bounds

if TYPE_CHECKING:
    from jef_daemon.tracing.daemon import Tracing

log = structlog.get_logger()
T = TypeVar("T")

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_HASTE_S = 1.0
"""Patience with everything after a second signal."""


class Daemon:
    """One daemon: opens its ledger, serves its actions, until asked to stop.

    Args:
        settings: everything.
        read_again: reads the settings anew, for a reload; None: they are what they are.

    Raises:
        JefError: from `run`, with a sentence and an exit code, where it cannot work.
    """

    def __init__(self, settings: Settings, read_again: Callable[[], Settings] | None = None) -> None:
        self._settings = settings
        self._read_again = read_again or (lambda: settings)
        self._supervision = Supervision()
        self._stop_asked = asyncio.Event()
        self._haste_asked = asyncio.Event()
        self._reload_asked = asyncio.Event()
        self._has_terminal = is_terminal()
        self.ready = asyncio.Event()
        """Set once requests are consumed."""

    def stop(self) -> None:
        """Ask it to stop; asked again, it makes haste."""
        if self._stop_asked.is_set():
            self._haste_asked.set()
        self._stop_asked.set()

    def reload(self) -> None:
        """Ask it to read its configuration again and to go on with that."""
        self._reload_asked.set()

    def _hung_up(self) -> None:
        """SIGHUP: reload; where the terminal we were started from is closed, stop."""
        if self._has_terminal and not is_terminal():
            leave_terminal()
            self.stop()
        else:
            self.reload()

    async def run(self) -> None:
        """Work until asked to stop."""
        make_folders(self._settings)
        add_folders(self._settings.python_path)
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self.stop)
        loop.add_signal_handler(signal.SIGHUP, self._hung_up)
        ledger = open_ledger(self._settings)
        guardian = Guardian(self._settings.ledger)
        async with ledger:
            await self._clear_remains(guardian)
            guardian.start()
            try:
                catalogue = await examine(self._settings)
                catalogue.tell()
                ledger.govern(policies(catalogue))
                tracing = start_tracing(self._settings, ledger)
                await self._serve(ledger, catalogue, tracing)
            finally:
                await asyncio.to_thread(guardian.stop)
        log.info("stopped")

    async def _clear_remains(self, guardian: Guardian) -> None:
        killed = await asyncio.to_thread(guardian.kill_remains)
        if killed:
            log.warning(
                "remains_killed", processes=killed, reason="they belonged to an earlier life of this daemon"
            )
        await asyncio.to_thread(shutil.rmtree, self._settings.scratch_dir, ignore_errors=True)

    async def _recover(self, ledger: SqlLedger, catalogue: Catalogue) -> None:
        def may_run_again(name: str) -> bool:
            action = catalogue.all.get(name)
            return action is not None and action.may_run_again

        interrupted = await ledger.interrupt(may_run_again, "the daemon died while it ran")
        if interrupted:
            log.warning("interrupted_jobs_settled", executions=interrupted)

    async def _serve(self, ledger: SqlLedger, catalogue: Catalogue, tracing: Tracing | None) -> None:
        parts = assemble(self._settings, ledger, catalogue, tracing)
        # Not before those that count and trace are there: what died with an earlier life concerns them too.
        await self._recover(ledger, catalogue)
        ledger.on_outbox(parts.notifier.put)
        await parts.pool.start()
        # Before anything is claimed or taken in, which is counted from then on.
        queued = await ledger.queued()
        reloads = Reloads(
            *(self._settings, catalogue, parts, ledger), self._reload_asked, self._supervision, self.ready
        )
        status = Status(parts, ledger, reloads, self.ready, self._haste_asked)
        hanging = {"ledger": status.ledger_answers, "bus": parts.bus.answers}
        try:
            async with asyncio.TaskGroup() as roles:
                running = [
                    roles.create_task(role, name=name)
                    for name, role in (
                        *parts.working(self._settings.roles),
                        ("purge", self._purge(ledger)),
                        ("supervision", self._supervision.run(status.line, hanging, status.is_steady)),
                        ("hand back", reloads.hand_back_retired()),
                    )
                ]
                await self._begin(parts, queued)
                reloading = roles.create_task(reloads.run(self._read_again), name="reload")
                await self._say_ready(parts, catalogue)
                await self._stop_asked.wait()
                reloading.cancel()
                await asyncio.wait({reloading})  # it must not let in again what is being closed
                status.stopping(self._settings.shutdown.drain_s)
                self._supervision.stopping(status.line())
                log.info("stopping", running=parts.worker.running)
                await self._end(parts, ledger, status)
                for task in running:
                    task.cancel()
        except* JefError as group:
            raise _first_of(group) from None
        except* Exception as group:
            # Said at once, whatever the rest of the way down takes; systemd starts the next one.
            log.critical("role_failed", exc_info=group)
            raise
        finally:
            # A role that failed leaves jobs that run: they are interrupted, before their processes' home goes.
            parts.worker.start_nothing_more()
            self._haste_asked.set()
            await parts.worker.drain(0.0, self._haste_asked)
            await parts.pool.close()

    async def _begin(self, parts: Parts, queued: Mapping[str, int]) -> None:
        """Let deliveries come."""
        roles = self._settings.roles
        if "locks" in roles:
            await parts.bus.resume(LOCKS)
        if "watcher" in roles:
            await parts.bus.resume(WATCHED)
        if "workflows" in roles:
            for source in (WORKFLOWS, COORDINATOR, LOCK_REPLIES):
                await parts.bus.resume(source)
        if "worker" in roles:
            await parts.bus.resume(UNROUTABLE)
            for source in (LOCK_REPLIES, UPDATES, CONTROL, HANDED_ON):
                await parts.bus.resume(source)
            parts.backlog.open(queued)

    async def _say_ready(self, parts: Parts, catalogue: Catalogue) -> None:
        """Once they do come."""
        roles = self._settings.roles
        if await self._unless_stopped(parts.bus.connected.wait()):
            actions = sorted(catalogue.served) if "worker" in roles else []
            log.info("ready", version=__version__, roles=roles, actions=actions, prefix=self._settings.prefix)
            self.ready.set()
            self._supervision.ready()
            # What a daemon is made of stays: to look through it for garbage takes 50 ms each time, for all that waits.
            gc.freeze()

    async def _end(self, parts: Parts, ledger: SqlLedger, status: Status) -> None:
        """Stop in the order of the flow: take nothing in, start nothing, let run, tell, let go."""
        shutdown = self._settings.shutdown
        parts.backlog.close()
        if parts.web is not None:
            parts.web.stopping()
        parts.worker.start_nothing_more()
        await self._within(parts.bus.stop_requests(), shutdown.flush_s)
        await self._within(parts.intake.finish(), shutdown.flush_s)
        handed_back = await self._within(ledger.hand_back(), shutdown.flush_s) or 0
        status.stopping(shutdown.drain_s)
        await parts.worker.drain(shutdown.drain_s, self._haste_asked)
        handed_back += await self._within(ledger.hand_back(), shutdown.flush_s) or 0
        if handed_back:
            log.info("handed_back", executions=handed_back)
        await self._within(parts.bus.stop_consuming(), shutdown.flush_s)
        if parts.web is not None:
            await self._within(parts.web.finish(), shutdown.flush_s)
        await self._within(parts.lock_service.finish(), shutdown.flush_s)
        await self._within(parts.updates.finish(), shutdown.flush_s)
        if parts.coordinator is not None:
            await self._within(parts.coordinator.finish(), shutdown.flush_s)
        if not await self._within(parts.notifier.flush(), shutdown.flush_s):
            log.warning(
                "not_all_told", unconfirmed=parts.notifier.depth, consequence="told after the next start"
            )
        await self._within(parts.bus.stop(), shutdown.flush_s)
        if parts.tracing is not None:
            # It keeps its time by itself, and says so where it was too short; haste cuts it short.
            await self._within(parts.tracing.export.finish(shutdown.flush_s), shutdown.flush_s + _HASTE_S)

    async def _within(self, step: Coroutine[Any, Any, T], patience_s: float) -> T | None:
        """Do a step of the shutdown, for a time; hasten it when asked. None: it did not come to its end."""
        task = asyncio.create_task(step)
        hasten = asyncio.create_task(self._haste_asked.wait())
        try:
            await asyncio.wait({task, hasten}, timeout=patience_s, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait({task}, timeout=_HASTE_S if self._haste_asked.is_set() else 0)
        finally:
            hasten.cancel()
            task.cancel()
        return task.result() if task.done() and not task.cancelled() else None

    async def _unless_stopped(self, step: Coroutine[Any, Any, object]) -> bool:
        """Wait for something, or for being asked to stop; returns whether it came."""
        task = asyncio.create_task(step)
        stop = asyncio.create_task(self._stop_asked.wait())
        await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
        came = task.done()
        for waiting in (task, stop):
            waiting.cancel()
        return came

    async def _purge(self, ledger: SqlLedger) -> None:
        retention = self._settings.retention
        while True:
            purged = await ledger.purge(time.time() - retention.finished_s, retention.step)
            if purged:
                log.info("purged", executions=purged)
            await asyncio.sleep(retention.interval_s)


def open_ledger(settings: Settings) -> SqlLedger:
    """The ledger of the settings, not opened yet."""
    locks = settings.locks
    return SqlLedger(
        settings.ledger,
        Names(settings.prefix),
        tracebacks=settings.jobs.tell_tracebacks,
        lock_times=LockTimes(locks.lease_s, locks.start_within_s, locks.wait_lease_s, locks.workflow_lease_s),
        lock_limits=lock_limits(settings),
        max_variables_bytes=settings.jobs.max_variables_bytes,
        remember_s=settings.jobs.remember_cancels_s,
        lost_locks_fail=locks.on_lost == "cancel",
        is_traced=settings.tracing.is_wanted,
        workflow_bounds=Bounds(settings.jobs.max_variables_bytes, settings.bus.max_body_bytes),
    )


def start_tracing(settings: Settings, ledger: SqlLedger) -> Tracing | None:
    """Have what is committed from now on traced; None: tracing is off.

    Raises:
        SettingsError: its packages are not installed.
    """
    if not settings.tracing.is_wanted:
        return None
    from jef_daemon.tracing.daemon import Tracing  # its libraries take time and memory

    tracing = Tracing(settings, ledger.identity)
    tracing.export.install()
    ledger.on_commit(tracing.spans.committed)
    return tracing


def is_terminal() -> bool:
    """Whether somebody sits at a terminal that is still open."""
    # Asked of the kernel: one that was hung up says no.
    return os.isatty(2)


def leave_terminal() -> None:
    """Log to nowhere: on a terminal that was hung up each line would be an error."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)


def make_folders(settings: Settings) -> None:
    """Make the daemon's own folders.

    Raises:
        SettingsError: one cannot be made.
    """
    for folder in (settings.data_dir, settings.default_root):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SettingsError(
                f"the daemon's folder {folder} cannot be made ({error.strerror}); "
                "set data_dir, or JEF_DATA_DIR, to one that it may write"
            ) from None


def _first_of(group: BaseExceptionGroup[JefError]) -> JefError:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if not isinstance(error, JefError):
        raise TypeError("the group holds JefErrors only")
    return error


def run(settings: Settings, read_again: Callable[[], Settings] | None = None) -> None:
    """Run a daemon in an event loop of its own, until SIGTERM or SIGINT; SIGHUP reloads."""
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(_run(settings, read_again))


async def _run(settings: Settings, read_again: Callable[[], Settings] | None) -> None:
    await Daemon(settings, read_again).run()


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:  # Windows
        return None
    return uvloop.new_event_loop
