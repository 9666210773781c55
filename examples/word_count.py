"""Counts words of text files, telling its progress: an executor as people write them."""

import asyncio
from pathlib import Path

from pydantic import BaseModel

from jef_daemon import ActionExecutor, ActionExecutorResponse, ExecutionContext


class WordCount(ActionExecutor):
    action = "word-count"

    class Configuration(BaseModel):
        folder: Path
        suffix: str = ".py"

    async def execute(self, context: ExecutionContext[Configuration]) -> ActionExecutorResponse:
        files = sorted(context.configuration.folder.rglob(f"*{context.configuration.suffix}"))
        words = 0
        for number, file in enumerate(files, 1):
            words += len((await asyncio.to_thread(file.read_text, "utf-8", "replace")).split())
            await context.progress(100 * number / len(files), f"{words} words in {number} files")
        return ActionExecutorResponse(result=f"{words} words", job_context_variables={"words": words})
