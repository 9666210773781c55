"""The executor that does nothing: what remains is what the daemon costs."""

from __future__ import annotations

from typing import Any

from jef_daemon import ActionExecutor, ActionExecutorResponse, ExecutionContext


class Nothing(ActionExecutor):
    """Answers at once."""

    action = "nothing"

    async def execute(self, context: ExecutionContext[Any]) -> ActionExecutorResponse:
        """Return a response with one variable."""
        return ActionExecutorResponse(result="done", job_context_variables={"width": 320})
