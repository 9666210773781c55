"""For authors of executors: what to write, what it is given, what it gives back. RabbitMQ never shows here.

    from pydantic import BaseModel
    from jef_daemon import ActionExecutor, ActionExecutorResponse, ExecutionContext

    class Thumbnail(ActionExecutor):
        action = "thumbnail"
        class Configuration(BaseModel):
            source: str
        async def execute(self, context: ExecutionContext[Configuration]) -> ActionExecutorResponse:
            await context.progress(25, "In Progress")
            return ActionExecutorResponse(result="done", job_context_variables={"width": 320})

`execute` may be a coroutine (it runs in the daemon's event loop and must not block it) or a plain function
(it runs in a process of its own, where it may block and can be killed).
"""

from __future__ import annotations

import inspect
import json
import math
import typing
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, Field, JsonValue
from pydantic.alias_generators import to_camel

from jef_daemon.plain import structlog

C_co = TypeVar("C_co", covariant=True)
C = TypeVar("C")


class ActionExecutorResponse(BaseModel):
    """What `execute` returns: the seed's four fields, all optional.

    Raises:
        pydantic.ValidationError: a variable is no JSON value.
    """

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="forbid")

    result: str = Field(
        default="", description="A message for people; it becomes the final notification's message."
    )
    execution_id: str | None = Field(
        default=None,
        max_length=255,
        description="The executor's own identifier of the work elsewhere; kept and told as `externalId`.",
    )
    job_context_variables: dict[str, JsonValue] = Field(
        default_factory=dict, description="Kept with the job and passed to the next stage of the workflow."
    )
    workflow_context_variables: dict[str, JsonValue] = Field(
        default_factory=dict, description="Override the workflow's context."
    )


class GrantedLock(typing.NamedTuple):
    """A lock that the job holds while it runs."""

    resource: str
    mode: str
    """SHARED or EXCLUSIVE."""
    fencing_token: int
    """Rises with every grant of the resource. Hand it to the store you write to, which refuses older ones."""


class _Told:
    """What `progress` returns, so that coroutines may await it and blocking code need not."""

    __slots__ = ()

    def __await__(self) -> Generator[None, None, None]:
        return
        yield


_TOLD = _Told()

Report = Callable[[int | None, str | None], None]
"""Takes progress (0 to 100) and message to where they are recorded and told; None leaves one as it was."""


Save = Callable[[str], None]
"""Takes a checkpoint, as JSON, to where it is kept."""

CHECKPOINT_BYTES = 64 * 1024
"""Longest checkpoint."""


def lost_mark(scratch: str) -> str:
    """The file whose existence tells an attempt, in whatever process it runs, that it lost its locks."""
    return f"{scratch}.lock-lost"


def well_formed(text: str) -> str:
    """A text that can be written as UTF-8: names of files may hold bytes that are no text."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


class ExecutionContext(Generic[C_co]):
    """Everything an executor is given for one attempt at one job.

    Attributes:
        configuration: the job's configuration, validated by the executor's `Configuration` model.
        execution_id: the producer's identifier of the job.
        workflow_id: of the workflow it belongs to, or None.
        action: the action's name.
        attempt: 1 for the first, rising with retries.
        job_context_variables: from the previous stage; read-only.
        workflow_context_variables: the workflow's context; read-only.
        locks: granted locks by resource, its workflow's too; empty where none were asked for.
        token: what an update of this attempt must carry; for async executors, to be handed to the work outside.
        external_id: the executor's own identifier for the work elsewhere, once it was told.
        saved: what `checkpoint` was last given, by this attempt or an earlier one; None: nothing yet.
        traceparent: the W3C header to hand to whatever works for this job; None: nobody traces it. Where tracing
            is on, it names the span of this run, which OpenTelemetry has as the current one, too.
    """

    def __init__(
        self,
        *,
        configuration: C_co,
        execution_id: str,
        action: str,
        report: Report,
        scratch: str | Path,
        workflow_id: str | None = None,
        attempt: int = 1,
        job_context_variables: Mapping[str, Any] | None = None,
        workflow_context_variables: Mapping[str, Any] | None = None,
        locks: Mapping[str, GrantedLock] | None = None,
        token: str = "",
        external_id: str | None = None,
        saved: Any = None,
        save: Save | None = None,
        traceparent: str | None = None,
    ) -> None:
        self.traceparent = traceparent
        self.token = token
        self.external_id = external_id
        self.saved = saved
        self._save = save
        self.configuration = configuration
        self.execution_id = execution_id
        self.workflow_id = workflow_id
        self.action = action
        self.attempt = attempt
        self.job_context_variables = MappingProxyType(dict(job_context_variables or {}))
        self.workflow_context_variables = MappingProxyType(dict(workflow_context_variables or {}))
        self.locks = MappingProxyType(dict(locks or {}))
        self._log: structlog.stdlib.BoundLogger | None = None
        self._report = report
        self._scratch = scratch

    def progress(self, percent: float | None = None, message: str | None = None) -> _Told:
        """Tell how far the job is. Cheap: call it as often as you like, it is told at most once a second.

        From a coroutine `await context.progress(...)`, from blocking code call it; both do the same.

        Args:
            percent: 0 to 100; beyond is cut to the nearest, NaN and None keep what was told before.
            message: what it does just now; None keeps what was told before.
        """
        known = percent is not None and not math.isnan(percent)
        told = None if message is None else well_formed(str(message))
        self._report(int(min(100, max(0, percent))) if known and percent is not None else None, told)
        return _TOLD

    def checkpoint(self, data: Any) -> _Told:
        """Save what this job needs to go on from: it survives a crash and reaches the next attempt as `saved`.

        Kept until the job is COMPLETED or CANCELLED; a new one takes the place of the old one.

        Args:
            data: anything that JSON can write, up to 64 KiB.

        Raises:
            ValueError: it is longer, or JSON cannot write it.
        """
        text = json.dumps(data, allow_nan=False)
        if len(text.encode()) > CHECKPOINT_BYTES:
            raise ValueError(f"a checkpoint may have {CHECKPOINT_BYTES} bytes; this one has {len(text)}")
        self.saved = json.loads(text)
        if self._save is not None:
            self._save(text)
        return _TOLD

    @property
    def log(self) -> structlog.stdlib.BoundLogger:
        """A structlog logger bound to the job, and to its trace where there is one."""
        if self._log is None:
            self._log = structlog.get_logger().bind(
                execution_id=self.execution_id, action=self.action, attempt=self.attempt
            )
            if self.traceparent is not None:
                self._log = self._log.bind(trace_id=self.traceparent.split("-")[1])
        return self._log

    @property
    def lock_lost(self) -> bool:
        """Whether the job has lost a lock it was granted: the lease ended, or an operator took it away.

        By default the job is stopped then, and this tells its `finally` blocks why; with `on_lost = "tell"` it
        goes on, and asks here before each step that another holder would not forgive. Cheap: one look at a file.
        """
        return Path(lost_mark(str(self._scratch))).exists()

    @property
    def scratch(self) -> Path:
        """A folder of this attempt's own, made when first asked for and removed after the job."""
        folder = Path(self._scratch)
        folder.mkdir(parents=True, exist_ok=True)
        return folder


class AnyConfiguration(BaseModel):
    """The configuration of an executor that declares none: takes whatever the request holds."""

    model_config = ConfigDict(extra="allow")


class NoSettings(BaseModel):
    """The settings of an executor that has none: every key is an error."""

    model_config = ConfigDict(extra="forbid")


class ActionExecutor:
    """Base class of executors: name the action, declare its configuration, write `execute`.

    One instance serves all jobs of the action in a process, so keep nothing of a job on `self`.
    An exception that leaves `execute` makes the job FAILED with its type, message and stack trace.
    """

    action: ClassVar[str] = ""
    """The action's name: the routing key of its requests. The configuration's table name overrides it."""
    Configuration: ClassVar[type[BaseModel]] = AnyConfiguration
    """Validates each job's configuration, before `execute` is called."""
    Settings: ClassVar[type[BaseModel]] = NoSettings
    """Validates the operator's keys of `[actions.NAME]` that are the executor's own; see `self.settings`."""
    may_run_again: ClassVar[bool] = False
    """Whether an attempt that was interrupted (the daemon died or drained) may simply be run again."""
    cancellable: ClassVar[bool] = True
    """False: a running attempt cannot be cancelled, except by force."""
    retry_attempts: ClassVar[int] = 1
    """Attempts of a job whose `execute` raises, the first included; the operator may set another number."""
    scope: ClassVar[str] = "RELEASE"
    """RELEASE, DEVELOPMENT, DEPRECATED (runs, with a warning) or OBSOLETE (never runs)."""

    def __init__(self, settings: BaseModel | None = None) -> None:
        self.settings: Any = settings if settings is not None else self.Settings()

    def execute(self, context: ExecutionContext[Any]) -> Any:
        """Do the job. A coroutine (`async def`) or a plain function; returns an `ActionExecutorResponse` or None."""
        raise NotImplementedError(f"{type(self).__name__} has no execute method")


class ExternalFailure(Exception):
    """The work outside has failed: raised by `poll`, it makes the job FAILED. Other exceptions are a poll's own."""


class ExternalCancelled(Exception):
    """The work outside was stopped there: raised by `start` or `poll`, it makes the job CANCELLED."""


class NothingToPoll(Exception):
    """There is nothing to look at: raised by `poll` where only updates tell. It is not called again."""


class AsyncActionExecutor(ActionExecutor):
    """Base class of executors whose work runs somewhere else: on a render farm, in another service.

    `start` launches the work and returns; the job stays RUNNING, without a slot, until an update with
    `context.token` ends it, or `poll` does. Updates come over the queue `jef.updates` or by HTTP. Each method may
    be a coroutine or a plain function. Those that are not overridden are not called.
    """

    update_timeout_s: ClassVar[float | None] = 300.0
    """Silence after which a job is TIMED_OUT; None: never. The request and the operator may say otherwise."""

    def start(self, context: ExecutionContext[Any]) -> Any:
        """Launch the work; returns its identifier elsewhere, or None.

        Returns an `ActionExecutorResponse` where the work was so short that it is done already.

        An exception makes the job FAILED. If the daemon dies meanwhile, the attempt was interrupted.
        """
        raise NotImplementedError(f"{type(self).__name__} has no start method")

    def execute(self, context: ExecutionContext[Any]) -> Any:
        """What the daemon calls first: `retry` for a later attempt where there is one, else `start`."""
        return (self.retry if context.attempt > 1 and overrides(self, "retry") else self.start)(context)

    def retry(self, context: ExecutionContext[Any]) -> Any:
        """As `start`, for attempts after the first; `context.saved` tells what there was."""
        raise NotImplementedError

    def poll(self, context: ExecutionContext[Any]) -> Any:
        """Look how the work is; called again and again, at growing intervals up to a minute.

        Returns None while it goes on (tell `context.progress`), or an `ActionExecutorResponse` when it is done.

        Raises:
            ExternalFailure: it has failed.
            ExternalCancelled: it was stopped.
            NothingToPoll: this job tells by updates only; its silence is what its time-out counts.
        """
        raise NotImplementedError

    def cancel(self, context: ExecutionContext[Any]) -> Any:
        """Stop the work. Returns True when it has stopped; else an update says so when it has."""
        raise NotImplementedError

    def resume(self, context: ExecutionContext[Any]) -> Any:
        """Bring the work of a timed-out job back to life; the job is RUNNING again when this returns."""
        raise NotImplementedError


HOOKS = ("poll", "cancel", "resume", "retry")
"""Methods of an async executor that need not be there."""


def overrides(executor: ActionExecutor, method: str) -> bool:
    """Whether an async executor has a method of its own."""
    return getattr(type(executor), method) is not getattr(AsyncActionExecutor, method)


Function = Callable[[ExecutionContext[Any]], Any]


def action(
    name: str, *, configuration: type[BaseModel] | None = None, may_run_again: bool = False
) -> Callable[[Function], type[ActionExecutor]]:
    """Make an executor of a function, coroutine or plain.

        @action("greet")
        async def greet(context: ExecutionContext[Greeting]) -> ActionExecutorResponse: ...

    Args:
        name: the action's name.
        configuration: its model; default: the one in the annotation `ExecutionContext[Model]`, else anything.
        may_run_again: see `ActionExecutor.may_run_again`.
    """

    def decorate(function: Function) -> type[ActionExecutor]:
        model = configuration or _annotated_model(function) or AnyConfiguration
        body = {
            "action": name,
            "Configuration": model,
            "may_run_again": may_run_again,
            "execute": _as_method(function),
            "__doc__": function.__doc__,
            "__module__": function.__module__,
            "__qualname__": function.__qualname__,
        }
        return type(function.__name__, (ActionExecutor,), body)

    return decorate


def _as_method(function: Function) -> Callable[..., Any]:
    if inspect.iscoroutinefunction(function):

        async def execute(self: ActionExecutor, context: ExecutionContext[Any]) -> Any:
            return await function(context)

        return execute

    def execute_blocking(self: ActionExecutor, context: ExecutionContext[Any]) -> Any:
        return function(context)

    return execute_blocking


def _annotated_model(function: Function) -> type[BaseModel] | None:
    for hint in typing.get_type_hints(function).values():
        arguments = typing.get_args(hint)
        if typing.get_origin(hint) is ExecutionContext and arguments:
            model = arguments[0]
            if isinstance(model, type) and issubclass(model, BaseModel):
                return model
    return None
