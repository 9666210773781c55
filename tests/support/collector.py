"""A collector of traces: takes OTLP over HTTP on the loopback, as any other does, and shows what came."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)


@dataclass
class Span:
    """One that came."""

    name: str
    trace_id: str
    span_id: str
    parent_id: str
    kind: int
    begun_ns: int
    ended_ns: int
    attributes: dict[str, Any]
    status: int
    """1: ok, 2: error."""
    error: str
    service: dict[str, Any]
    scope: str
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    links: list[str] = field(default_factory=list)


def _values(attributes: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in attributes}


def _spans(request: ExportTraceServiceRequest) -> list[Span]:
    return [
        Span(
            name=span.name,
            trace_id=span.trace_id.hex(),
            span_id=span.span_id.hex(),
            parent_id=span.parent_span_id.hex(),
            kind=span.kind,
            begun_ns=span.start_time_unix_nano,
            ended_ns=span.end_time_unix_nano,
            attributes=_values(span.attributes),
            status=span.status.code,
            error=span.status.message,
            service=_values(resource.resource.attributes),
            scope=scoped.scope.name,
            events=[(event.name, _values(event.attributes)) for event in span.events],
            links=[link.span_id.hex() for link in span.links],
        )
        for resource in request.resource_spans
        for scoped in resource.scope_spans
        for span in scoped.spans
    ]


class Collector:
    """Listens on a port of its own.

    Args:
        port: 0 for any.
    """

    def __init__(self, port: int = 0) -> None:
        self.spans: list[Span] = []
        self.headers: dict[str, str] = {}
        self._changed = threading.Condition()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                found = (
                    _spans(ExportTraceServiceRequest.FromString(body)) if self.path == "/v1/traces" else []
                )
                collector._take(found, dict(self.headers))
                answer = ExportTraceServiceResponse().SerializeToString()
                self.send_response(200 if self.path == "/v1/traces" else 404)
                self.send_header("Content-Type", "application/x-protobuf")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True

    def _take(self, spans: list[Span], headers: dict[str, str]) -> None:
        with self._changed:
            self.spans += spans
            self.headers = headers
            self._changed.notify_all()

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def port(self) -> int:
        """Where it listens."""
        return self._server.server_port

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.port}"

    def of(self, execution_id: str) -> dict[str, Span]:
        """Spans of the trace that an execution is in, by name."""
        traces = {
            span.trace_id for span in self.spans if span.attributes.get("jef.execution.id") == execution_id
        }
        return {span.name: span for span in self.spans if span.trace_id in traces}

    def until(self, condition: Callable[[], bool], within_s: float = 30) -> None:
        """Wait until a condition holds; it is asked whenever spans came."""
        until = time.monotonic() + within_s
        with self._changed:
            while not condition():
                left = until - time.monotonic()
                if left <= 0:
                    raise AssertionError(f"never: {[(span.name, span.attributes) for span in self.spans]}")
                self._changed.wait(left)
