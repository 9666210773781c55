"""Executors for tests of the daemon: quick, slow, blocking, and those that misbehave.

`JEF_TEST_TRACE` names a file to which each start appends a line, so that a test can count what really ran.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from pydantic import BaseModel

from jef_daemon import (
    ActionExecutor,
    ActionExecutorResponse,
    AsyncActionExecutor,
    ExecutionContext,
    ExternalFailure,
)


def trace(context: ExecutionContext[Any]) -> None:
    """One line for this start, written at once: O_APPEND lines do not mix."""
    if path := os.environ.get("JEF_TEST_TRACE"):
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(descriptor, f"{context.execution_id} {context.attempt} {os.getpid()}\n".encode())
        os.close(descriptor)


class Quick(ActionExecutor):
    """Answers at once."""

    action = "quick"

    class Configuration(BaseModel):
        result: str = "done"
        external_id: str | None = None

    async def execute(self, context: ExecutionContext[Configuration]) -> ActionExecutorResponse:
        trace(context)
        return ActionExecutorResponse(
            result=context.configuration.result,
            execution_id=context.configuration.external_id,
            job_context_variables={"attempt": context.attempt, **context.job_context_variables},
            workflow_context_variables=dict(context.workflow_context_variables),
        )


class Undescribed(Quick):
    pass


class Staged(ActionExecutor):
    """A stage of a workflow: fails its first attempts, takes its time, sets variables; as it is told."""

    action = "staged"

    class Configuration(BaseModel):
        result: Any = "done"
        fails: int = 0
        """How many of the first jobs of the stage fail."""
        seconds: float = 0.0
        job: dict[str, Any] = {}
        workflow: dict[str, Any] = {}

    async def execute(self, context: ExecutionContext[Configuration]) -> ActionExecutorResponse:
        trace(context)
        wanted = context.configuration
        await asyncio.sleep(wanted.seconds)
        if int(context.execution_id.rpartition(":")[2]) <= wanted.fails:
            raise RuntimeError("as it was told")
        seen = {
            "job": dict(context.job_context_variables),
            "workflow": dict(context.workflow_context_variables),
        }
        return ActionExecutorResponse(
            result=str(wanted.result),
            job_context_variables={**wanted.job, **({"saw": seen} if wanted.job else {})},
            workflow_context_variables=wanted.workflow,
        )


class Seconds(BaseModel):
    seconds: float = 0.05
    steps: int = 1
    until: Path | None = None
    """It ends not before this file is there."""


class Slow(ActionExecutor):
    """Takes its time in the event loop."""

    action = "slow"
    Configuration = Seconds

    async def execute(self, context: ExecutionContext[Seconds]) -> ActionExecutorResponse:
        trace(context)
        for step in range(context.configuration.steps):
            await context.progress(100 * step / context.configuration.steps, f"step {step}")
            await asyncio.sleep(context.configuration.seconds / context.configuration.steps)
        while context.configuration.until is not None and not context.configuration.until.exists():
            await asyncio.sleep(0.05)
        return ActionExecutorResponse(result="slept")


class Again(Slow):
    """Slow, and may simply run again."""

    action = "again"
    may_run_again = True


class Blocking(ActionExecutor):
    """Takes its time in a process of its own."""

    action = "blocking"
    Configuration = Seconds

    def execute(self, context: ExecutionContext[Seconds]) -> ActionExecutorResponse:
        trace(context)
        (context.scratch / "used").write_text("yes")
        for step in range(context.configuration.steps):
            context.progress(100 * step / context.configuration.steps, f"step {step}")
            time.sleep(context.configuration.seconds / context.configuration.steps)
        return ActionExecutorResponse(result="slept", job_context_variables={"pid": os.getpid()})


class Guarded(BaseModel):
    seconds: float = 0.05
    store: str | None = None
    """A folder that takes one writer at a time, with no older fencing token than the last; else the job fails."""


class Locked(ActionExecutor):
    """Uses what it locked until its time is over or the lock is lost, and says what it was given."""

    action = "locked"
    Configuration = Guarded

    async def execute(self, context: ExecutionContext[Guarded]) -> ActionExecutorResponse:
        trace(context)
        until = time.monotonic() + context.configuration.seconds
        try:
            with _using(context):
                while time.monotonic() < until and not context.lock_lost:
                    await asyncio.sleep(0.02)
        finally:
            if context.lock_lost:
                Path(os.environ["JEF_TEST_TRACE"] + f".{context.execution_id}.lost").touch()
        return _used(context)


class LockedBlocking(ActionExecutor):
    """The same in a process of its own."""

    action = "locked-blocking"
    Configuration = Guarded

    def execute(self, context: ExecutionContext[Guarded]) -> ActionExecutorResponse:
        trace(context)
        until = time.monotonic() + context.configuration.seconds
        with _using(context):
            while time.monotonic() < until and not context.lock_lost:
                time.sleep(0.02)
        return _used(context)


@contextlib.contextmanager
def _using(context: ExecutionContext[Guarded]) -> Iterator[None]:
    """Write to the store as one writer of many, which nothing but the locks keeps apart."""
    if context.configuration.store is None:
        yield
        return
    store = Path(context.configuration.store)
    store.mkdir(parents=True, exist_ok=True)
    [lock] = context.locks.values()
    last = store / "token"
    if last.exists() and int(last.read_text()) >= lock.fencing_token:
        raise RuntimeError(f"an older token: {lock.fencing_token}, after {last.read_text()}")
    writer = store / "writer"
    writer.touch(exist_ok=False)
    last.write_text(str(lock.fencing_token))
    try:
        yield
    finally:
        writer.unlink()


def _used(context: ExecutionContext[Guarded]) -> ActionExecutorResponse:
    tokens = {lock.resource: [lock.mode, lock.fencing_token] for lock in context.locks.values()}
    return ActionExecutorResponse(job_context_variables={"tokens": tokens, "lost": context.lock_lost})


class Misbehave(ActionExecutor):
    """Does whatever wrong it is told to, in a coroutine."""

    action = "misbehave"

    class Configuration(BaseModel):
        how: str

    async def execute(self, context: ExecutionContext[Configuration]) -> Any:
        trace(context)
        return _misbehave(context.configuration.how, context)


class Broken(ActionExecutor):
    """The same in a process."""

    action = "broken"
    Configuration = Misbehave.Configuration

    def execute(self, context: ExecutionContext[Misbehave.Configuration]) -> Any:
        trace(context)
        return _misbehave(context.configuration.how, context)


class Tidy(ActionExecutor):
    """Cleans up when it is cancelled: writes a file, which takes it a moment."""

    action = "tidy"

    class Configuration(BaseModel):
        file: Path
        how: str = "stops"

    async def execute(self, context: ExecutionContext[Configuration]) -> ActionExecutorResponse | None:
        trace(context)
        try:
            await asyncio.sleep(600)
        except asyncio.CancelledError:
            await asyncio.sleep(0.3)
            context.configuration.file.write_text("tidy")
            if context.configuration.how == "completes":
                return ActionExecutorResponse(result="done all the same")
            if context.configuration.how == "breaks":
                raise RuntimeError("while cleaning up") from None
            raise
        return None


class TidyBlocking(ActionExecutor):
    """The same in a process."""

    action = "tidy-blocking"
    Configuration = Tidy.Configuration

    def execute(self, context: ExecutionContext[Tidy.Configuration]) -> None:
        trace(context)
        try:
            time.sleep(600)
        finally:
            time.sleep(0.3)
            context.configuration.file.write_text("tidy")


class Stubborn(ActionExecutor):
    """Silent, and slow to stop at its first attempt; writes down when each attempt begins and ends."""

    action = "stubborn"

    class Configuration(BaseModel):
        file: Path

    async def execute(self, context: ExecutionContext[Configuration]) -> None:
        def note(what: str) -> None:
            with context.configuration.file.open("a") as file:
                file.write(f"{what} {context.attempt}\n")

        note("begin")
        try:
            await asyncio.sleep(600 if context.attempt == 1 else 0)
        finally:
            # The second waits for the first, within its own limit: it must not be slow besides.
            await asyncio.sleep(1.5 if context.attempt == 1 else 0)
            note("end")


class Fixed(ActionExecutor):
    """Goes on to its end, whoever wants it stopped."""

    action = "fixed"
    cancellable = False
    Configuration = Seconds

    async def execute(self, context: ExecutionContext[Seconds]) -> None:
        await asyncio.sleep(context.configuration.seconds)


class Farm(AsyncActionExecutor):
    """Work that runs outside: moved by updates (it tells its token), or by polls."""

    action = "farm"

    class Configuration(BaseModel):
        how: str = "updates"

    async def start(self, context: ExecutionContext[Configuration]) -> str:
        trace(context)
        context.progress(1, context.token)
        context.checkpoint({"polls": 0})
        return f"farm-{context.execution_id}"

    async def cancel(self, context: ExecutionContext[Configuration]) -> bool:
        context.log.info("farm_cancel", external_id=context.external_id)
        return context.configuration.how == "stops"


class Resumed(Farm):
    """The same, and can be brought back when it has timed out."""

    action = "resumed"

    async def resume(self, context: ExecutionContext[Farm.Configuration]) -> None:
        context.log.info("farm_resume", external_id=context.external_id)
        if context.configuration.how == "gone":
            raise ConnectionError("the farm has forgotten it")


class Polled(Farm):
    """The same, looked at by polls: done at the third."""

    action = "polled"

    def poll(self, context: ExecutionContext[Farm.Configuration]) -> ActionExecutorResponse | None:
        number = context.saved["polls"] + 1
        context.checkpoint({"polls": number})
        context.progress(number * 30, f"poll {number}")
        if context.configuration.how == "fails":
            raise ExternalFailure("the farm is on fire")
        if context.configuration.how == "hiccup" and number == 1:
            raise ConnectionError("no answer")
        return ActionExecutorResponse(result=f"{number} polls") if number == 3 else None


def _misbehave(how: str, context: ExecutionContext[Any]) -> Any:  # noqa: C901
    match how:
        case "raise":
            raise RuntimeError("on purpose")
        case "exit":
            sys.exit(3)
        case "cancel":
            raise asyncio.CancelledError
        case "nonsense":
            return 42
        case "object":
            return ActionExecutorResponse.model_construct(
                result="",
                execution_id=None,
                job_context_variables=cast("Any", {"x": object()}),
                workflow_context_variables={},
            )
        case "nan":
            return ActionExecutorResponse(job_context_variables={"x": float("nan")})
        case "deep":
            nested: Any = 1
            for _ in range(150):
                nested = [nested]
            return ActionExecutorResponse(job_context_variables={"x": nested})
        case "huge":
            return ActionExecutorResponse(job_context_variables={"x": "y" * 10_000_000})
        case "progress":
            for percent in (250, float("nan"), -5):
                context.progress(percent, f"{percent}")
            return None
        case "os-exit":
            os._exit(0)
        case "segfault":
            ctypes.string_at(0)
        case "fork":
            os.spawnlp(os.P_NOWAIT, "sleep", "sleep", "600")
            Path(os.environ["JEF_TEST_TRACE"] + ".forked").write_text("yes")
            time.sleep(600)
    raise AssertionError(how)
