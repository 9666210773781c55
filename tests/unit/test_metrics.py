"""What is counted of a commit, and how labels stay few."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import pytest
from prometheus_client.parser import text_string_to_metric_families

from jef_daemon import lifecycle
from jef_daemon.commits import Commit, Counted, Tally
from jef_daemon.events import (
    Completed,
    Event,
    Failed,
    FellSilent,
    GraceEnded,
    Interrupted,
    Launched,
    Progressed,
    Retried,
    Started,
)
from jef_daemon.lifecycle import Execution, Transition
from jef_daemon.metrics import DEFINITIONS, Definition, Metrics, Values
from jef_daemon.ports import Accepted, Arrival, Refusal

Samples = Mapping[tuple[str, tuple[str, ...]], float]


def lived(action: str, *events: Event, each_s: float = 10.0) -> list[Transition]:
    """A life: accepted, then one event after the other."""
    moves = [lifecycle.accept(Execution("an-execution", action), 0.0)]
    for number, event in enumerate(events, 1):
        moves.append(lifecycle.apply(moves[-1].execution, event, number * each_s))
    return moves


async def nothing() -> Mapping[str, Values]:
    return {}


async def counted(
    *moves: Transition,
    door: list[tuple[Arrival | Refusal, Accepted]] | None = None,
    tally: Tally | None = None,
    read: Mapping[str, Values] | None = None,
) -> Samples:
    """What is told after a commit: name and labels, in the order of their names."""

    async def reading() -> Mapping[str, Values]:
        return {"jef_slots": 8, **(read or {})}

    metrics = Metrics(["render"], reading)
    metrics.committed(Commit(0.002, 3, door or [], moves, tally or Tally()))
    return await told_by(metrics)


async def told_by(metrics: Metrics) -> Samples:
    """Every sample: name and labels, in the order of their names."""
    body, kind = await metrics.exposition()
    assert kind.startswith("text/plain")
    assert b"an-execution" not in body
    return {
        (sample.name, tuple(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(body.decode())
        for sample in family.samples
    }


async def test_a_life_is_counted() -> None:
    """Its wait and its duration are measured."""
    found = await counted(*lived("render", Started(), Progressed(progress=5), Completed()))
    assert found["jef_jobs_finished_total", ("render", "COMPLETED")] == 1
    assert found["jef_job_wait_seconds_sum", ("render",)] == 10
    assert found["jef_job_duration_seconds_sum", ("render", "COMPLETED")] == 20
    assert found["jef_ledger_transaction_operations_sum", ()] == 3
    assert found["jef_ledger_transaction_seconds_sum", ()] == 0.002
    assert found["jef_slots", ()] == 8


async def test_a_retry_is_two_attempts() -> None:
    failed = Failed(error_type="X", error_message="")
    found = await counted(*lived("render", Started(), failed, Retried(token="t"), Started(), Completed()))
    assert found["jef_jobs_finished_total", ("render", "FAILED")] == 1
    assert found["jef_jobs_finished_total", ("render", "COMPLETED")] == 1
    assert found["jef_jobs_retried_total", ("render",)] == 1
    assert found["jef_job_wait_seconds_count", ("render",)] == 2


async def test_a_time_out_is_counted_once() -> None:
    """When it is told; not again when its grace is over."""
    found = await counted(*lived("render", Started(), Launched(), FellSilent(), GraceEnded()))
    assert found["jef_jobs_finished_total", ("render", "TIMED_OUT")] == 1
    assert ("jef_jobs_late_total", ("render",)) not in found
    late = await counted(*lived("render", Started(), FellSilent(), Progressed(progress=1), Completed()))
    assert late["jef_jobs_late_total", ("render",)] == 1


async def test_an_interruption_is_no_end() -> None:
    found = await counted(*lived("render", Started(), Interrupted(token="t")))
    assert not [key for key, value in found.items() if key[0] == "jef_jobs_finished_total" and value]


async def test_progress_is_counted() -> None:
    """By action, however often; late progress as well."""
    told = [Progressed(progress=number) for number in range(7)]
    found = await counted(*lived("render", Started(), *told, FellSilent(), Progressed(), Completed()))
    assert found["jef_progress_total", ("render",)] == 8


@pytest.mark.parametrize(
    ("events", "clock"),
    [
        ([Started(), FellSilent()], "update"),
        ([Started(), Failed(actor="watcher", error_type="QueueTimeout", error_message="")], "queue"),
        ([Started(), Failed(actor="watcher", error_type="LockTimeout", error_message="")], "lock"),
        ([Started(), Failed(actor="daemon", error_type="ExecutionTimeout", error_message="")], "execution"),
        ([Started(), Failed(error_type="QueueTimeout", error_message="an executor's own")], None),
        ([Started(), Failed(error_type="X", error_message="")], None),
        ([Started(), FellSilent(), GraceEnded()], "update"),
    ],
)
async def test_the_clock_that_ran_out_is_told(events: list[Event], clock: str | None) -> None:
    """One of four; what an executor calls its own exceptions is no clock."""
    found = await counted(*lived("render", *events))
    name = "jef_jobs_timed_out_total"
    told = {labels[1]: value for (each, labels), value in found.items() if each == name}
    assert told == dict.fromkeys(("update", "queue", "lock", "execution"), 0) | ({clock: 1} if clock else {})


async def test_what_is_no_transition_is_counted() -> None:
    """The tally of a commit, each with its own metric; and waits for locks by action."""
    tally = Tally()
    for number, what in enumerate(Counted, 1):
        word = "" if what in {Counted.LEASE_EXPIRED, Counted.LOCKS_LOST} else f"a-{what}"
        tally.counts[what, word] = number
    tally.lock_waits = [(Execution("e", "render"), 4.0), (Execution("f", "foreign"), 70.0)]
    tally.workflows = [("ingest", "FAILED", 60.0), ("ingest", "FAILED", 10.0)]
    found = await counted(tally=tally)
    told = {name: found[name, (f"a-{what}",)] for what, name in (
        ("notified", "jef_notifications_total"),
        ("update-refused", "jef_updates_refused_total"),
        ("fenced", "jef_fenced_writes_total"),
        ("lock-request", "jef_lock_requests_total"),
    )}  # fmt: skip
    assert list(told.values()) == [1, 2, 3, 4]
    assert found["jef_lock_leases_expired_total", ()] == 5
    assert found["jef_messages_refused_total", ("a-message-refused",)] == 6
    assert found["jef_locks_lost_total", ()] == 7
    assert found["jef_workflow_duration_seconds_count", ("FAILED", "ingest")] == 2
    assert found["jef_workflow_duration_seconds_sum", ("FAILED", "ingest")] == 70
    assert found["jef_lock_wait_seconds_sum", ("render",)] == 4
    assert found["jef_lock_wait_seconds_sum", ("other",)] == 70


async def test_what_is_read_adds_to_what_is_counted() -> None:
    """Some fences are the ledger's, some the worker's: one metric."""
    tally = Tally(Counter({(Counted.FENCED, "update"): 2, (Counted.FENCED, "completion"): 1}))
    found = await counted(tally=tally, read={"jef_fenced_writes_total": {("completion",): 3}})
    assert found["jef_fenced_writes_total", ("update",)] == 2
    assert found["jef_fenced_writes_total", ("completion",)] == 4


async def test_fixed_words_begin_at_nought() -> None:
    """So that the first of them is an increase; of foreign actions none does."""
    found = await counted()
    for one in DEFINITIONS:
        if one.kind == "counter" and one.values:
            begin = [labels[-1] for name, labels in found if name == one.name]
            assert sorted(begin) == sorted(one.values), one.name
    assert found["jef_jobs_timed_out_total", ("render", "lock")] == 0
    assert found["jef_locks_lost_total", ()] == 0


async def test_the_watcher_and_the_broker_are_measured() -> None:
    metrics = Metrics(["render"], nothing)
    metrics.flagged([0.2, 3.0])
    metrics.confirmed(0.004)
    found = await told_by(metrics)
    assert (
        found["jef_watcher_lateness_seconds_count", ()],
        found["jef_watcher_lateness_seconds_sum", ()],
    ) == (2, 3.2)
    assert found["jef_watcher_lateness_seconds_bucket", ("0.25",)] == 1
    assert found["jef_publish_seconds_bucket", ("0.005",)] == 1


async def test_a_measurement_may_lead_to_its_trace() -> None:
    """Where somebody says how: in OpenMetrics only, and of what belongs to an execution only."""
    metrics = Metrics(
        ["render"], nothing, lambda of: {"trace_id": of.traceparent} if of.traceparent else None
    )
    for traceparent in (None, "a-trace"):
        execution = Execution("an-execution", "render", traceparent=traceparent)
        moves = [lifecycle.accept(execution, 0.0)]
        moves.append(lifecycle.apply(moves[0].execution, Started(), 7.0))
        metrics.committed(Commit(0.002, 3, [], moves, Tally(lock_waits=[(execution, 80.0)])))
    body, kind = await metrics.exposition("application/openmetrics-text; version=1.0.0")
    assert kind.startswith("application/openmetrics-text")
    leading = [line.split("{")[0] for line in body.decode().splitlines() if 'trace_id="a-trace"' in line]
    assert leading == ["jef_job_wait_seconds_bucket", "jef_lock_wait_seconds_bucket"]
    assert b"a-trace" not in (await metrics.exposition())[0]


async def test_foreign_names_share_a_label() -> None:
    """Anybody can name an action: thousands of names are one series."""
    door: list[tuple[Arrival | Refusal, Accepted]] = [
        (Arrival(Execution(str(number), f"action-{number}"), "{}"), Accepted.NEW) for number in range(1000)
    ]
    found = await counted(*lived("foreign", Started(), Completed()), door=door)
    assert found["jef_jobs_received_total", ("other", "new")] == 1000
    assert found["jef_jobs_finished_total", ("other", "COMPLETED")] == 1


@pytest.mark.parametrize("one", DEFINITIONS, ids=lambda one: one.name)
def test_names_follow_the_conventions(one: Definition) -> None:
    """Prefix, unit last, `_total` for counters and nothing else; buckets rise; labels are not reserved."""
    assert one.name.startswith("jef_")
    assert one.name.endswith("_total") == (one.kind == "counter")
    assert bool(one.buckets) == (one.kind == "histogram")
    assert list(one.buckets) == sorted(set(one.buckets))
    assert not one.values or one.labels
    assert not {"le", "quantile", "job", "instance", "execution_id"}.intersection(one.labels)
    assert one.meaning.endswith(".")
