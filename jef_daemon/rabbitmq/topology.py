"""Every exchange, queue and binding, as a table. Declaring it is `session`'s part."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from jef_daemon.names import Names

UNROUTABLE = "unroutable"
"""The source of deliveries whose action nobody knows."""

LOCKS = ":locks"
"""The source of requests to the lock service; no action can be called so."""
LOCK_REPLIES = ":lock-replies"
"""The source of the lock service's answers to this daemon's jobs."""

UPDATES = ":updates"
"""The source of async jobs' updates."""
CONTROL = ":control"
"""The source of commands."""
HANDED_ON = ":handed-on"
"""The source of what other daemons hand on to this one."""
WATCHED = ":watched"
"""The source of notifications of executions that may fall silent."""

WORKFLOWS = ":workflows"
"""The source of requests for workflows."""
COORDINATOR = ":coordinator"
"""The source of what the workflow coordinator must hear."""

_A_WEEK_MS = 7 * 86_400_000
_NEVER = 1_000_000
"""Delivery limit: RabbitMQ 4 would drop a request that was returned 20 times, 3.10 takes no "unlimited"."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """An exchange, durable."""

    name: str
    type: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    source: str | None = None
    """All that is published to this exchange comes here too."""


@dataclass(frozen=True, slots=True)
class Queue:
    """A queue, durable, with what it is bound to."""

    name: str
    arguments: Mapping[str, Any]
    exchange: str | None = None
    """Bound to this exchange; None: reached by the default exchange only."""
    routing_key: str = ""


@dataclass(frozen=True, slots=True)
class Topology:
    """What must exist before anything is consumed or published."""

    exchanges: tuple[Exchange, ...]
    queues: tuple[Queue, ...]

    @classmethod
    def of(
        cls,
        names: Names,
        actions: Iterable[str],
        queue_type: str,
        ledger: str | None = None,
        *,
        watches_only: bool = False,
        coordinates: bool = False,
    ) -> Self:
        """The topology for a prefix and the actions that a daemon serves.

        Args:
            names: of everything.
            actions: whose queues there must be.
            queue_type: quorum or classic.
            ledger: the daemon's, for the queue of its locks' answers; None: it runs no jobs.
            watches_only: it only hears statuses and tells some: its user needs no right to anything else.
            coordinates: it carries workflows out: what its queue hears, nobody else would take from there.
        """
        heard = (
            Exchange(names.status, "topic"),
            Exchange(names.watched, "headers", source=names.status),
        )
        if watches_only:
            return cls(exchanges=heard, queues=())
        kind = {"x-queue-type": queue_type}
        kept = kind | ({"x-delivery-limit": _NEVER} if queue_type == "quorum" else {})
        requests = kept | {"x-dead-letter-exchange": names.dead}
        # One lock service and one coordinator at a time, the next takes over when its connection goes.
        alone = kept | {"x-single-active-consumer": True}
        return cls(
            exchanges=(
                Exchange(names.dead, "fanout"),
                Exchange(names.unroutable, "fanout"),
                Exchange(names.jobs, "topic", {"alternate-exchange": names.unroutable}),
                Exchange(names.daemons, "fanout"),
                Exchange(names.workflows, "fanout"),
                Exchange(names.workflow_status, "topic"),
                *heard,
            ),
            queues=(
                Queue(names.dead_letters, kind, names.dead),
                Queue(names.unroutable, requests, names.unroutable),
                Queue(names.locks, alone),
                Queue(names.updates, kept),
                Queue(names.control, kept),
                Queue(names.workflows, alone, names.workflows),
                *((Queue(names.coordinator, alone, names.daemons),) if coordinates else ()),
                *(_own_queues(names, ledger, kept | {"x-expires": _A_WEEK_MS}) if ledger else ()),
                *(Queue(names.job_queue(action), requests, names.jobs, action) for action in actions),
            ),
        )


def trial(names: Names) -> str:
    """The exchange that `jef check` makes, publishes to and deletes."""
    return f"{names.prefix}.check"


def _own_queues(names: Names, ledger: str, arguments: Mapping[str, Any]) -> tuple[Queue, ...]:
    """One daemon's own. Of a daemon that never comes back, nothing stays."""
    return (
        Queue(names.lock_replies(ledger), arguments),
        Queue(names.daemon(ledger), arguments, names.daemons),
    )
