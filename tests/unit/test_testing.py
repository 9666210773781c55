"""What authors of executors test with: the same life cycle, the same notifications, no broker."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from jef_daemon import ActionExecutor, ActionExecutorResponse, ExecutionContext, GrantedLock, action
from jef_daemon.testing import arun, run


class Step(BaseModel):
    source: str


class Steps(ActionExecutor):
    """Tells two steps, in a coroutine."""

    action = "steps"
    Configuration = Step

    async def execute(self, context: ExecutionContext[Step]) -> ActionExecutorResponse:
        await context.progress(25, "In Progress")
        await context.progress(50.9)
        return ActionExecutorResponse(
            result=f"{context.configuration.source} done",
            execution_id="x-1",
            job_context_variables={"width": 320},
            workflow_context_variables={"asset": "42"},
        )


class BlockingSteps(ActionExecutor):
    """The same as a plain function."""

    action = "steps"
    Configuration = Step

    def execute(self, context: ExecutionContext[Step]) -> ActionExecutorResponse:
        response: ActionExecutorResponse = asyncio.run(self._execute(context))
        return response

    async def _execute(self, context: ExecutionContext[Step]) -> Any:
        return await Steps().execute(context)


@pytest.mark.parametrize("executor", [Steps, Steps(), BlockingSteps, BlockingSteps()])
def test_what_would_be_told(executor: Any) -> None:
    """Every notification in order, numbered, as foreign clients read them."""
    job = run(executor, {"source": "a"}, execution_id="624", workflow_id="w")
    told = job.notifications
    assert [(one["status"], one["progress"], one["message"]) for one in told] == [
        ("QUEUED", 0, ""),
        ("RUNNING", 0, ""),
        ("RUNNING", 25, "In Progress"),
        ("RUNNING", 50, "In Progress"),
        ("COMPLETED", 100, "a done"),
    ]
    assert [one["sequence"] for one in told] == [1, 2, 3, 4, 5]
    assert {(one["executionId"], one["workflowId"], one["action"]) for one in told} == {("624", "w", "steps")}
    assert told[-1]["externalId"] == "x-1"
    assert told[-1]["workflowContextVariables"] == {"asset": "42"}
    assert (job.status, job.result, job.variables, job.error) == (
        "COMPLETED",
        "a done",
        {"width": 320},
        None,
    )


@pytest.mark.parametrize("executor", [Steps, BlockingSteps])
async def test_from_a_coroutine(executor: type[ActionExecutor]) -> None:
    """Blocking executors may run a loop of their own there too, as they may in their process."""
    job = await arun(executor, {"source": "a"})
    assert (job.status, job.result) == ("COMPLETED", "a done")


def test_a_failure() -> None:
    @action("broken")
    def broken(context: ExecutionContext[Any]) -> None:
        context.progress(10)
        raise ValueError("on purpose")

    job = run(broken)
    assert [one["status"] for one in job.notifications] == ["QUEUED", "RUNNING", "RUNNING", "FAILED"]
    assert job.error is not None
    assert (job.error["type"], job.error["message"]) == ("ValueError", "on purpose")
    assert "on purpose" in job.error["traceback"]
    assert (job.result, job.variables) == (None, {})


def test_a_configuration_that_is_refused() -> None:
    job = run(Steps, {"sauce": "a"})
    assert job.status == "FAILED"
    assert job.error is not None
    assert "source: Field required" in job.error["message"]


def test_everything_that_a_job_may_be_given() -> None:
    """Attempt, variables, locks, settings."""
    seen: list[ExecutionContext[Any]] = []

    class Sees(ActionExecutor):
        class Settings(BaseModel):
            level: int = 1

        def execute(self, context: ExecutionContext[Any]) -> None:
            seen.append(context)
            assert self.settings.level == 5

    lock = GrantedLock("asset/42", "EXCLUSIVE", 7)
    given: dict[str, Any] = {
        "attempt": 2,
        "job_context_variables": {"a": 1},
        "workflow_context_variables": {"b": 2},
        "locks": {"asset/42": lock},
    }
    for settings in ({"level": 5}, Sees.Settings(level=5)):
        job = run(Sees, settings=settings, **given)
        assert (job.status, job.notifications[-1]["attempt"]) == ("COMPLETED", 2)
    for context in seen:
        assert (context.attempt, context.action, context.locks["asset/42"]) == (2, "Sees", lock)
        assert (dict(context.job_context_variables), dict(context.workflow_context_variables)) == (
            {"a": 1},
            {"b": 2},
        )


def test_scratch_is_there_and_goes() -> None:
    """A folder when it is asked for, gone after the job."""
    used: list[Path] = []

    @action("writes")
    async def writes(context: ExecutionContext[Any]) -> None:
        (context.scratch / "part").write_text("x")
        used.append(context.scratch)

    assert run(writes).status == "COMPLETED"
    assert not used[0].exists()


def test_runs_do_not_share() -> None:
    """Each starts at the beginning."""
    assert run(Steps, {"source": "a"}).notifications[0]["sequence"] == 1
    assert run(Steps, {"source": "b"}).result == "b done"
