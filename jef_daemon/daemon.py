"""The composition root: picks the adapters, wires the stages, runs and ends them in good order.

bus ── deliveries ──> intake ──> ledger <── worker ──> executors
 ^                                 │
 └───────── notify <── outbox ─────┘
"""

from __future__ import annotations

import asyncio
import shutil
import signal
import sys
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import structlog

from jef_daemon import __version__
from jef_daemon.backlog import Backlog
from jef_daemon.config import broker_url
from jef_daemon.errors import JefError, SettingsError
from jef_daemon.intake import UNROUTABLE, Intake
from jef_daemon.ledger import SqlLedger
from jef_daemon.names import Names
from jef_daemon.notify import Notifier
from jef_daemon.rabbitmq import RabbitBus
from jef_daemon.run.catalogue import Catalogue
from jef_daemon.run.guardian import Guardian
from jef_daemon.run.isolation import ProcessPool
from jef_daemon.run.probe import examine
from jef_daemon.run.worker import Worker
from jef_daemon.settings import Settings

log = structlog.get_logger()
T = TypeVar("T")

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_HASTE_S = 1.0
"""Patience with everything after a second signal."""


class Daemon:
    """One daemon: opens its ledger, serves its actions, until asked to stop.

    Args:
        settings: everything.

    Raises:
        JefError: from `run`, with a sentence and an exit code, where it cannot work.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._names = Names(settings.prefix)
        self._stop_asked = asyncio.Event()
        self._haste_asked = asyncio.Event()
        self.ready = asyncio.Event()
        """Set once requests are consumed."""

    def stop(self) -> None:
        """Ask it to stop; asked again, it makes haste."""
        if self._stop_asked.is_set():
            self._haste_asked.set()
        self._stop_asked.set()

    async def run(self) -> None:
        """Work until asked to stop."""
        make_folders(self._settings)
        sys.path[:0] = [str(path) for path in self._settings.python_path if str(path) not in sys.path]
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self.stop)
        ledger = SqlLedger(self._settings.ledger, self._names, tracebacks=self._settings.jobs.tell_tracebacks)
        guardian = Guardian(self._settings.ledger)
        async with ledger:
            await self._clear_remains(guardian)
            guardian.start()
            try:
                catalogue = await examine(self._settings)
                _tell_catalogue(catalogue)
                await self._recover(ledger, catalogue)
                await self._serve(ledger, catalogue)
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

    async def _serve(self, ledger: SqlLedger, catalogue: Catalogue) -> None:
        settings = self._settings
        actions = catalogue.served
        pool = ProcessPool(
            settings.slots.blocking_processes,
            settings.slots.warm_processes if any(action.is_blocking for action in actions.values()) else 0,
            settings.jobs.kill_grace_s,
            settings.python_path,
        )
        changes: set[asyncio.Task[None]] = set()

        def switch(action: str, wanted: bool) -> None:
            change = asyncio.create_task(bus.resume(action) if wanted else bus.pause(action))
            changes.add(change)
            change.add_done_callback(changes.discard)

        backlog = Backlog(settings.slots.backlog, actions, switch)
        worker = Worker(ledger, catalogue, pool, settings, backlog.left)
        bus_settings = settings.bus.model_copy(
            update={"prefetch": min(settings.bus.prefetch, settings.slots.backlog)}
        )
        bus = RabbitBus(
            broker_url(settings),
            self._names,
            list(catalogue.all),
            bus_settings,
            lambda delivery: intake.deliver(delivery),  # noqa: PLW0108 - intake comes a line later
            f"jef_daemon {__version__}",
        )
        intake = Intake(ledger, bus, actions, settings.bus.max_body_bytes, worker.wake, backlog.arrived)
        notifier = Notifier(ledger, bus)
        ledger.on_outbox(notifier.put)
        await pool.start()
        try:
            async with asyncio.TaskGroup() as roles:
                running = [
                    roles.create_task(role, name=name)
                    for name, role in (
                        ("bus", bus.run()),
                        ("intake", intake.run()),
                        ("worker", worker.run()),
                        ("notify", notifier.run()),
                        ("purge", self._purge(ledger)),
                    )
                ]
                await bus.resume(UNROUTABLE)
                backlog.open(await ledger.queued())
                if await self._unless_stopped(bus.connected.wait()):
                    log.info("ready", version=__version__, actions=sorted(actions), prefix=settings.prefix)
                    self.ready.set()
                await self._stop_asked.wait()
                log.info("stopping", running=worker.running)
                backlog.close()
                await self._end(bus, intake, worker, ledger, notifier)
                for task in running:
                    task.cancel()
        except* JefError as group:
            raise _first_of(group) from None
        finally:
            await pool.close()

    async def _end(
        self, bus: RabbitBus, intake: Intake, worker: Worker, ledger: SqlLedger, notifier: Notifier
    ) -> None:
        """Stop in the order of the flow: take nothing in, start nothing, let run, tell, let go."""
        shutdown = self._settings.shutdown
        worker.start_nothing_more()
        await self._within(bus.stop_consuming(), shutdown.flush_s)
        await self._within(intake.finish(), shutdown.flush_s)
        handed_back = await self._within(ledger.hand_back(), shutdown.flush_s) or 0
        await worker.drain(shutdown.drain_s, self._haste_asked)
        handed_back += await self._within(ledger.hand_back(), shutdown.flush_s) or 0
        if handed_back:
            log.info("handed_back", executions=handed_back)
        if not await self._within(notifier.flush(), shutdown.flush_s):
            log.warning("not_all_told", unconfirmed=notifier.depth, consequence="told after the next start")
        await self._within(bus.stop(), shutdown.flush_s)

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


def _tell_catalogue(catalogue: Catalogue) -> None:
    for action in catalogue.all.values():
        if action.problem:
            log.error(
                "action_not_served",
                action=action.name,
                problem=action.problem,
                consequence="its requests wait",
            )


def _first_of(group: BaseExceptionGroup[JefError]) -> JefError:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if not isinstance(error, JefError):
        raise TypeError("the group holds JefErrors only")
    return error


def run(settings: Settings) -> None:
    """Run a daemon in an event loop of its own, until SIGTERM or SIGINT."""
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(_run(settings))


async def _run(settings: Settings) -> None:
    await Daemon(settings).run()


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:  # Windows
        return None
    return uvloop.new_event_loop
