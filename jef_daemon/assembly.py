"""The parts of a daemon and how they are wired: who is told by whom. `daemon` runs them and ends them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Coroutine, Mapping
from dataclasses import dataclass
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
from jef_daemon.run.isolation import ProcessPool
from jef_daemon.run.outside import Outside
from jef_daemon.run.worker import Worker
from jef_daemon.settings import Bus as BusSettings
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
    web: Web | None
    """The HTTP port; None: there is none."""
    tracing: Tracing | None
    """None: it is off."""

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
    """Make the parts and wire them."""
    names = Names(settings.prefix)
    actions = catalogue.known if "worker" in settings.roles else {}
    changes: set[asyncio.Task[None]] = set()

    def switch(action: str, wanted: bool) -> None:
        change = asyncio.create_task(bus.resume(action) if wanted else bus.pause(action))
        changes.add(change)
        change.add_done_callback(changes.discard)

    def follow(consequences: Consequences) -> None:
        _follow(consequences, worker, backlog, outside)

    def deliver(delivery: Delivery) -> None:
        receivers.get(delivery.source, intake.deliver)(delivery)

    pool = _pool(settings, actions, tracing)
    backlog = Backlog(settings.slots.backlog, actions, switch)
    bus = _bus(settings, ledger, catalogue, deliver)
    lock_client = _lock_client(
        settings,
        ledger,
        bus,
        lambda: worker.wake(),  # noqa: PLW0108 - the worker comes a line later
        lambda lost: worker.lock_lost(lost),  # noqa: PLW0108
    )
    worker = Worker(ledger, catalogue, pool, settings, backlog.left, lock_client, ledger.identity)
    outside = Outside(ledger, actions, pool, worker.input, follow)
    updates = Updates(ledger, bus, names, ledger.identity, settings.bus.max_body_bytes, follow)
    watcher = Watcher(ledger, bus, follow)
    notifier = Notifier(ledger, bus, None if tracing is None else tracing.spans.confirmed)
    lock_service = _lock_service(settings, ledger, bus, names)
    intake = Intake(
        ledger,
        bus,
        actions,
        settings.bus.max_body_bytes,
        worker.wake,
        backlog.arrived,
        None if tracing is None else tracing.spans.begin,
    )
    receivers = {
        LOCKS: lock_service.deliver,
        LOCK_REPLIES: lock_client.deliver,
        UPDATES: updates.updates.deliver,
        CONTROL: updates.commands.deliver,
        HANDED_ON: updates.handed_on.deliver,
        WATCHED: watcher.deliver,
    }
    coordinator = None
    if "workflows" in settings.roles:
        coordinator = _coordinator(settings, ledger, bus, names)
        receivers |= {WORKFLOWS: coordinator.requests.deliver, COORDINATOR: coordinator.events.deliver}
    web = None
    if settings.http_port:
        # Its libraries take time and memory: only for those who want it.
        from jef_daemon.http_port import Seen, Web

        seen = Seen(
            ledger=ledger,
            catalogue=catalogue,
            bus=bus,
            worker=worker,
            updates=updates,
            watcher=watcher,
            notifier=notifier,
            pool=pool,
        )
        web = Web(settings, seen)
    return Parts(
        pool=pool,
        backlog=backlog,
        bus=bus,
        intake=intake,
        worker=worker,
        notifier=notifier,
        lock_client=lock_client,
        lock_service=lock_service,
        updates=updates,
        outside=outside,
        watcher=watcher,
        coordinator=coordinator,
        web=web,
        tracing=tracing,
    )


def _follow(consequences: Consequences, worker: Worker, backlog: Backlog, outside: Outside) -> None:
    """What an update or a command means for what runs and waits here."""
    for stop in consequences.stops:
        worker.stop(stop)
    for action in consequences.queued:
        backlog.arrived(action, 1)
    for action in consequences.left:
        backlog.left(action, 1)
    if consequences.queued:
        worker.wake()
    if consequences.calls:
        outside.wake()


def _pool(settings: Settings, actions: Mapping[str, Action], tracing: Tracing | None) -> ProcessPool:
    slots, warm = settings.slots, warm_processes(settings, actions)
    return ProcessPool(
        slots.blocking_processes,
        warm,
        settings.jobs.kill_grace_s,
        settings.python_path,
        None if tracing is None else tracing.take,
    )


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


def _bus(settings: Settings, ledger: SqlLedger, catalogue: Catalogue, deliver: Any) -> RabbitBus:
    return RabbitBus(
        broker_url(settings),
        Names(settings.prefix),
        list(catalogue.all) if "worker" in settings.roles else [],
        bus_settings(settings),
        deliver,
        f"jef_daemon {__version__}",
        ledger.identity,
        watches_only=set(settings.roles) == {"watcher"},
        coordinates="workflows" in settings.roles,
    )


def _lock_client(
    settings: Settings,
    ledger: SqlLedger,
    bus: RabbitBus,
    on_granted: Callable[[], None],
    on_lost: Callable[[Lost], None],
) -> LockClient:
    names, locks = Names(settings.prefix), settings.locks
    times = LockTimes(locks.lease_s, locks.start_within_s, locks.wait_lease_s, locks.workflow_lease_s)
    replies = names.lock_replies(ledger.identity)
    return LockClient(ledger, bus, names.locks, replies, times, on_granted, on_lost)


def _lock_service(settings: Settings, ledger: SqlLedger, bus: RabbitBus, names: Names) -> LockService:
    locks = settings.locks
    return LockService(
        ledger,
        bus,
        names.lock_replies(""),
        max_body_bytes=settings.bus.max_body_bytes,
        takeover_grace_s=locks.takeover_grace_s,
        tell_places_every_s=locks.tell_places_every_s,
        tell_places_to=locks.tell_places_to,
    )


def _coordinator(settings: Settings, ledger: SqlLedger, bus: RabbitBus, names: Names) -> Coordinator:
    # Its libraries take time and memory: only for those who have the role.
    from jef_daemon.workflow.coordinator import Coordinator
    from jef_daemon.workflow.library import Library

    library = Library(settings.workflow_folder)
    return Coordinator(ledger, bus, names, library, settings.bus.max_body_bytes)
