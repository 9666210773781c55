"""The README's executor."""

from pydantic import BaseModel

from jef_daemon import ActionExecutor, ActionExecutorResponse, ExecutionContext


class Thumbnail(ActionExecutor):
    action = "thumbnail"

    class Configuration(BaseModel):
        source: str

    async def execute(self, context: ExecutionContext[Configuration]) -> ActionExecutorResponse:
        await context.progress(25, "In Progress")
        return ActionExecutorResponse(result="done", job_context_variables={"width": 320})
