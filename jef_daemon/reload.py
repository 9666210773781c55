"""Reload: a running daemon takes another configuration, and loses no job over it.

All or nothing: the new configuration is read, its executors are looked at, its queues are declared; only when
nothing is wrong with any of it is it put in force, at once. What runs goes on with what it was started with. An
action that is gone is *retired*: nothing of it is taken in or started any more; what waits goes back to its queue on
the broker, for a daemon that serves it.

What cannot change while the daemon runs (`settings.NEEDS_RESTART`) keeps its value, and is named.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
from pydantic import BaseModel

from jef_daemon import logs
from jef_daemon.assembly import Parts, bus_settings, lock_limits, policies, warm_processes
from jef_daemon.errors import ExecutorNotLoaded, JefError
from jef_daemon.ledger import SqlLedger
from jef_daemon.run.catalogue import Catalogue, is_outdated
from jef_daemon.run.probe import examine
from jef_daemon.settings import NEEDS_RESTART, Settings
from jef_daemon.supervision import Supervision

log = structlog.get_logger()

_RETIRED_EVERY_S = 5.0
"""How long a job of an action that was taken out stays here, should one come up."""


@dataclass(frozen=True, slots=True)
class Change:
    """What a reload does."""

    settings: Settings
    """As they will be."""
    catalogue: Catalogue
    keys: list[str]
    """Settings that get another value."""
    added: list[str]
    """Actions that are served from now on."""
    removed: list[str]
    changed: list[str]
    """Actions whose executor, command, settings or policies are others."""
    restart: list[str]
    """What is asked for and needs a restart."""


async def prepare(settings: Settings, catalogue: Catalogue, wanted: Settings) -> Change:
    """Look at what is wanted; nothing changes.

    Args:
        settings: in force.
        catalogue: in force.
        wanted: as they were read anew.

    Raises:
        SettingsError: logs cannot be written as wanted.
        ExecutorNotLoaded: something is wrong with actions, in the words of `jef check`.
    """
    coming, restart = within_reach(settings, wanted)
    logs.check(coming.logging)
    found = await examine(coming)
    # What was not served before, for the same reason, is no news: the rest is not to wait for it.
    problems = [
        action.problem
        for name, action in found.all.items()
        if action.problem and (name not in catalogue.all or catalogue.all[name].problem != action.problem)
    ]
    if problems:
        raise ExecutorNotLoaded("\n".join(problems))
    both = found.served.keys() & catalogue.served.keys()
    restart += [
        f"the code of actions.{name} (it runs in the daemon's own process)"
        for name in sorted(both)
        if not found.served[name].is_blocking and is_outdated(found.served[name].spec)
    ]
    return Change(
        settings=coming,
        catalogue=found,
        keys=[key for key in _keys() if _value(settings, key) != _value(coming, key)],
        added=sorted(found.served.keys() - catalogue.served.keys()),
        removed=sorted(catalogue.served.keys() - found.served.keys()),
        changed=sorted(name for name in both if found.served[name] != catalogue.served[name]),
        restart=restart,
    )


def within_reach(settings: Settings, wanted: Settings) -> tuple[Settings, list[str]]:
    """What is wanted, as far as a running daemon can have it; and the keys that need a restart."""
    coming = wanted.model_copy(deep=True)
    restart = [key for key in NEEDS_RESTART if _value(settings, key) != _value(wanted, key)]
    for key in restart:
        section, _, name = key.rpartition(".")
        setattr(_value(coming, section) if section else coming, name, _value(settings, key))
    # Modules that were imported from a folder stay imported: it is not to be looked for elsewhere, neither.
    taken_out = [folder for folder in settings.python_path if folder not in wanted.python_path]
    coming.python_path = [*wanted.python_path, *taken_out]
    restart += [f"python_path (without {folder})" for folder in taken_out]
    return coming, restart


async def carry_out(
    change: Change, settings: Settings, catalogue: Catalogue, parts: Parts, ledger: SqlLedger
) -> None:
    """Put a change in force.

    Args:
        change: what.
        settings: in force; they become the new ones.
        catalogue: in force; it becomes the new one.
        parts: of the daemon.
        ledger: its.

    Raises:
        BrokerError: the broker refuses the queue of a new action. Nothing has changed then.
    """
    is_worker = "worker" in settings.roles
    # Before anything of it is taken in: from then on the backlog counts.
    queued = await ledger.queued() if change.added and ledger.stalled is None else {}
    await parts.bus.serve(list(change.catalogue.all) if is_worker else [], bus_settings(change.settings))
    # From here to the end nothing is waited for: nobody sees half of it.
    settings.become(change.settings)
    catalogue.become(change.catalogue)
    add_folders(settings.python_path)
    logs.configure(settings.logging)
    _limit(settings, parts, ledger)
    ledger.govern(policies(catalogue))
    if parts.web is not None:
        parts.web.changed(catalogue, settings.bus.max_body_bytes)
    if is_worker:
        parts.backlog.change(settings.slots.backlog, catalogue.served, queued)
        parts.outside.wake()
        parts.worker.wake()
    await renew_processes(settings, catalogue, parts)


def add_folders(folders: list[Path]) -> None:
    """Let this process find executors in these folders too."""
    sys.path[:0] = [str(folder) for folder in folders if str(folder) not in sys.path]
    importlib.invalidate_caches()


def _limit(settings: Settings, parts: Parts, ledger: SqlLedger) -> None:
    """Tell those that keep limits of their own."""
    for part in (parts.intake, parts.updates, parts.lock_service):
        part.max_body_bytes = settings.bus.max_body_bytes
    for name in ("takeover_grace_s", "tell_places_every_s", "tell_places_to"):
        setattr(parts.lock_service, name, getattr(settings.locks, name))
    ledger.limit(
        tracebacks=settings.jobs.tell_tracebacks,
        lost_locks_fail=settings.locks.on_lost == "cancel",
        lock_limits=lock_limits(settings),
        max_variables_bytes=settings.jobs.max_variables_bytes,
        remember_s=settings.jobs.remember_cancels_s,
    )


async def renew_processes(settings: Settings, catalogue: Catalogue, parts: Parts) -> None:
    """Blocking executors run as their files are now, whether or not a setting of theirs has changed."""
    slots = settings.slots
    await parts.pool.renew(
        slots.blocking_processes,
        warm_processes(settings, catalogue.served),
        settings.jobs.kill_grace_s,
        settings.python_path,
    )


# --- the role --------------------------------------------------------------------------------------------


class Reloads:
    """Reloads a daemon whenever it is asked to.

    Args:
        settings: in force.
        catalogue: in force.
        parts: of the daemon.
        ledger: its.
        asked: set when a reload is wanted.
        supervision: told of each, once the daemon is ready.
        ready: set from then on.
    """

    def __init__(
        self,
        settings: Settings,
        catalogue: Catalogue,
        parts: Parts,
        ledger: SqlLedger,
        asked: asyncio.Event,
        supervision: Supervision,
        ready: asyncio.Event,
    ) -> None:
        self._settings, self._catalogue, self._parts, self._ledger = settings, catalogue, parts, ledger
        self._asked, self._supervision, self._ready = asked, supervision, ready
        self._retired = asyncio.Event()
        """Set when actions were taken out, whose waiting jobs are to be handed back."""
        self.under_way = False
        self.refused = False
        """Whether the last one changed nothing, as something was wrong."""

    async def run(self, read_again: Callable[[], Settings]) -> None:
        """Reload until cancelled. Whatever is wrong with a new configuration, the daemon goes on.

        Args:
            read_again: reads the settings.
        """
        while True:
            await self._asked.wait()
            self._asked.clear()
            self.under_way = True
            # Before it is ready, READY would say too much, and nobody waits for a reload.
            if is_told := self._ready.is_set():
                self._supervision.reloading()
            self.refused = not await self._reload(read_again)
            self.under_way = False
            if is_told:
                self._supervision.ready()

    async def _reload(self, read_again: Callable[[], Settings]) -> bool:
        try:
            wanted = await asyncio.to_thread(read_again)
            change = await prepare(self._settings, self._catalogue, wanted)
            await carry_out(change, self._settings, self._catalogue, self._parts, self._ledger)
        except (JefError, OSError) as error:  # OSError: nothing could be started to look at executors
            log.error("reload_refused", problem=str(error), consequence="nothing has changed")
            return False
        log.info(
            "reloaded",
            keys=change.keys,
            actions_added=change.added,
            actions_removed=change.removed,
            actions_changed=change.changed,
        )
        if change.restart:
            stays = "they stay as they were until a restart"
            log.warning("needs_restart", keys=change.restart, consequence=stays)
        self._catalogue.tell()
        if change.removed:
            self._retired.set()
        return True

    async def hand_back_retired(self) -> None:
        """Give the waiting jobs of actions that were taken out to whoever serves them, until cancelled.

        Not once: a delivery that was on its way comes later, and a failure may be retried.
        """
        await self._retired.wait()
        while True:
            retired = self._catalogue.retired
            if retired and (executions := await self._ledger.hand_back(retired)):
                log.info("handed_back", executions=executions, actions=sorted(retired))
            for name in retired:
                self._parts.backlog.forget(name)
            self._retired.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_RETIRED_EVERY_S):
                    await self._retired.wait()


# --- keys ------------------------------------------------------------------------------------------------


def _keys(model: type[BaseModel] = Settings, above: str = "") -> Iterator[str]:
    """Every key but those of actions, dotted."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _keys(field.annotation, f"{above}{name}.")
        elif name != "actions":
            yield f"{above}{name}"


def _value(settings: BaseModel, key: str) -> Any:
    return functools.reduce(getattr, key.split("."), settings)
