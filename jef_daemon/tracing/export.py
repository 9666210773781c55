"""From recorded spans to the collector: OpenTelemetry's own SDK and exporter, in a thread of theirs.

Spans wait in a bounded queue and are dropped when it is full: neither a job nor the event loop ever waits for a
collector. Whether one takes them is said once per change, in our words; the library's own are silent.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
from collections.abc import Sequence
from functools import lru_cache
from urllib.parse import urlsplit

import structlog
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.sdk.trace.sampling import (
    ALWAYS_OFF,
    ALWAYS_ON,
    Decision,
    ParentBased,
    Sampler,
    TraceIdRatioBased,
)
from opentelemetry.trace import Link, NonRecordingSpan, SpanKind, Status, StatusCode

from jef_daemon import __version__
from jef_daemon.sections import Tracing as TracingSettings
from jef_daemon.traceparent import TraceParent
from jef_daemon.tracing.places import context_of
from jef_daemon.tracing.recorded import Recorded

log = structlog.get_logger()

_PATH = "/v1/traces"
_AWAY_S = 1.0
"""Patience at the end with a collector that took nothing before."""
_LIBRARY = ("opentelemetry.exporter", "opentelemetry.sdk._shared_internal")
"""Loggers whose words are said by us, once."""


class Export:
    """Takes recorded spans to where they are kept.

    Args:
        settings: the operator's.
        identity: the ledger's own name: tells daemons of one service apart.
        exporter: where to; None: OTLP over HTTP, to the endpoint of the settings.
    """

    def __init__(
        self, settings: TracingSettings, identity: str, exporter: SpanExporter | None = None
    ) -> None:
        endpoint = _endpoint(settings)
        self._telling = _Telling(exporter or OTLPSpanExporter(endpoint=endpoint), _shown(endpoint))
        self._batches = BatchSpanProcessor(self._telling)
        self._ids = _Chosen()
        resource = _resource(settings, identity)
        # What is recorded here was decided when its trace began.
        ours = _provider(ALWAYS_ON, resource, self._batches, self._ids)
        # The library takes longer to find one than to make a span; authors have a few, whatever they do.
        self._tracer = lru_cache(maxsize=256)(ours.get_tracer)
        self._roots = _sampler(settings)
        self.provider = _provider(ParentBased(ALWAYS_OFF), resource, self._batches)
        """For executors: only what belongs to a job is recorded."""

    def install(self) -> None:
        """Let executors that run in this process find the provider where the library looks for it."""
        trace.set_tracer_provider(self.provider)

    def samples(self, trace_id: str) -> bool:
        """Whether a trace that begins here is recorded."""
        return (
            self._roots.should_sample(Context(), int(trace_id, 16), "job").decision
            is Decision.RECORD_AND_SAMPLE
        )

    def emit(self, recorded: Recorded) -> None:
        """Take a span; returns at once."""
        parent = Context()
        if recorded.parent is not None:
            parent = trace.set_span_in_context(NonRecordingSpan(context_of(recorded.parent)), parent)
        self._ids.choose(recorded.span)
        span = self._tracer(recorded.scope, recorded.scope_version).start_span(
            recorded.name,
            parent,
            SpanKind[recorded.kind],
            recorded.attributes,
            [Link(context_of(link)) for link in recorded.links],
            recorded.begun_ns,
        )
        for one in recorded.happenings:
            span.add_event(one.name, one.attributes, one.at_ns)
        if recorded.error is not None:
            span.set_status(Status(StatusCode.ERROR, recorded.error))
        elif recorded.is_ok:
            span.set_status(StatusCode.OK)
        span.end(recorded.ended_ns)

    async def finish(self, patience_s: float) -> None:
        """Send what is left, for a time. A collector that is away is not waited for."""
        loop, done = asyncio.get_running_loop(), asyncio.Event()

        def shut_down() -> None:
            self._batches.shutdown()  # type: ignore[no-untyped-call]  # the library has no types here
            with contextlib.suppress(RuntimeError):  # the event loop is closed: nobody waits any more
                loop.call_soon_threadsafe(done.set)

        # Nobody joins it: a process does not stay for the sake of spans.
        threading.Thread(target=shut_down, name="last spans", daemon=True).start()
        try:
            async with asyncio.timeout(_AWAY_S if self._telling.is_away else patience_s):
                await done.wait()
        except TimeoutError:
            log.warning("spans_not_sent", consequence="the last ones are lost")


class _Chosen(IdGenerator):
    """Gives the next span the ids that it has; used by one thread."""

    def __init__(self) -> None:
        self._next = TraceParent("", "")

    def choose(self, place: TraceParent) -> None:
        """Say which ids the next span has."""
        self._next = place

    def generate_trace_id(self) -> int:
        return int(self._next.trace_id, 16)

    def generate_span_id(self) -> int:
        return int(self._next.span_id, 16)


class _Telling(SpanExporter):
    """Says once when spans are not taken, and when they are again."""

    def __init__(self, exporter: SpanExporter, endpoint: str) -> None:
        self._exporter = exporter
        self._endpoint = endpoint
        self._said = _FirstWords()
        self._dropped = 0
        self.is_away = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Send spans, and say where that has changed: the first that are not taken, the first that are again."""
        self._said.words = ""
        result = self._exporter.export(spans)
        if result is SpanExportResult.SUCCESS:
            if self.is_away:
                log.info("spans_taken_again", dropped=self._dropped)
            self.is_away, self._dropped = False, 0
            return result
        self._dropped += len(spans)
        if not self.is_away:
            log.warning(
                "spans_not_taken",
                endpoint=self._endpoint,
                reason=self._said.words,
                consequence="they are dropped; jobs go on",
            )
        self.is_away = True
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return self._exporter.force_flush(timeout_millis)


class _FirstWords(logging.Handler):
    """Keeps what the library says first of an export, instead of letting it speak."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.words = ""
        for name in _LIBRARY:
            logger = logging.getLogger(name)
            logger.handlers[:] = [self]
            logger.propagate = False

    def emit(self, record: logging.LogRecord) -> None:
        causes = [str(one) for one in record.args or () if isinstance(one, Exception)]
        self.words = self.words or (causes[0] if causes else record.getMessage())


def _provider(
    sampler: Sampler, resource: Resource, processor: SpanProcessor, ids: IdGenerator | None = None
) -> TracerProvider:
    # At the interpreter's exit it would wait for a collector that is away.
    made = TracerProvider(sampler, resource, shutdown_on_exit=False, id_generator=ids)
    made.add_span_processor(processor)
    return made


def _resource(settings: TracingSettings, identity: str) -> Resource:
    """What the environment says, then what the settings say; defaults where neither does."""
    said = OTELResourceDetector().detect().attributes  # OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES
    defaults = {"service.name": "jef-daemon", "service.version": __version__, "service.instance.id": identity}
    own = {key: value for key, value in defaults.items() if key not in said}
    if settings.service_name is not None:
        own["service.name"] = settings.service_name
    return Resource.create().merge(Resource(own))


def _sampler(settings: TracingSettings) -> Sampler:
    """Decides about traces that begin here; the producer of a job decides about its own."""
    if settings.sampling_ratio is not None:
        return TraceIdRatioBased(settings.sampling_ratio)
    return TracerProvider(shutdown_on_exit=False).sampler  # OTEL_TRACES_SAMPLER; all, where it is not set


def _endpoint(settings: TracingSettings) -> str:
    """Where spans are posted: as the settings say, else the environment, else to this machine's collector."""
    whole = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    if settings.endpoint is None and whole:
        return whole
    base = settings.endpoint or os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT") or "http://localhost:4318"
    base = base.rstrip("/")
    return base if base.endswith(_PATH) else base + _PATH


def _shown(endpoint: str) -> str:
    """An endpoint without what is secret in it."""
    parts = urlsplit(endpoint)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
