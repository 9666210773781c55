"""What is counted of a commit, and how labels stay few."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from prometheus_client.parser import text_string_to_metric_families

from jef_daemon import lifecycle
from jef_daemon.errors import RequestRefused
from jef_daemon.lifecycle import (
    Completed,
    Event,
    Execution,
    Failed,
    FellSilent,
    GraceEnded,
    Interrupted,
    Launched,
    Progressed,
    Retried,
    Started,
    Transition,
)
from jef_daemon.metrics import DEFINITIONS, Definition, Metrics, Values
from jef_daemon.ports import Accepted, Arrival, Commit, Delivery, Refusal

Samples = Mapping[tuple[str, tuple[str, ...]], float]


def lived(action: str, *events: Event, each_s: float = 10.0) -> list[Transition]:
    """A life: accepted, then one event after the other."""
    moves = [lifecycle.accept(Execution("an-execution", action), 0.0)]
    for number, event in enumerate(events, 1):
        moves.append(lifecycle.apply(moves[-1].execution, event, number * each_s))
    return moves


async def counted(
    *moves: Transition, door: list[tuple[Arrival | Refusal, Accepted]] | None = None
) -> Samples:
    """What is told after a commit: name and labels, in the order of their names."""

    async def read() -> Mapping[str, Values]:
        return {"jef_slots": 8}

    metrics = Metrics(["render"], read)
    metrics.committed(Commit(0.002, 3, door or [], moves))
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
    assert not [name for name, _ in found if name == "jef_jobs_finished_total"]


async def test_foreign_names_share_a_label() -> None:
    """Anybody can name an action: thousands of names are one series."""
    door: list[tuple[Arrival | Refusal, Accepted]] = [
        (Arrival(Execution(str(number), f"action-{number}"), "{}"), Accepted.NEW) for number in range(1000)
    ]
    error = RequestRefused("not-json", "it is none")
    door.append((Refusal(error, Delivery("x", b"", 1, 1), "x"), Accepted.REFUSED))
    found = await counted(*lived("foreign", Started(), Completed()), door=door)
    assert found["jef_jobs_received_total", ("other", "new")] == 1000
    assert found["jef_messages_refused_total", ("not-json",)] == 1
    assert found["jef_jobs_finished_total", ("other", "COMPLETED")] == 1


@pytest.mark.parametrize("one", DEFINITIONS, ids=lambda one: one.name)
def test_names_follow_the_conventions(one: Definition) -> None:
    """Prefix, unit last, `_total` for counters and nothing else; buckets rise; labels are not reserved."""
    assert one.name.startswith("jef_")
    assert one.name.endswith("_total") == (one.kind == "counter")
    assert bool(one.buckets) == (one.kind == "histogram")
    assert list(one.buckets) == sorted(set(one.buckets))
    assert not {"le", "quantile", "job", "instance", "execution_id"}.intersection(one.labels)
    assert one.meaning.endswith(".")
