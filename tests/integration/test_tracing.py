"""One trace, over a real broker and a real daemon process, into a real collector's hands."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from tests.support.amqp import Client
from tests.support.collector import Collector, Span
from tests.support.http import client_of, free_port
from tests.support.process import DaemonProcess
from tests.support.services import Scripted, response

TRACE, PRODUCER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
HEADER = f"00-{TRACE}-{PRODUCER}-01"
ACTIONS = """
[actions.traced]
executor = "tests.support.traced:Traced"
[actions.traced-blocking]
executor = "tests.support.traced:TracedBlocking"
[actions.traced-command]
command = ["sh", "-c", "echo $TRACEPARENT"]
"""


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as listening:
        yield listening


@pytest.fixture
async def exits() -> AsyncIterator[contextlib.AsyncExitStack]:
    async with contextlib.AsyncExitStack() as stack:
        yield stack


def trace_to(daemon: DaemonProcess, url: str, actions: str = "") -> None:
    daemon.configure(ACTIONS + actions, tracing={"enabled": True, "endpoint": url})


async def send(
    client: Client, action: str, execution_id: str, header: str | None = HEADER, **more: Any
) -> None:
    body = json.dumps({"executionId": execution_id, "configuration": {}, **more}).encode()
    await client.publish(
        action, body, headers={"traceparent": header} if header else {}, correlation_id="c-1"
    )


async def test_one_trace_from_the_producer_into_what_the_job_starts(
    daemon: DaemonProcess, client: Client, collector: Collector, exits: contextlib.AsyncExitStack
) -> None:
    """Intake, waits, execution, an author's spans in both kinds of processes, a command, a service, notifications."""
    service = await exits.enter_async_context(Scripted([response(200, {"result": "ok"})]))
    http = f'[actions.http]\nallowed_hosts = ["127.0.0.1:{service.port}"]\nplain_http = true\n'
    trace_to(daemon, collector.url, http)
    port = free_port()
    daemon.start(OTEL_BSP_SCHEDULE_DELAY="100", JEF_HTTP_PORT=str(port))
    seen = await client.channel.declare_queue(exclusive=True)
    await seen.bind(f"{client.prefix}.status", "traced.#")
    lock = [{"resource": "asset/1", "mode": "EXCLUSIVE"}]
    await client.submit("slow", "holder", {"seconds": 0.5}, locks=lock)
    await client.until(lambda: "RUNNING" in client.statuses("holder"))
    await send(client, "traced", "1", locks=lock)
    await send(client, "traced-blocking", "2")
    await send(client, "traced-command", "3")
    await send(client, "http", "4", configuration={"url": service.url})
    assert (await client.end_of("4"))["status"] == "COMPLETED"
    ends = {name: (await client.end_of(name))["jobContextVariables"] for name in ("1", "2", "3")}
    assert client.statuses("1") == ["QUEUED", "WAITING_FOR_LOCK", "RUNNING", "RUNNING", "COMPLETED"]
    collector.until(lambda: len([one for one in collector.spans if one.name == "notify COMPLETED"]) >= 5)
    leading = await exemplars(port)
    assert daemon.stop() == 0

    spans = [span for span in collector.spans if span.trace_id == TRACE]
    assert {span.attributes.get("jef.execution.id") for span in spans} == {"1", "2", "3", "4", None}
    by_id = {span.span_id: span for span in spans}
    assert len(by_id) == len(spans)
    for name in ("1", "2", "3", "4"):
        check_job(name, [span for span in spans if span.attributes.get("jef.execution.id") == name], by_id)
    locked = by_name([span for span in spans if span.attributes.get("jef.execution.id") == "1"])
    assert locked["lock wait"].events[0][0] == "waiting"
    assert locked["lock wait"].events[0][1]["jef.lock.resource"] == "asset/1"
    assert locked["lock wait"].ended_ns <= locked["execution"].begun_ns
    assert ("progress", {"jef.progress": 50, "jef.message": "half"}) in locked["execution"].events
    for name in ("1", "2"):
        run = by_name([one for one in spans if one.attributes.get("jef.execution.id") == name])["execution"]
        assert ends[name]["traceparent"] == f"00-{TRACE}-{run.span_id}-01"
        assert ends[name]["current"] == run.span_id
        [child] = [one for one in spans if one.name == "child" and one.parent_id == run.span_id]
        [grandchild] = [one for one in spans if one.parent_id == child.span_id]
        assert (child.scope, grandchild.name) == ("author", "grandchild")
        assert grandchild.events == [("half-way", {"at": 0.5})]
    assert ends["1"]["pid"] != ends["2"]["pid"]
    command = by_name([one for one in spans if one.attributes.get("jef.execution.id") == "3"])["execution"]
    assert ends["3"]["output"].strip() == f"00-{TRACE}-{command.span_id}-01"
    called = by_name([one for one in spans if one.attributes.get("jef.execution.id") == "4"])["execution"]
    assert [one.headers["traceparent"] for one in service.requests] == [f"00-{TRACE}-{called.span_id}-01"]
    logged = [line for line in daemon.events() if line.get("event") == "traced"]
    assert {line["trace_id"] for line in logged} == {TRACE}

    job = locked["job traced"]
    for name in ("jef_job_wait_seconds", "jef_lock_wait_seconds", "jef_job_duration_seconds"):
        assert {"trace_id": TRACE, "span_id": job.span_id} in leading[name, "traced"]
    for _ in range(5):
        message = await seen.get(timeout=10)
        assert message is not None
        assert message.headers["traceparent"] == f"00-{TRACE}-{job.span_id}-01"


async def exemplars(port: int) -> dict[tuple[str, str], list[dict[str, str]]]:
    """What leads from histograms to traces, by metric and action, as OpenMetrics has it."""
    async with client_of(port) as anybody:
        told = await anybody.get(
            "/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"}
        )
        plain = await anybody.get("/metrics")
    assert told.headers["content-type"].startswith("application/openmetrics-text")
    assert "trace_id" not in plain.text
    found: dict[tuple[str, str], list[dict[str, str]]] = {}
    for family in text_string_to_metric_families(told.text):  # type: ignore[no-untyped-call]
        for sample in family.samples:
            if sample.exemplar is not None:
                key = family.name, sample.labels["action"]
                found.setdefault(key, []).append(dict(sample.exemplar.labels))
    return found


def by_name(spans: list[Span]) -> dict[str, Span]:
    return {span.name: span for span in spans}


def check_job(name: str, spans: list[Span], by_id: dict[str, Span]) -> None:
    """The spans that every job has: below the producer's, within their time, with their attributes."""
    [job] = [span for span in spans if span.name.startswith("job ")]
    assert (job.parent_id, job.kind, job.status) == (PRODUCER, 5, 1)
    assert job.attributes["jef.status"] == "COMPLETED"
    assert job.attributes["messaging.message.conversation_id"] == "c-1"
    assert (job.service["service.name"], len(job.service["service.instance.id"])) == ("jef-daemon", 12)
    names = {span.name for span in spans if span is not job}
    assert {"intake", "execution", "notify QUEUED", "notify RUNNING", "notify COMPLETED"} <= names
    for span in spans:
        assert span is job or span.parent_id == job.span_id
        assert span.ended_ns >= span.begun_ns
        assert span.begun_ns >= job.begun_ns - 1_000_000  # notifications tell milliseconds


async def test_a_killed_daemon_loses_no_span_of_a_job(
    daemon: DaemonProcess, client: Client, collector: Collector
) -> None:
    """Its next life says what became of the attempt, from the ledger: same trace, same spans, from the true start."""
    trace_to(daemon, collector.url)
    daemon.start(OTEL_BSP_SCHEDULE_DELAY="100")
    body = json.dumps({"executionId": "1", "configuration": {"seconds": 600}}).encode()
    await client.publish("slow", body, headers={"traceparent": HEADER})
    await client.until(lambda: "RUNNING" in client.statuses("1"))
    collector.until(lambda: "notify RUNNING" in collector.of("1"))
    daemon.kill()
    daemon.start(OTEL_BSP_SCHEDULE_DELAY="100")
    await client.end_of("1")
    collector.until(lambda: {"job slow", "execution", "notify FAILED"} <= set(collector.of("1")))
    spans = collector.of("1")
    job, run = spans["job slow"], spans["execution"]
    assert (job.parent_id, run.parent_id) == (PRODUCER, job.span_id)
    assert {spans[f"notify {status}"].parent_id for status in ("QUEUED", "RUNNING", "FAILED")} == {
        job.span_id
    }
    assert (job.status, job.attributes["error.type"]) == (2, "Interrupted")
    # The instant that was told, in milliseconds, in the life before.
    assert abs(run.begun_ns - spans["notify RUNNING"].begun_ns) < 1_000_000
    assert run.begun_ns < run.ended_ns


async def test_a_trace_that_the_producer_does_not_record_is_not_recorded(
    daemon: DaemonProcess, client: Client, collector: Collector
) -> None:
    """Nor is what an author does in it; one that begins here is recorded as the ratio says, with a root."""
    trace_to(daemon, collector.url)
    daemon.start(
        OTEL_BSP_SCHEDULE_DELAY="100",
        OTEL_SERVICE_NAME="render",
        OTEL_RESOURCE_ATTRIBUTES="deployment.environment=lab",
    )
    header = HEADER.removesuffix("01") + "00"
    await send(client, "traced", "silent", header)
    await send(client, "traced-blocking", "silent-too", header)
    for name in ("silent", "silent-too"):
        assert (await client.end_of(name))["jobContextVariables"]["traceparent"] == header
    await send(client, "traced", "own", None)
    await send(client, "traced", "malformed", "00-zz")
    await client.end_of("own")
    await client.end_of("malformed")
    assert daemon.stop() == 0
    assert TRACE not in {span.trace_id for span in collector.spans}
    spans = collector.of("own")
    assert spans["job traced"].parent_id == ""
    assert spans["intake"].parent_id == spans["execution"].parent_id == spans["job traced"].span_id
    assert spans["job traced"].service["service.name"] == "render"
    assert spans["job traced"].service["deployment.environment"] == "lab"
    assert spans["job traced"].trace_id != collector.of("malformed")["job traced"].trace_id


async def test_a_collector_that_is_away_harms_nobody(daemon: DaemonProcess, client: Client) -> None:
    """Jobs end, one line says so, another that it is back, and the daemon stops in its time."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
    trace_to(daemon, f"http://127.0.0.1:{port}")
    daemon.start(OTEL_BSP_SCHEDULE_DELAY="100", OTEL_EXPORTER_OTLP_TIMEOUT="2")
    for number in range(30):
        await client.submit("quick", f"away-{number}")
    for number in range(30):
        assert (await client.end_of(f"away-{number}"))["status"] == "COMPLETED"
    daemon.wait_for("spans_not_taken")
    await client.submit("quick", "more")
    await client.end_of("more")
    with Collector(port) as collector:
        daemon.wait_for("spans_taken_again", within_s=60)
        await client.submit("quick", "back")
        await client.end_of("back")
        collector.until(lambda: "job quick" in collector.of("back"))
    await client.submit("quick", "last")
    await client.end_of("last")
    assert daemon.stop() == 0
    lines = [line for line in daemon.events() if str(line.get("event")).startswith("spans_")]
    assert [line["event"] for line in lines][:2] == ["spans_not_taken", "spans_taken_again"]
    assert lines[0]["endpoint"] == f"http://127.0.0.1:{port}/v1/traces"
    assert "refused" in lines[0]["reason"]
    assert not [line for line in daemon.events() if "opentelemetry" in str(line.get("logger"))]


async def test_a_collector_that_never_answers_does_not_keep_the_daemon(
    daemon: DaemonProcess, client: Client
) -> None:
    """It is let go of when the time for the last words is over, however long the exporter would wait."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        daemon.configure(
            ACTIONS,
            tracing={"enabled": True, "endpoint": f"http://127.0.0.1:{port}"},
            shutdown={"flush_s": 1.0},
        )
        daemon.start(OTEL_BSP_SCHEDULE_DELAY="100", OTEL_EXPORTER_OTLP_TIMEOUT="600")
        await client.submit("quick", "1")
        assert (await client.end_of("1"))["status"] == "COMPLETED"
        assert daemon.stop(within_s=60) == 0
    daemon.wait_for("spans_not_sent")


async def test_off_nothing_is_loaded_and_the_producers_goes_through(
    daemon: DaemonProcess, client: Client
) -> None:
    """To executors in both kinds of processes, and to commands; what is malformed reaches no environment."""
    daemon.configure(ACTIONS)
    daemon.start()
    await send(client, "traced", "1")
    await send(client, "traced-blocking", "2")
    for name in ("1", "2"):
        told = (await client.end_of(name))["jobContextVariables"]
        assert (told["traceparent"], told["loaded"]) == (HEADER, False)
    await send(client, "traced-command", "3")
    assert (await client.end_of("3"))["jobContextVariables"]["output"].strip() == HEADER
    await send(client, "traced-command", "4", "00-x\nEVIL=1")
    assert (await client.end_of("4"))["jobContextVariables"]["output"].strip() == ""
