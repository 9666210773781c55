"""The parts of a daemon and how they are wired: who is told by whom. `daemon` runs them and ends them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Coroutine, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from jef_daemon import __version__
from jef_daemon.backlog import Backlog
from jef_daemon.config import broker_url
from jef_daemon.intake import Intake
from jef_daemon.ledger import Policy, SqlLedger
from jef_daemon.lock.client import LockClient
from jef_daemon.lock.requests import Limits
from jef_daemon.lock.service import LockService
from jef_daemon.names import Names
from jef_daemon.notify import Notifier
from jef_daemon.ports import Consequences, Delivery, LockTimes, Lost
from jef_daemon.rabbitmq import (
    CONTROL,
    COORDINATOR,
    HANDED_ON,
    LOCK_REPLIES,
    LOCKS,
    UPDATES,
    WATCHED,
    WORKFLOWS,
    RabbitBus,
)
from jef_daemon.run.catalogue import Action, Catalogue
from jef_daemon.run.inputs import Inputs
from jef_daemon.run.isolation import ProcessPool
from jef_daemon.run.outside import Outside
from jef_daemon.run.worker import Worker
from jef_daemon.sections import Bus as BusSettings
from jef_daemon.settings import Settings
from jef_daemon.updates import Updates
from jef_daemon.watch import Watcher

if TYPE_CHECKING:
    from jef_daemon.http_port import Web
    from jef_daemon.tracing.daemon import Tracing
    from jef_daemon.workflow.coordinator import Coordinator


@dataclass(frozen=True)
class Parts:
    """What works in a daemon."""

    pool: ProcessPool
    backlog: Backlog
    bus: RabbitBus
    intake: Intake
    worker: Worker
    notifier: Notifier
    lock_client: LockClient
    lock_service: LockService
    updates: Updates
    outside: Outside
    watcher: Watcher
    coordinator: Coordinator | None
    """None: it has not this role."""
    tracing: Tracing | None
    """None: it is off."""
    web: Web | None = None
    """The HTTP port; None: there is none."""

    def working(self, roles: Collection[str]) -> list[tuple[str, Coroutine[Any, Any, None]]]:
        """What runs in these roles until it is cancelled, by name."""
        chosen = [("bus", self.bus.run), ("notify", self.notifier.run)]
        if "worker" in roles:
            chosen += [
                ("intake", self.intake.run),
                ("worker", self.worker.run),
                ("updates", self.updates.run),
            ]
            chosen.append(("outside", self.outside.run))
        if {"worker", "workflows"} & set(roles):
            chosen.append(("lock client", self.lock_client.run))
        if "locks" in roles:
            chosen.append(("lock service", self.lock_service.run))
        if "watcher" in roles:
            chosen.append(("watcher", self.watcher.run))
        if self.coordinator is not None:
            chosen.append(("workflows", self.coordinator.run))
        if self.web is not None:
            chosen.append(("web", self.web.run))
        return [(name, run()) for name, run in chosen]


def assemble(
    settings: Settings, ledger: SqlLedger, catalogue: Catalogue, tracing: Tracing | None = None
) -> Parts:
    """Make the parts: each is given those that it works with, and wires to those that come later."""
    site, wires = _Site(settings, ledger, catalogue, tracing), Wires()
    pool = _pool(site)
    backlog = Backlog(settings.slots.backlog, site.actions, wires.switch)
    bus = _bus(site, wires.deliver)
    lock_client = _lock_client(site, bus, wires)
    inputs = Inputs(ledger, settings, ledger.identity)
    worker = Worker(ledger, catalogue, pool, settings, inputs, backlog.left, lock_client)
    parts = Parts(
        pool=pool,
        backlog=backlog,
        bus=bus,
        intake=_intake(site, bus, worker, backlog),
        worker=worker,
        notifier=Notifier(ledger, bus, None if tracing is None else tracing.spans.confirmed),
        lock_client=lock_client,
        lock_service=_lock_service(site, bus),
        updates=_updates(site, bus, wires),
        outside=Outside(ledger, site.actions, pool, inputs.of, wires.follow),
        watcher=Watcher(ledger, bus, wires.follow),
        coordinator=_coordinator(site, bus) if "workflows" in settings.roles else None,
        tracing=tracing,
    )
    wires.connect(parts)
    return replace(parts, web=_web(site, parts)) if settings.http_port else parts


class Wires:
    """Who is told by whom: handed to parts while they are made, connected once all are there.

    Nothing goes over them before: what is told comes from tasks, and those are started behind.
    """

    def __init__(self) -> None:
        self._switching: set[asyncio.Task[None]] = set()

    def connect(self, parts: Parts) -> None:
        """Lead the wires to these parts."""
        self._bus, self._worker = parts.bus, parts.worker
        self._backlog, self._outside = parts.backlog, parts.outside
        self._requests = parts.intake.deliver
        self._receivers: dict[str, Callable[[Delivery], None]] = {
            LOCKS: parts.lock_service.deliver,
            LOCK_REPLIES: parts.lock_client.deliver,
            UPDATES: parts.updates.updates.deliver,
            CONTROL: parts.updates.commands.deliver,
            HANDED_ON: parts.updates.handed_on.deliver,
            WATCHED: parts.watcher.deliver,
        }
        if parts.coordinator is not None:
            self._receivers[WORKFLOWS] = parts.coordinator.requests.deliver
            self._receivers[COORDINATOR] = parts.coordinator.events.deliver

    def deliver(self, delivery: Delivery) -> None:
        """The bus has a delivery: it goes to whoever its source is for, and else is a request for a job."""
        self._receivers.get(delivery.source, self._requests)(delivery)

    def switch(self, action: str, wanted: bool) -> None:
        """The backlog has room for an action again, or none any more."""
        bus = self._bus
        change = asyncio.create_task(bus.resume(action) if wanted else bus.pause(action))
        self._switching.add(change)
        change.add_done_callback(self._switching.discard)

    def granted(self) -> None:
        """A job has got its locks."""
        self._worker.wake()

    def lock_lost(self, lost: Lost) -> None:
        """A running attempt has lost its locks."""
        self._worker.lock_lost(lost)

    def follow(self, consequences: Consequences) -> None:
        """An update, a command or a clock means something for what runs and waits here."""
        for stop in consequences.stops:
            self._worker.stop(stop)
        for action in consequences.queued:
            self._backlog.arrived(action, 1)
        for action in consequences.left:
            self._backlog.left(action, 1)
        if consequences.queued:
            self._worker.wake()
        if consequences.calls:
            self._outside.wake()


# --- what the settings mean for a part -------------------------------------------------------------------


def warm_processes(settings: Settings, actions: Mapping[str, Action]) -> int:
    """How many processes are started ahead."""
    return settings.slots.warm_processes if any(action.is_blocking for action in actions.values()) else 0


def bus_settings(settings: Settings) -> BusSettings:
    """Flow control: nothing is fetched ahead that is not to be taken in."""
    prefetch = min(settings.bus.prefetch, settings.slots.backlog)
    return settings.bus.model_copy(update={"prefetch": prefetch})


def lock_limits(settings: Settings) -> Limits:
    """What the lock service allows."""
    locks = settings.locks
    return Limits(
        locks_per_request=locks.max_per_request,
        name_length=locks.max_name_length,
        waiters_per_resource=locks.max_waiters,
        lease_max_s=locks.max_lease_s,
        patience_s=locks.patience_s,
    )


def policies(catalogue: Catalogue) -> dict[str, Policy]:
    """What the ledger is to know of each action; also of those whose last jobs are under way."""
    return {
        name: Policy(action.retry, action.cancellable, frozenset(action.hooks))
        for name, action in catalogue.known.items()
    }


# --- the parts, one by one -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Site:
    """What the parts are built on."""

    settings: Settings
    ledger: SqlLedger
    catalogue: Catalogue
    tracing: Tracing | None

    @property
    def names(self) -> Names:
        """Exchanges and queues."""
        return Names(self.settings.prefix)

    @property
    def actions(self) -> Mapping[str, Action]:
        """Those whose jobs run here."""
        return self.catalogue.known if "worker" in self.settings.roles else {}


def _pool(site: _Site) -> ProcessPool:
    settings = site.settings
    return ProcessPool(
        settings.slots.blocking_processes,
        warm_processes(settings, site.actions),
        settings.jobs.kill_grace_s,
        settings.python_path,
        None if site.tracing is None else site.tracing.take,
    )


def _bus(site: _Site, deliver: Callable[[Delivery], None]) -> RabbitBus:
    settings = site.settings
    return RabbitBus(
        broker_url(settings),
        site.names,
        list(site.catalogue.all) if "worker" in settings.roles else [],
        bus_settings(settings),
        deliver,
        f"jef_daemon {__version__}",
        site.ledger.identity,
        watches_only=set(settings.roles) == {"watcher"},
        coordinates="workflows" in settings.roles,
    )


def _intake(site: _Site, bus: RabbitBus, worker: Worker, backlog: Backlog) -> Intake:
    return Intake(
        site.ledger,
        bus,
        site.actions,
        site.settings.bus.max_body_bytes,
        worker.wake,
        backlog.arrived,
        None if site.tracing is None else site.tracing.spans.begin,
    )


def _lock_client(site: _Site, bus: RabbitBus, wires: Wires) -> LockClient:
    locks = site.settings.locks
    times = LockTimes(locks.lease_s, locks.start_within_s, locks.wait_lease_s, locks.workflow_lease_s)
    replies = site.names.lock_replies(site.ledger.identity)
    return LockClient(site.ledger, bus, site.names.locks, replies, times, wires.granted, wires.lock_lost)


def _lock_service(site: _Site, bus: RabbitBus) -> LockService:
    locks = site.settings.locks
    return LockService(
        site.ledger,
        bus,
        site.names.lock_replies(""),
        max_body_bytes=site.settings.bus.max_body_bytes,
        takeover_grace_s=locks.takeover_grace_s,
        tell_places_every_s=locks.tell_places_every_s,
        tell_places_to=locks.tell_places_to,
    )


def _updates(site: _Site, bus: RabbitBus, wires: Wires) -> Updates:
    identity, longest = site.ledger.identity, site.settings.bus.max_body_bytes
    return Updates(site.ledger, bus, site.names, identity, longest, wires.follow)


def _coordinator(site: _Site, bus: RabbitBus) -> Coordinator:
    # Its libraries take time and memory: only for those who have the role.
    from jef_daemon.workflow.coordinator import Coordinator
    from jef_daemon.workflow.library import Library

    library = Library(site.settings.workflow_folder)
    return Coordinator(site.ledger, bus, site.names, library, site.settings.bus.max_body_bytes)


def _web(site: _Site, parts: Parts) -> Web:
    # Its libraries take time and memory: only for those who want it.
    from jef_daemon.http_port import Seen, Web

    seen = Seen(
        ledger=site.ledger,
        catalogue=site.catalogue,
        bus=parts.bus,
        worker=parts.worker,
        updates=parts.updates,
        watcher=parts.watcher,
        notifier=parts.notifier,
        pool=parts.pool,
    )
    return Web(site.settings, seen)
