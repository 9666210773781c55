"""What Prometheus is told. One table names every metric; `docs/metrics.md` is generated from it.

Events are counted as the ledger commits them, so that what is counted has happened; what stands is read when it is
asked for. Labels are bounded: actions that this daemon knows, statuses, codes of ours; never an execution.
Imported only where the HTTP port is open.
"""

from __future__ import annotations

import asyncio
import platform
import time
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from jef_daemon import __version__
from jef_daemon.lifecycle import FINAL, Retried, Started, Transition, is_told
from jef_daemon.ports import Commit, Refusal

_OTHER = "other"
"""The label of actions that this daemon does not know: anybody can name one."""
_LAG_EVERY_S = 0.5

_JOB_S = (0.1, 0.5, 1, 5, 15, 60, 300, 900, 3600, 4 * 3600, 12 * 3600, 24 * 3600)
_SHORT_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5)
_COUNT = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)


@dataclass(frozen=True, slots=True)
class Definition:
    """One metric."""

    name: str
    kind: str
    """`counter`, `histogram`, `gauge`."""
    meaning: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    """Upper bounds, of histograms."""


DEFINITIONS: tuple[Definition, ...] = (
    Definition(
        "jef_jobs_received_total",
        "counter",
        "Valid requests, by what became of them at the door: new, known and finished (duplicates), taken-again, "
        "cancelled (before it came).",
        ("action", "outcome"),
    ),
    Definition(
        "jef_messages_refused_total",
        "counter",
        "Messages that became dead letters, by the reason in their header x-jef-reason.",
        ("reason",),
    ),
    Definition(
        "jef_jobs_finished_total",
        "counter",
        "Attempts that ended, by status; a failure that is retried counts too.",
        ("action", "status"),
    ),
    Definition("jef_jobs_retried_total", "counter", "New attempts, by policy or by command.", ("action",)),
    Definition(
        "jef_jobs_late_total", "counter", "Changes that came from an update after TIMED_OUT.", ("action",)
    ),
    Definition("jef_updates_total", "counter", "Updates of async jobs: accepted or refused.", ("outcome",)),
    Definition(
        "jef_job_wait_seconds",
        "histogram",
        "From QUEUED to RUNNING, the wait for locks and for a set time included.",
        ("action",),
        _JOB_S,
    ),
    Definition(
        "jef_job_duration_seconds",
        "histogram",
        "From RUNNING to the end of the attempt, by status.",
        ("action", "status"),
        _JOB_S,
    ),
    Definition(
        "jef_jobs",
        "gauge",
        "Jobs that are not over, by status: QUEUED, WAITING_FOR_LOCK, RUNNING, TIMED_OUT (still open).",
        ("action", "status"),
    ),
    Definition("jef_slots", "gauge", "Slots: jobs that can run here at the same time."),
    Definition("jef_slots_busy", "gauge", "Slots in use; async jobs whose work runs outside use none."),
    Definition("jef_locks_held", "gauge", "Locks that this lock service has granted, by mode.", ("mode",)),
    Definition("jef_lock_waiters", "gauge", "Requests that wait at this lock service."),
    Definition("jef_outbox_messages", "gauge", "Messages in the ledger that the broker has not confirmed."),
    Definition("jef_publishes_unconfirmed", "gauge", "Messages on their way to the broker, of those."),
    Definition("jef_broker_connected", "gauge", "1 while there is a connection to the broker."),
    Definition("jef_broker_reconnects_total", "counter", "Connections to the broker that were lost."),
    Definition(
        "jef_ledger_transaction_seconds",
        "histogram",
        "One transaction of the ledger, the sync to disk included.",
        (),
        _SHORT_S,
    ),
    Definition(
        "jef_ledger_transaction_operations", "histogram", "Operations that shared a transaction.", (), _COUNT
    ),
    Definition("jef_ledger_stalled", "gauge", "1 while the ledger takes no writes (disk full, locked)."),
    Definition(
        "jef_event_loop_lag_seconds",
        "histogram",
        "How much later than asked a timer of the event loop came; measured twice a second.",
        (),
        _SHORT_S,
    ),
    Definition(
        "jef_build_info",
        "gauge",
        "Always 1; says what runs, and the prefix that it serves.",
        ("version", "python", "prefix"),
    ),
)
"""Every metric of ours; those that begin with `process_` come from prometheus_client."""

Values = float | Mapping[tuple[str, ...], float]
"""A value, or one for each combination of labels."""
Read = Callable[[], Awaitable[Mapping[str, Values]]]
"""What stands, by metric."""


class Metrics:
    """Counts, measures, tells.

    Args:
        actions: those that may be labels.
        read: asked for what stands, at each scrape.
    """

    def __init__(self, actions: Collection[str], read: Read) -> None:
        self._actions = frozenset(actions)
        self._read = read
        self._standing: Mapping[str, Values] = {}
        self._scraping = asyncio.Lock()
        # They are a series beside each counter that nobody asks for. The library has no types here.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self._made: dict[str, Any] = {}
        for one in DEFINITIONS:
            if one.name in _COUNTED or one.kind == "histogram":
                self._made[one.name] = self._make(one)
        self.registry.register(_Standing(lambda: self._standing))
        ProcessCollector(registry=self.registry)
        self._children: dict[tuple[str, ...], Any] = {}

    def _make(self, one: Definition) -> Counter | Histogram:
        if one.kind == "histogram":
            return Histogram(one.name, one.meaning, one.labels, buckets=one.buckets, registry=self.registry)
        return Counter(one.name, one.meaning, one.labels, registry=self.registry)

    async def run(self) -> None:
        """Measure the event loop until cancelled."""
        lag = self._of("jef_event_loop_lag_seconds")
        while True:
            asked = time.monotonic()
            await asyncio.sleep(_LAG_EVERY_S)
            lag.observe(max(0.0, time.monotonic() - asked - _LAG_EVERY_S))

    async def exposition(self, accept: str = "") -> tuple[bytes, str]:
        """Everything, as Prometheus reads it, and the content type."""
        encode, kind = choose_encoder(accept)
        async with self._scraping:  # several who look at the same time do not make the ledger count as often
            self._standing = await self._read()
            return encode(self.registry), kind

    # --- what happens ------------------------------------------------------------------------------------

    def committed(self, commit: Commit) -> None:
        """Count what a transaction holds."""
        self._of("jef_ledger_transaction_seconds").observe(commit.seconds)
        self._of("jef_ledger_transaction_operations").observe(commit.operations)
        for message, word in commit.door:
            if isinstance(message, Refusal):
                self._of("jef_messages_refused_total", message.error.code).inc()
            else:
                action = self.label(message.execution.action)
                self._of("jef_jobs_received_total", action, word.value).inc()
        for move in commit.moves:
            self._moved(move)

    def _moved(self, move: Transition) -> None:
        execution = move.execution
        action, status = self.label(execution.action), execution.status
        if isinstance(move.event, Started) and execution.queued_at is not None:
            self._of("jef_job_wait_seconds", action).observe(max(0.0, move.at - execution.queued_at))
        elif isinstance(move.event, Retried):
            self._of("jef_jobs_retried_total", action).inc()
        elif status in FINAL and is_told(move.event):
            self._of("jef_jobs_finished_total", action, status.value).inc()
            if execution.started_at is not None and execution.finished_at is not None:
                took = max(0.0, execution.finished_at - execution.started_at)
                self._of("jef_job_duration_seconds", action, status.value).observe(took)
        if move.late:
            self._of("jef_jobs_late_total", action).inc()

    def know(self, actions: Collection[str]) -> None:
        """Have more actions as labels. Those that were known stay: their series go on."""
        self._actions |= frozenset(actions)

    def label(self, name: str) -> str:
        """An action's name as a label."""
        return name if name in self._actions else _OTHER

    def _of(self, name: str, *labels: str) -> Any:
        key = (name, *labels)
        child = self._children.get(key)
        if child is None:
            made = self._made[name]
            child = self._children[key] = made.labels(*labels) if labels else made
        return child


_COUNTED = frozenset(
    {
        "jef_jobs_received_total",
        "jef_messages_refused_total",
        "jef_jobs_finished_total",
        "jef_jobs_retried_total",
        "jef_jobs_late_total",
    }
)
"""Counters that are counted here; the others are counted where it happens, and read."""


def build(prefix: str) -> Mapping[tuple[str, ...], float]:
    """The value of `jef_build_info`."""
    return {(__version__, platform.python_version(), prefix): 1.0}


class _Standing(Collector):
    """Hands over what was read."""

    def __init__(self, standing: Callable[[], Mapping[str, Values]]) -> None:
        self._standing = standing

    def collect(self) -> Iterator[Metric]:
        values = self._standing()
        for one in DEFINITIONS:
            if one.name in _COUNTED or one.kind == "histogram":
                continue
            family = CounterMetricFamily if one.kind == "counter" else GaugeMetricFamily
            metric = family(one.name, one.meaning, labels=one.labels)
            found = values.get(one.name, {})
            for labels, value in found.items() if isinstance(found, Mapping) else [((), found)]:
                metric.add_metric(labels, value)
            yield metric
