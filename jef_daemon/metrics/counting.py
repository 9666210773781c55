"""Counts and measures what happens, and tells it together with what is read at a scrape.

Events are counted as the ledger commits them, so that what is counted has happened; what stands, and what the parts
count for themselves, is read when it is asked for. Labels are bounded: actions that this daemon knows, statuses,
words of ours; never an execution.
"""

from __future__ import annotations

import asyncio
import platform
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Histogram, ProcessCollector, disable_created_metrics
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from jef_daemon import __version__
from jef_daemon.commits import Commit, Counted
from jef_daemon.events import Failed, FellSilent, Progressed, Retried, Started
from jef_daemon.lifecycle import FINAL, Execution, Transition, is_told
from jef_daemon.metrics.definitions import DEFINITIONS, Definition
from jef_daemon.ports import Accepted, Arrival, Refusal

_OTHER = "other"
"""The label of actions that this daemon does not know: anybody can name one."""
_LAG_EVERY_S = 0.5

Labels = tuple[str, ...]
Values = float | Mapping[Labels, float]
"""A value, or one for each combination of labels."""
Read = Callable[[], Awaitable[Mapping[str, Values]]]
"""What stands, by metric."""
Exemplar = Callable[[Execution], dict[str, str] | None]
"""What leads from a measurement to where it came from, such as the id of a trace; None: nothing does."""

_CLOCKS = {"QueueTimeout": "queue", "LockTimeout": "lock", "ExecutionTimeout": "execution"}
"""Whose time was over, by what the failure is called. An executor's own exception may be called so, too."""

_COUNTED = {
    Counted.NOTIFIED: "jef_notifications_total",
    Counted.UPDATE_REFUSED: "jef_updates_refused_total",
    Counted.FENCED: "jef_fenced_writes_total",
    Counted.LOCK_REQUEST: "jef_lock_requests_total",
    Counted.LEASE_EXPIRED: "jef_lock_leases_expired_total",
    Counted.MESSAGE_REFUSED: "jef_messages_refused_total",
    Counted.LOCKS_LOST: "jef_locks_lost_total",
}


class Metrics:
    """Counts, measures, tells.

    Args:
        actions: those that may be labels.
        read: asked for what stands, at each scrape.
        exemplar: what is told beside a measurement that belongs to an execution, where OpenMetrics is asked for.
    """

    def __init__(self, actions: Collection[str], read: Read, exemplar: Exemplar | None = None) -> None:
        self._actions = frozenset(actions)
        self._read = read
        self._exemplar = exemplar
        self._scraping = asyncio.Lock()
        self._standing: Mapping[str, Values] = {}
        self._counts: dict[str, Counter[Labels]] = defaultdict(Counter)
        # They are a series beside each histogram that nobody asks for. The library has no types here.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self._histograms = {
            one.name: Histogram(
                one.name, one.meaning, one.labels, buckets=one.buckets, registry=self.registry
            )
            for one in DEFINITIONS
            if one.kind == "histogram"
        }
        self._children: dict[Labels, Histogram] = {}
        self._begin()
        self.registry.register(_Told(self._families))
        ProcessCollector(registry=self.registry)

    async def run(self) -> None:
        """Measure the event loop until cancelled."""
        while True:
            asked = time.monotonic()
            await asyncio.sleep(_LAG_EVERY_S)
            self.observe("jef_event_loop_lag_seconds", max(0.0, time.monotonic() - asked - _LAG_EVERY_S))

    async def exposition(self, accept: str = "") -> tuple[bytes, str]:
        """Everything, as Prometheus reads it, and the content type."""
        encode, kind = choose_encoder(accept)
        async with self._scraping:  # several who look at the same time do not make the ledger count as often
            self._standing = await self._read()
            return encode(self.registry), kind

    def know(self, actions: Collection[str]) -> None:
        """Have more actions as labels. Those that were known stay: their series go on."""
        self._actions |= frozenset(actions)
        self._begin()

    def label(self, name: str) -> str:
        """An action's name as a label."""
        return name if name in self._actions else _OTHER

    # --- what happens ------------------------------------------------------------------------------------

    def committed(self, commit: Commit) -> None:
        """Count what a transaction holds."""
        self.observe("jef_ledger_transaction_seconds", commit.seconds)
        self.observe("jef_ledger_transaction_operations", commit.operations)
        for message, word in commit.door:
            self._came(message, word)
        for move in commit.moves:
            self._moved(move)
        for (what, label), number in commit.tally.counts.items():
            self._counts[_COUNTED[what]][(label,) if label else ()] += number
        for execution, waited_s in commit.tally.lock_waits:
            self.observe("jef_lock_wait_seconds", waited_s, self.label(execution.action), of=execution)
        for name, status, took_s in commit.tally.workflows:
            self.observe("jef_workflow_duration_seconds", took_s, name, status)

    def flagged(self, lateness_s: Iterable[float]) -> None:
        """Measure how late the watcher's flags were on disk."""
        for late_s in lateness_s:
            self.observe("jef_watcher_lateness_seconds", late_s)

    def confirmed(self, took_s: float) -> None:
        """Measure what one write to the broker took until it was confirmed."""
        self.observe("jef_publish_seconds", took_s)

    def observe(self, name: str, value: float, *labels: str, of: Execution | None = None) -> None:
        """Measure: the one place where histograms grow.

        Args:
            name: of the metric.
            value: what was measured.
            labels: in the order of the definition.
            of: the execution that it was measured of, if it was of one.
        """
        key = (name, *labels)
        child = self._children.get(key)
        if child is None:
            made = self._histograms[name]
            child = self._children[key] = made.labels(*labels) if labels else made
        leads = None if of is None or self._exemplar is None else self._exemplar(of)
        child.observe(value, leads)

    def _begin(self) -> None:
        """Let every series that is known from the start be there."""
        for one in DEFINITIONS:
            if one.kind == "counter":
                self._counts[one.name].update(dict.fromkeys(_beginnings(one, self._actions), 0))

    def _came(self, message: Arrival | Refusal, word: Accepted) -> None:
        if isinstance(message, Arrival):
            key = self.label(message.execution.action), word.value
            self._counts["jef_jobs_received_total"][key] += 1

    def _moved(self, move: Transition) -> None:
        execution, event = move.execution, move.event
        action, status = self.label(execution.action), execution.status
        if isinstance(event, Started) and execution.queued_at is not None:
            waited_s = max(0.0, move.at - execution.queued_at)
            self.observe("jef_job_wait_seconds", waited_s, action, of=execution)
        elif isinstance(event, Progressed):
            self._counts["jef_progress_total"][action,] += 1
        elif isinstance(event, Retried):
            self._counts["jef_jobs_retried_total"][action,] += 1
        elif status in FINAL and is_told(event):
            self._counts["jef_jobs_finished_total"][action, status.value] += 1
            if execution.started_at is not None and execution.finished_at is not None:
                took_s = max(0.0, execution.finished_at - execution.started_at)
                self.observe("jef_job_duration_seconds", took_s, action, status.value, of=execution)
            if (clock := _clock_of(move)) is not None:
                self._counts["jef_jobs_timed_out_total"][action, clock] += 1
        if move.late:
            self._counts["jef_jobs_late_total"][action,] += 1

    # --- what is told ------------------------------------------------------------------------------------

    def _families(self) -> Iterator[Metric]:
        """Counters and gauges: what was counted here, and what was read."""
        for one in DEFINITIONS:
            if one.kind == "histogram":
                continue
            family = CounterMetricFamily if one.kind == "counter" else GaugeMetricFamily
            metric = family(one.name, one.meaning, labels=one.labels)
            found = self._standing.get(one.name, {})
            values: dict[Labels, float] = dict(self._counts.get(one.name, {}))
            for labels, value in found.items() if isinstance(found, Mapping) else [((), found)]:
                values[labels] = values.get(labels, 0) + value
            for labels, value in values.items():
                metric.add_metric(labels, value)
            yield metric


def build(prefix: str) -> Mapping[Labels, float]:
    """The value of `jef_build_info`."""
    return {(__version__, platform.python_version(), prefix): 1.0}


def _beginnings(one: Definition, actions: Iterable[str]) -> Iterator[Labels]:
    """The series of a counter that are known from the start."""
    if not one.labels:
        yield ()
    for value in one.values:
        if one.labels[0] == "action":
            yield from ((action, value) for action in actions)
        else:
            yield (value,)


def _clock_of(move: Transition) -> str | None:
    """Which of the four clocks ended an attempt; None: none did."""
    event = move.event
    if isinstance(event, FellSilent):
        return "update"
    if isinstance(event, Failed) and event.actor != "executor":
        return _CLOCKS.get(event.error_type)
    return None


class _Told(Collector):
    """Hands over what does not keep itself in the registry."""

    def __init__(self, families: Callable[[], Iterator[Metric]]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        return self._families()
