"""Wires the HTTP port to a daemon's parts: what it may see, what is read for it. Only where `http_port` is set."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jef_daemon.config import http_token
from jef_daemon.errors import NotFound
from jef_daemon.ledger import Reader, SqlLedger, Standing
from jef_daemon.metrics import Metrics, Values, build
from jef_daemon.notify import Notifier
from jef_daemon.rabbitmq import RabbitBus
from jef_daemon.run.catalogue import Catalogue
from jef_daemon.run.isolation import ProcessPool
from jef_daemon.run.worker import Worker
from jef_daemon.settings import Settings
from jef_daemon.traceparent import exemplar
from jef_daemon.updates import Updates
from jef_daemon.watch import BEHIND_S, Watcher
from jef_daemon.web.app import Doors, application
from jef_daemon.web.health import Ask, Word, ask_all
from jef_daemon.web.server import HttpPort


@dataclass(frozen=True, kw_only=True)
class Seen:
    """The parts of a daemon that the HTTP port sees."""

    ledger: SqlLedger
    """Read, and asked whether it works."""
    catalogue: Catalogue
    """Actions that may be labels."""
    bus: RabbitBus
    worker: Worker
    updates: Updates
    """Takes updates and commands."""
    watcher: Watcher
    notifier: Notifier
    pool: ProcessPool


class Web:
    """The HTTP port of a daemon.

    Args:
        settings: where it listens, who may do what.
        seen: what it shows.

    Raises:
        SettingsError: it cannot listen there, or the token cannot be read.
    """

    def __init__(self, settings: Settings, seen: Seen) -> None:
        self._settings, self._seen = settings, seen
        self._ledger, self._bus = seen.ledger, seen.bus
        self._reader: Reader | None = None
        self._stopping = False
        is_traced = settings.tracing.is_wanted
        self.metrics = Metrics(seen.catalogue.all, self._read, exemplar if is_traced else None)
        self._parts = self._askable()
        doors = Doors(
            updates=seen.updates,
            show=self._show,
            parts=self._parts,
            exposition=self.metrics.exposition,
            token=http_token(settings),
            max_body_bytes=settings.bus.max_body_bytes,
        )
        self._doors = doors
        self._port = HttpPort(application(doors), settings.http_host, settings.http_port)
        seen.ledger.on_commit(self.metrics.committed)
        seen.watcher.on_flagged = self.metrics.flagged
        seen.notifier.on_confirmed = self.metrics.confirmed

    async def run(self) -> None:
        """Serve and measure until cancelled."""
        async with asyncio.TaskGroup() as parts:
            parts.create_task(self._port.run(), name="http port")
            parts.create_task(self.metrics.run(), name="event loop lag")

    def changed(self, catalogue: Catalogue, max_body_bytes: int) -> None:
        """Count other actions, take longer or shorter messages."""
        self.metrics.know(catalogue.all)
        self._doors.max_body_bytes = max_body_bytes

    def stopping(self) -> None:
        """Say that it is not ready any more; everything else goes on being answered."""
        self._stopping = True

    async def finish(self) -> None:
        """Take no more requests, answer those under way."""
        await self._port.finish()

    # --- health ------------------------------------------------------------------------------------------

    def _askable(self) -> Mapping[str, Ask]:
        parts: dict[str, Callable[[], Awaitable[Word]]] = {
            "daemon": self._daemon_word,
            "broker": self._broker_word,
            "ledger": self._ledger_word,
        }
        if "locks" in self._settings.roles:
            parts["lock service"] = self._locks_word
        if "watcher" in self._settings.roles:
            parts["watcher"] = self._watcher_word
        return parts

    async def _daemon_word(self) -> Word:
        return Word(works=not self._stopping, word="stopping" if self._stopping else "working")

    async def _broker_word(self) -> Word:
        works = self._bus.connected.is_set()
        return Word(works=works, word="connected" if works else "not connected")

    async def _ledger_word(self) -> Word:
        if (stalled := self._ledger.stalled) is not None:
            return Word(works=False, word=str(stalled))
        await self._ledger.answers()
        return Word(works=True, word="takes writes")

    async def _locks_word(self) -> Word:
        if keeper := self._bus.locks_kept_by:
            return Word(works=True, word=f"at the daemon with the ledger {keeper}")
        works = self._bus.connected.is_set()
        return Word(works=works, word="serving" if works else "waiting for the broker")

    async def _watcher_word(self) -> Word:
        # One that stands still is as far behind as it has not looked; one that fell ends the daemon.
        behind_s = self._seen.watcher.lag_s
        works = behind_s < BEHIND_S
        word = f"watches {self._seen.watcher.watched} executions" if works else f"{behind_s:.0f} s behind"
        return Word(works=works, word=word)

    # --- what is read ------------------------------------------------------------------------------------

    async def _read(self) -> Mapping[str, Values]:
        standing, words = await asyncio.gather(self._ledger.standing(), ask_all(self._parts))
        found = self._ledger_values(standing) | self._job_values() | self._bus_values()
        if "watcher" in self._settings.roles:
            found["jef_watcher_watched"] = self._seen.watcher.watched
            found["jef_watcher_lag_seconds"] = self._seen.watcher.lag_s
        found["jef_part_works"] = {(name,): float(word.works) for name, word in words.items()}
        found["jef_build_info"] = build(self._settings.prefix)
        return found

    def _ledger_values(self, standing: Standing) -> dict[str, Values]:
        workflows = dict.fromkeys(("QUEUED", "WAITING_FOR_LOCK", "RUNNING"), 0)
        workflows.update(standing.workflows)
        if "workflows" not in self._settings.roles:
            workflows.clear()
        return {
            "jef_workflows": {(status,): count for status, count in workflows.items()},
            "jef_jobs": self._bounded(standing.jobs),
            "jef_locks_held": {
                ("SHARED",): 0,
                ("EXCLUSIVE",): 0,
                **{(mode,): count for mode, count in standing.locks_held.items()},
            },
            "jef_lock_waiters": standing.lock_waiters,
            "jef_outbox_messages": standing.outbox,
            "jef_outbox_age_seconds": standing.outbox_age_s,
            "jef_ledger_stalled": float(self._ledger.stalled is not None),
        }

    def _job_values(self) -> dict[str, Values]:
        worker, updates = self._seen.worker, self._seen.updates
        return {
            "jef_slots": self._settings.slots.total,
            "jef_slots_busy": worker.running,
            "jef_locks_lost_total": worker.locks_lost,
            "jef_fenced_writes_total": {("completion",): worker.fenced},
            "jef_updates_total": {("accepted",): updates.taken, ("refused",): updates.refused},
            "jef_updates_refused_total": {(why,): count for why, count in updates.unread.items()},
            "jef_pool_restarts_total": {(why,): count for why, count in self._seen.pool.restarts.items()},
        }

    def _bus_values(self) -> dict[str, Values]:
        return {
            "jef_publishes_unconfirmed": self._bus.unconfirmed,
            "jef_broker_connected": float(self._bus.connected.is_set()),
            "jef_broker_reconnects_total": self._bus.reconnects,
        }

    def _bounded(self, jobs: Mapping[tuple[str, str], int]) -> Mapping[tuple[str, ...], float]:
        found: dict[tuple[str, ...], float] = {}
        for (action, status), count in jobs.items():
            key = (self.metrics.label(action), status)
            found[key] = found.get(key, 0) + count
        return found

    async def _show(self, execution_id: str) -> dict[str, Any] | None:
        return await asyncio.to_thread(self._document, execution_id)

    def _document(self, execution_id: str) -> dict[str, Any] | None:
        if self._reader is None:
            self._reader = Reader(self._settings.ledger)
        try:
            return self._reader.document(execution_id)
        except NotFound:
            return None
