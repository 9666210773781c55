"""Runs an executor in a unit test: no broker, no ledger, the daemon's own life cycle and messages.

job = run(Thumbnail, {"source": "/in/a.mov"})
assert job.status == "COMPLETED"
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from jef_daemon import lifecycle, notifications
from jef_daemon.events import Event, Progressed, Started
from jef_daemon.lifecycle import Execution, Transition
from jef_daemon.run.boundary import JobInput, hooks_of, is_blocking, perform, perform_blocking
from jef_daemon.sdk import ActionExecutor, GrantedLock


@dataclass
class TestRun:
    """What became of the job."""

    __test__ = False  # pytest: this is no test

    notifications: list[dict[str, Any]] = field(default_factory=list)
    """What would be told on `jef.status`, in order; every progress, none left out."""

    checkpoint: Any = None
    """What the executor saved last."""

    @property
    def status(self) -> str:
        """The last status told."""
        return str(self.notifications[-1]["status"])

    @property
    def result(self) -> str | None:
        """The response's result; None unless COMPLETED."""
        return self.notifications[-1].get("result")

    @property
    def variables(self) -> dict[str, Any]:
        """The response's `jobContextVariables`; empty unless COMPLETED."""
        return dict(self.notifications[-1].get("jobContextVariables", {}))

    @property
    def error(self) -> dict[str, Any] | None:
        """Type, message and traceback; None unless FAILED."""
        return self.notifications[-1].get("error")


class _Telling:
    """Applies events to one execution and keeps what is told of each."""

    def __init__(self, execution: Execution) -> None:
        self.run = TestRun()
        self.saved: str | None = None
        self._execution = execution
        self._tell(lifecycle.accept(execution, time.time()))

    def apply(self, event: Event) -> None:
        """Let an event happen to it, and keep what is told of that."""
        self._tell(lifecycle.apply(self._execution, event, time.time()))

    def report(self, percent: int | None, message: str | None) -> None:
        """Tell each progress: a test has no interval that would hold some back."""
        self.apply(Progressed(progress=percent, message=message))

    def save(self, checkpoint: str) -> None:
        """Keep a checkpoint, for the next call and for the test."""
        self.saved = checkpoint
        self.run.checkpoint = json.loads(checkpoint)

    @property
    def external_id(self) -> str | None:
        """As the executor said last."""
        return self._execution.external_id

    def _tell(self, transition: Transition) -> None:
        self._execution = transition.execution
        self.run.notifications.append(json.loads(notifications.notification(transition)))


async def arun(
    executor: type[ActionExecutor] | ActionExecutor,
    configuration: Mapping[str, Any] | None = None,
    *,
    settings: BaseModel | Mapping[str, Any] | None = None,
    execution_id: str = "test-1",
    workflow_id: str | None = None,
    attempt: int = 1,
    job_context_variables: Mapping[str, Any] | None = None,
    workflow_context_variables: Mapping[str, Any] | None = None,
    locks: Mapping[str, GrantedLock] | None = None,
    saved: Any = None,
    traceparent: str | None = None,
) -> TestRun:
    """Run an executor to its end, from a coroutine test.

    Args:
        executor: its class, or an instance.
        configuration: the job's, as a request would have it.
        settings: the operator's keys of the action.
        execution_id: the job's name.
        workflow_id: of its workflow.
        attempt: 2 and more: a retry.
        job_context_variables: from the previous stage.
        workflow_context_variables: the workflow's context.
        locks: granted locks by resource.
        saved: what an earlier attempt gave to `checkpoint`.
        traceparent: of the job's trace.
    """
    made = executor if isinstance(executor, ActionExecutor) else _make(executor, settings)
    action = made.action or type(made).__name__
    telling = _Telling(Execution(execution_id, action, workflow_id=workflow_id, attempt=attempt))
    telling.saved = None if saved is None else json.dumps(saved)
    telling.apply(Started())
    with tempfile.TemporaryDirectory(prefix="jef-test-") as folder:
        job = JobInput(
            execution_id=execution_id,
            action=action,
            configuration=configuration or {},
            scratch=f"{folder}/scratch",
            workflow_id=workflow_id,
            attempt=attempt,
            job_context_variables=job_context_variables or {},
            workflow_context_variables=workflow_context_variables or {},
            locks=locks or {},
            saved=telling.saved,
            traceparent=traceparent,
            token="test",  # noqa: S106  nobody checks it here
        )
        await _call(made, job, telling, blocks=is_blocking(made))
        blocks = hooks_of(made).get("poll")
        while blocks is not None and telling.run.status == "RUNNING":
            # What it saved and how it called the work reach each poll, as in the daemon; only the waiting is left out.
            job = dataclasses.replace(job, call="poll", saved=telling.saved, external_id=telling.external_id)
            await _call(made, job, telling, blocks=blocks)
    return telling.run


async def _call(made: ActionExecutor, job: JobInput, telling: _Telling, *, blocks: bool) -> None:
    if blocks:
        # In a thread: as in its process, no event loop runs around it, and it may run one of its own.
        event = await asyncio.to_thread(perform_blocking, made, job, telling.report, telling.save)
    else:
        event = await perform(made, job, telling.report, telling.save)
    if event is not None:
        telling.apply(event)


def run(
    executor: type[ActionExecutor] | ActionExecutor,
    configuration: Mapping[str, Any] | None = None,
    **more: Any,
) -> TestRun:
    """`arun` from a plain test; takes the same arguments."""
    return asyncio.run(arun(executor, configuration, **more))


def _make(kind: type[ActionExecutor], settings: BaseModel | Mapping[str, Any] | None) -> ActionExecutor:
    if isinstance(settings, Mapping):
        settings = kind.Settings.model_validate(settings)
    return kind(settings)
