"""Between a place in a trace and the library's own form of it."""

from __future__ import annotations

from opentelemetry.trace import SpanContext, TraceFlags

from jef_daemon.traceparent import TraceParent


def context_of(place: TraceParent) -> SpanContext:
    """A place as the library has it."""
    flags = TraceFlags(place.flags)
    return SpanContext(int(place.trace_id, 16), int(place.span_id, 16), is_remote=True, trace_flags=flags)


def place_of(context: SpanContext) -> TraceParent:
    """The other way."""
    return TraceParent(f"{context.trace_id:032x}", f"{context.span_id:016x}", int(context.trace_flags))
