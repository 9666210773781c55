"""Executors whose authors make spans of their own, and say what they were given."""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Any

from jef_daemon import ActionExecutor, ActionExecutorResponse, ExecutionContext


def _given(context: ExecutionContext[Any]) -> ActionExecutorResponse:
    """What an author sees, and whether anything loaded the library here."""
    loaded = "opentelemetry" in sys.modules
    current = None
    if loaded:
        from opentelemetry import trace

        current = f"{trace.get_current_span().get_span_context().span_id:016x}"
        tracer = trace.get_tracer("author", "1.2")
        with (
            tracer.start_as_current_span("child", attributes={"sizes": [1, 2]}),
            tracer.start_as_current_span("grandchild") as span,
        ):
            span.add_event("half-way", {"at": 0.5})
    context.log.info("traced", pid=os.getpid())
    told = {"traceparent": context.traceparent, "current": current, "loaded": loaded, "pid": os.getpid()}
    return ActionExecutorResponse(job_context_variables=told)


class Traced(ActionExecutor):
    """A coroutine."""

    action = "traced"

    async def execute(self, context: ExecutionContext[Any]) -> ActionExecutorResponse:
        await context.progress(50, "half")
        await asyncio.sleep(0)
        return _given(context)


class TracedBlocking(ActionExecutor):
    """The same in a process of its own."""

    action = "traced-blocking"

    def execute(self, context: ExecutionContext[Any]) -> ActionExecutorResponse:
        context.progress(50, "half")
        return _given(context)
