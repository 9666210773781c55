#!/usr/bin/env python3
"""What tracing costs the event loop, per job of five spans: off, not recorded, recorded. No broker, no disk.

benchmarks/tracing.py [jobs]
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from jef_daemon import lifecycle, notifications, traceparent
from jef_daemon.commits import Commit
from jef_daemon.events import Completed, Started
from jef_daemon.lifecycle import Execution
from jef_daemon.names import Names
from jef_daemon.ports import Accepted, Arrival, Outgoing
from jef_daemon.sections import Tracing
from jef_daemon.tracing.export import Export
from jef_daemon.tracing.spans import Spans

SILENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"


class Nowhere(SpanExporter):
    """Takes everything."""

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        return SpanExportResult.SUCCESS


def job(number: int, header: str | None, spans: Spans | None) -> None:
    """What a job is to the event loop: its transitions and notifications, and the spans of them."""
    execution = Execution(str(number), "quick", traceparent=header)
    if spans is not None:
        spans.begin(execution)
    moves = [lifecycle.accept(execution, 1.0)]
    moves.append(lifecycle.apply(moves[-1].execution, Started(), 1.0))
    moves.append(lifecycle.apply(moves[-1].execution, Completed(), 1.1))
    told = [notifications.notification(move) for move in moves]
    if spans is not None:
        spans.committed(Commit(0.001, 1, [(Arrival(execution, "{}"), Accepted.NEW)], moves))
        headers = [{"traceparent": traceparent.carried(move.execution)} for move in moves]
        both = zip(told, headers, strict=True)
        spans.confirmed([Outgoing(1, "jef.status", "quick.x", body, header) for body, header in both])


def measure(jobs: int, run: Callable[[int], None]) -> float:
    """Microseconds of the processor per job."""
    began = time.process_time()
    for number in range(jobs):
        run(number)
    return (time.process_time() - began) / jobs * 1e6


def main() -> None:
    """Measure and tell."""
    os.environ["OTEL_BSP_SCHEDULE_DELAY"] = "600000"  # the exporter's thread is not what is measured
    jobs = int(sys.argv[1]) if len(sys.argv) > 1 else 5000
    export = Export(Tracing(), "benchmark", Nowhere())
    spans = Spans(export.emit, export.samples, Names())
    off = measure(jobs, lambda number: job(number, None, None))
    for what, header in (("not recorded", SILENT), ("recorded", None)):
        took = measure(jobs, lambda number, header=header: job(number, header, spans))  # type: ignore[misc]
        print(f"{what}: {took - off:.0f} µs per job more than off")


if __name__ == "__main__":
    main()
