"""Two executors made of functions: a coroutine, and blocking code that runs in a process of its own."""

import time

from pydantic import BaseModel

from jef_daemon import ActionExecutorResponse, ExecutionContext, action


class Greeting(BaseModel):
    name: str
    patience: float = 0.0


@action("greet")
async def greet(context: ExecutionContext[Greeting]) -> ActionExecutorResponse:
    return ActionExecutorResponse(result=f"Hello {context.configuration.name}")


@action("greet-slowly")
def greet_slowly(context: ExecutionContext[Greeting]) -> ActionExecutorResponse:
    for step in range(4):
        context.progress(25 * step, f"drawing breath {step + 1}")
        time.sleep(context.configuration.patience)
    return ActionExecutorResponse(result=f"Hello, at last, {context.configuration.name}")
