"""The executor boundary: calls `execute` and turns whatever happens into an event of the life cycle.

The only place with a broad `except`: an executor may raise, end the interpreter, return nonsense; all of it
becomes FAILED with type, message and stack trace, and nothing else is disturbed. A cancellation that was
meant for us is not an executor's failure and goes through.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ValidationError

from jef_daemon.errors import ConfigurationRefused, ExecutorError, ResponseRefused
from jef_daemon.events import Completed, Event, Failed, Launched, Resumed, Stopped
from jef_daemon.messages import MOST_NESTED, explain, is_nested_deeper
from jef_daemon.sdk import (
    HOOKS,
    ActionExecutor,
    ActionExecutorResponse,
    AsyncActionExecutor,
    ExecutionContext,
    ExternalCancelled,
    ExternalFailure,
    GrantedLock,
    Report,
    Save,
    overrides,
    well_formed,
)

_TRACEBACK_CHARACTERS = 16_384
_MESSAGE_CHARACTERS = 4_096


@dataclass(frozen=True, slots=True)
class JobInput:
    """One attempt at one job, as it travels to where the executor runs. Picklable."""

    execution_id: str
    action: str
    configuration: Mapping[str, Any]
    """As the request has it; validated at the boundary."""
    scratch: str
    """Path of the attempt's scratch folder, not made yet."""
    workflow_id: str | None = None
    attempt: int = 1
    job_context_variables: Mapping[str, Any] = field(default_factory=dict)
    workflow_context_variables: Mapping[str, Any] = field(default_factory=dict)
    locks: Mapping[str, GrantedLock] = field(default_factory=dict)
    max_variables_bytes: int = 256 * 1024
    call: str = "execute"
    """Which of the executor's methods is called."""
    token: str = ""
    external_id: str | None = None
    saved: str | None = None
    """The last checkpoint, as JSON."""
    traceparent: str | None = None
    """Well-formed: for what works on the job's behalf."""
    is_traced: bool = False
    """Whether it is the current span while the executor works."""

    def context(
        self, executor: ActionExecutor, report: Report, save: Save | None = None
    ) -> ExecutionContext[Any]:
        """The context that `execute` is given.

        Raises:
            ConfigurationRefused: the executor's model refuses the configuration.
        """
        return ExecutionContext(
            configuration=prepare(executor, self.configuration),
            execution_id=self.execution_id,
            workflow_id=self.workflow_id,
            action=self.action,
            attempt=self.attempt,
            job_context_variables=self.job_context_variables,
            workflow_context_variables=self.workflow_context_variables,
            locks=self.locks,
            report=report,
            scratch=self.scratch,
            token=self.token,
            external_id=self.external_id,
            saved=None if self.saved is None else json.loads(self.saved),
            save=save,
            traceparent=self.traceparent,
        )


def is_blocking(executor: ActionExecutor) -> bool:
    """Whether `execute` is a plain function, which runs in a process of its own."""
    methods = [executor.execute]
    if isinstance(executor, AsyncActionExecutor):
        methods = [executor.start, *([executor.retry] if overrides(executor, "retry") else [])]
    return not all(inspect.iscoroutinefunction(method) for method in methods)


def hooks_of(executor: ActionExecutor) -> dict[str, bool]:
    """The methods that an async executor has beside `start`, and whether each blocks."""
    if not isinstance(executor, AsyncActionExecutor):
        return {}
    return {
        name: not inspect.iscoroutinefunction(getattr(executor, name))
        for name in HOOKS
        if overrides(executor, name)
    }


def prepare(executor: ActionExecutor, configuration: Mapping[str, Any]) -> BaseModel:
    """Validate a job's configuration.

    Raises:
        ConfigurationRefused: with every field and what is wrong with it.
    """
    try:
        return executor.Configuration.model_validate(configuration)
    except ValidationError as error:
        raise ConfigurationRefused(f"configuration refused: {explain(error)}") from None


async def perform(
    executor: ActionExecutor, job: JobInput, report: Report, save: Save | None = None
) -> Event | None:
    """Call a coroutine method of an executor. Cancelling the caller cancels it.

    Returns:
        What it means for the job; None: nothing yet, which only calls beside `execute` can say.
    """
    task = asyncio.current_task()
    try:
        with _traced(job):
            context = job.context(executor, report, save)
            result = getattr(executor, job.call)(context)
            if inspect.isawaitable(result):
                result = await result
            return _meaning(executor, result, job)
    except asyncio.CancelledError as error:
        if task is not None and task.cancelling():
            raise
        return failed(error)  # the executor's own idea
    except ExternalCancelled as error:
        return Stopped(reason=_text(error) or "stopped outside")
    except BaseException as error:  # noqa: BLE001  the executor boundary
        return failed(error)


def perform_blocking(
    executor: ActionExecutor, job: JobInput, report: Report, save: Save | None = None
) -> Event | None:
    """As `perform`, in this process, which may be killed for it."""
    try:
        with _traced(job):
            context = job.context(executor, report, save)
            result = getattr(executor, job.call)(context)
            if inspect.isawaitable(result):
                result = asyncio.run(_awaited(result))
            return _meaning(executor, result, job)
    except ExternalCancelled as error:
        return Stopped(reason=_text(error) or "stopped outside")
    except BaseException as error:  # noqa: BLE001  the executor boundary
        return failed(error)


_UNTRACED = contextlib.nullcontext()


def _traced(job: JobInput) -> contextlib.AbstractContextManager[None]:
    """While it lasts, the job's span is the current one."""
    if not job.is_traced or job.traceparent is None:
        return _UNTRACED
    from jef_daemon.tracing.executor import entered  # its library: only where tracing is on

    return entered(job.traceparent)


async def _awaited(result: Any) -> Any:
    return await result


def _meaning(executor: ActionExecutor, result: Any, job: JobInput) -> Event | None:
    """What the result of a call means for the job."""
    if job.call == "execute":
        is_launch = isinstance(executor, AsyncActionExecutor) and not isinstance(
            result, ActionExecutorResponse
        )
        return _launched(result) if is_launch else _completed(result, job)
    return _HOOK_MEANINGS[job.call](result, job)


def _launched(result: Any) -> Launched:
    if result is not None and not isinstance(result, str | int):
        raise ResponseRefused(
            f"start returned {type(result).__name__}; return the work's identifier elsewhere, or None"
        )
    return Launched(external_id=None if result is None else well_formed(str(result))[:255])


def _polled(result: Any, job: JobInput) -> Event | None:
    return None if result is None else _completed(result, job)


def _cancelled(result: Any, job: JobInput) -> Event | None:
    return Stopped(reason="stopped by its executor") if result is True else None


def _resumed(result: Any, job: JobInput) -> Event | None:
    return Resumed()


_HOOK_MEANINGS: Mapping[str, Callable[[Any, JobInput], Event | None]] = {
    "poll": _polled,
    "cancel": _cancelled,
    "resume": _resumed,
}


def _completed(result: Any, job: JobInput) -> Completed:
    if result is None:
        return Completed()
    if not isinstance(result, ActionExecutorResponse):
        raise ResponseRefused(
            f"execute returned {type(result).__name__}; return an ActionExecutorResponse or None"
        )
    limit = job.max_variables_bytes
    size = _json_bytes("job_context_variables", result.job_context_variables)
    size += _json_bytes("workflow_context_variables", result.workflow_context_variables)
    if size > limit:
        raise ResponseRefused(
            f"the variables take {size} bytes; {limit} are allowed (jobs.max_variables_bytes)"
        )
    return Completed(
        result=well_formed(result.result),
        external_id=result.execution_id,
        job_context_variables=result.job_context_variables,
        workflow_context_variables=result.workflow_context_variables,
    )


def _json_bytes(name: str, variables: Mapping[str, Any]) -> int:
    if not variables:
        return 0
    for key, value in variables.items():
        try:
            json.dumps({key: value}, allow_nan=False, ensure_ascii=False).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise ResponseRefused(f"{name}.{key} cannot be written as JSON: {error}") from None
    encoded = json.dumps(variables, ensure_ascii=False).encode()
    if is_nested_deeper(encoded, MOST_NESTED):
        raise ResponseRefused(f"{name} nest deeper than {MOST_NESTED} levels")
    return len(encoded)


def failed(error: BaseException) -> Failed:
    """The end of a job that raised: type, message, and the stack trace of the executor's own frames."""
    kind = type(error)
    ours = isinstance(error, ExecutorError)
    # As an update names it that says no more than FAILED: a policy's `not_on` means both.
    is_plain = ours or kind is ExternalFailure or kind.__module__ == "builtins"
    name = kind.__name__ if is_plain else f"{kind.__module__}.{kind.__qualname__}"
    return Failed(
        error_type=name,
        error_message=_text(error)[:_MESSAGE_CHARACTERS],
        traceback=None if ours else _stack(error),
    )


def _text(error: BaseException) -> str:
    try:
        return well_formed(str(error))
    except BaseException as second:  # noqa: BLE001  even __str__ is the executor's code
        return f"(its text cannot be had: {type(second).__name__})"


def _stack(error: BaseException) -> str:
    """The executor's frames only; the end is kept where it is too long."""
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename == __file__:
        frames = frames.tb_next
    try:
        told = well_formed("".join(traceback.format_exception(type(error), error, frames)))
    except BaseException:  # noqa: BLE001  formatting calls the exception's own methods
        told = well_formed("".join(traceback.format_tb(frames)))
    return told if len(told) <= _TRACEBACK_CHARACTERS else "…" + told[-_TRACEBACK_CHARACTERS:]
