"""The live side: while an executor works, the run's span is the current one, in whatever process it works.

In the daemon's own process the spans that an author makes go to the exporter straight away. In a process of the pool
they are handed to the daemon as they end: it alone speaks to the collector, and a process that is killed takes none
of them with it.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping

from opentelemetry import context, trace
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased
from opentelemetry.trace import NonRecordingSpan, SpanContext, StatusCode

from jef_daemon.traceparent import parse
from jef_daemon.tracing.places import context_of, place_of
from jef_daemon.tracing.recorded import Happening, Recorded

_KEPT = 2048
"""Spans of one call that could not be handed over at once."""

Send = Callable[[str], bool]
"""Hands a span over, as `Recorded.dump` writes it; False: not now."""


@contextlib.contextmanager
def entered(traceparent: str) -> Iterator[None]:
    """Make a span the current one, for this task or thread and what it begins."""
    place = parse(traceparent)
    if place is None:
        raise AssertionError("what executors are given is well-formed")
    token = context.attach(trace.set_span_in_context(NonRecordingSpan(context_of(place)), context.Context()))
    try:
        yield
    finally:
        context.detach(token)


class _Handing(SpanProcessor):
    """Hands spans over as they end; what cannot be, is kept for the end of the call."""

    def __init__(self) -> None:
        self.kept: deque[str] = deque(maxlen=_KEPT)
        self.send: Send = lambda _: False

    def on_end(self, span: ReadableSpan) -> None:
        if span.context.trace_flags.sampled:
            self.kept.append(_recorded(span).dump())
            while self.kept and self.send(self.kept[0]):
                self.kept.popleft()


_handing: _Handing | None = None
"""Of this process: the library takes one provider for good."""


def hand_over(send: Send) -> deque[str]:
    """Have the spans of this process handed over from now on; returns where those are kept that could not be."""
    global _handing
    if _handing is None:
        _handing = _Handing()
        provider = TracerProvider(ParentBased(ALWAYS_OFF), shutdown_on_exit=False)
        provider.add_span_processor(_handing)
        trace.set_tracer_provider(provider)
    _handing.send = send
    _handing.kept = deque(maxlen=_KEPT)
    return _handing.kept


def _recorded(span: ReadableSpan) -> Recorded:
    own: SpanContext = span.context
    scope, status = span.instrumentation_scope, span.status
    return Recorded(
        span.name,
        place_of(own),
        None if span.parent is None else place_of(span.parent),
        span.start_time or 0,
        span.end_time or span.start_time or 0,
        _plain(span.attributes),
        span.kind.name,
        tuple(Happening(one.name, one.timestamp, _plain(one.attributes)) for one in span.events),
        tuple(place_of(link.context) for link in span.links),
        is_ok=status.status_code is StatusCode.OK,
        error=(status.description or "") if status.status_code is StatusCode.ERROR else None,
        scope="" if scope is None else scope.name,
        scope_version="" if scope is None else scope.version or "",
    )


def _plain(attributes: Mapping[str, object] | None) -> dict[str, object]:
    """Attributes as JSON has them: lists for tuples; bytes, which it has not, as their digits."""
    found = dict(attributes or {})
    return {name: value.hex() if isinstance(value, bytes) else value for name, value in found.items()}
