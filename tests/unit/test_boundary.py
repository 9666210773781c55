"""Whatever an executor does becomes an event that can be told; a cancellation meant for us goes through."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from jef_daemon import (
    ActionExecutor,
    ActionExecutorResponse,
    AsyncActionExecutor,
    ExecutionContext,
    ExternalFailure,
    notifications,
)
from jef_daemon.events import Completed, Event, Failed, Launched
from jef_daemon.lifecycle import Execution, Status, apply
from jef_daemon.messages import MOST_NESTED
from jef_daemon.run.boundary import JobInput, failed, is_blocking, perform, perform_blocking

Does = Callable[[ExecutionContext[Any]], Any]


class Settings(BaseModel):
    source: str
    count: int = 1


class Blocking(ActionExecutor):
    does: Does
    Configuration = Settings

    def execute(self, context: ExecutionContext[Settings]) -> Any:
        return self.does(context)


async def _turn() -> None:
    """A task of its own: whoever awaits it gives way to the event loop."""


class Coroutine(ActionExecutor):
    does: Does
    Configuration = Settings

    async def execute(self, context: ExecutionContext[Settings]) -> Any:
        await asyncio.create_task(_turn())
        return self.does(context)


def job(**fields: Any) -> JobInput:
    return JobInput(
        **({"configuration": {"source": "a"}} | fields), execution_id="624", action="x", scratch="s"
    )


def run_both(does: Does, **fields: Any) -> Event:
    """As a plain function and as a coroutine: the outcome is the same."""
    reports: list[Any] = []

    def report(percent: int | None, message: str | None) -> None:
        reports.append((percent, message))

    blocking, coroutine = Blocking(), Coroutine()
    blocking.does = coroutine.does = does
    one = perform_blocking(blocking, job(**fields), report)
    other = asyncio.run(perform(coroutine, job(**fields), report))
    assert one is not None
    assert type(one) is type(other)
    if isinstance(one, Failed) and isinstance(other, Failed):
        assert (one.error_type, one.error_message) == (other.error_type, other.error_message)
    else:
        assert one == other
    return one


def fails(does: Does, **fields: Any) -> Failed:
    outcome = run_both(does, **fields)
    assert isinstance(outcome, Failed)
    told(outcome)
    return outcome


def told(event: Event) -> dict[str, Any]:
    """As it is told: what cannot be written is nobody's notification."""
    move = apply(Execution("624", "x", status=Status.RUNNING), event, 0.0)
    return dict(json.loads(notifications.notification(move)))


def raising(error: BaseException) -> Does:
    def does(context: ExecutionContext[Any]) -> Any:
        raise error

    return does


def answering(value: object) -> Does:
    return lambda context: value


class Starting(AsyncActionExecutor):
    identifier: object = None

    async def start(self, context: ExecutionContext[Any]) -> Any:
        return self.identifier


@pytest.mark.parametrize(
    ("identifier", "kept"),
    [(None, None), ("x-1", "x-1"), (7, "7"), ("x" * 300, "x" * 255), ("caf\udce9.mov", "caf?.mov")],
)
def test_what_was_started_elsewhere_has_an_identifier_that_can_be_told(
    identifier: object, kept: str | None
) -> None:
    """A name of a file may hold bytes that are no text: its job would have been RUNNING for ever."""
    executor = Starting()
    executor.identifier = identifier
    outcome = asyncio.run(perform(executor, job(configuration={}), lambda percent, message: None))
    assert isinstance(outcome, Launched)
    assert told(outcome).get("externalId") == kept


def test_the_seeds_four_fields() -> None:
    response = ActionExecutorResponse(
        result="done",
        execution_id="x-1",
        job_context_variables={"a": [1, None]},
        workflow_context_variables={"b": {}},
    )
    assert run_both(answering(response)) == Completed(
        result="done",
        external_id="x-1",
        job_context_variables={"a": [1, None]},
        workflow_context_variables={"b": {}},
    )


def test_no_response_is_an_empty_one() -> None:
    assert run_both(answering(None)) == Completed()


@pytest.mark.parametrize("value", [42, "done", {"result": "x"}, True, ActionExecutorResponse])
def test_nonsense_is_refused(value: object) -> None:
    """It says what was returned and what should be."""
    outcome = fails(answering(value))
    assert outcome.error_type == "ResponseRefused"
    assert (
        f"execute returned {type(value).__name__}; return an ActionExecutorResponse" in outcome.error_message
    )
    assert outcome.traceback is None


@pytest.mark.parametrize(
    "value", [object(), float("nan"), [float("inf")], {"a": {1}}, b"x", {(1, 2): 3}, "\udcff", {"\udcff": 1}]
)
@pytest.mark.parametrize("name", ["job_context_variables", "workflow_context_variables"])
def test_variables_that_are_no_json(name: str, value: Any) -> None:
    """Also those put there after validation; the field is named."""
    response = ActionExecutorResponse()
    getattr(response, name)["size"] = value
    outcome = fails(answering(response))
    assert outcome.error_type == "ResponseRefused"
    assert f"{name}.size cannot be written as JSON" in outcome.error_message


@pytest.mark.parametrize("name", ["job_context_variables", "workflow_context_variables"])
def test_variables_nest_so_deep_and_no_deeper(name: str) -> None:
    """Who reads what is told of them takes no more; brackets in texts are none."""
    response = ActionExecutorResponse()
    getattr(response, name)["x"] = nested(MOST_NESTED - 1, "[" * 300)
    assert isinstance(run_both(answering(response)), Completed)
    for levels in (MOST_NESTED, 300, 100_000):
        getattr(response, name)["x"] = nested(levels)
        outcome = fails(answering(response))
        assert outcome.error_type == "ResponseRefused"
        assert name in outcome.error_message


def nested(levels: int, value: Any = 1) -> Any:
    for _ in range(levels):
        value = [value]
    return value


def test_the_limit_of_variables() -> None:
    """Both maps together, in bytes; the limit itself is allowed."""
    response = ActionExecutorResponse(
        job_context_variables={"a": "é" * 10}, workflow_context_variables={"b": "x" * 10}
    )
    size = len('{"a": "' + "é" * 10 + '"}{"b": "' + "x" * 10 + '"}') + 10
    assert isinstance(run_both(answering(response), max_variables_bytes=size), Completed)
    outcome = fails(answering(response), max_variables_bytes=size - 1)
    assert f"the variables take {size} bytes; {size - 1} are allowed" in outcome.error_message


class Own(Exception):
    pass


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (RuntimeError("on purpose"), "RuntimeError", "on purpose"),
        (Own("x"), f"{__name__}.Own", "x"),
        (ExternalFailure("x"), "ExternalFailure", "x"),
        (KeyError("k"), "KeyError", "'k'"),
        (SystemExit(3), "SystemExit", "3"),
        (ValueError(), "ValueError", ""),
        (FileNotFoundError(2, "No such file", "a\udcff"), "FileNotFoundError", None),
        (Unspeakable(), f"{__name__}.Unspeakable", "(its text cannot be had: RuntimeError)"),
        (MemoryError(), "MemoryError", ""),
        (ExceptionGroup("many", [ValueError("a")]), "ExceptionGroup", "many (1 sub-exception)"),
    ],
)
def test_whatever_is_raised(error: BaseException, kind: str, message: str | None) -> None:
    """Type, message, and the stack of the executor's own frames."""
    outcome = fails(raising(error))
    assert outcome.error_type == kind
    assert message is None or outcome.error_message == message
    assert outcome.traceback is not None
    assert "in does" in outcome.traceback
    assert "run/boundary.py" not in outcome.traceback


def test_long_errors_are_cut() -> None:
    """The message keeps its beginning, the traceback its end."""
    outcome = fails(raising(ValueError("a" + "x" * 100_000 + "z")))
    assert outcome.error_message == "a" + "x" * 4095
    assert outcome.traceback is not None
    assert len(outcome.traceback) <= 16_385
    assert outcome.traceback.endswith("z\n")


@given(st.text())
def test_any_text_can_be_told(text: str) -> None:
    """Names of files may hold bytes that are no text; the rest of it stays readable."""
    assert told(run_both(answering(ActionExecutorResponse.model_construct(result=text))))
    error = failed(OSError(f"<{text}>"))
    assert told(error)["error"]["message"].startswith("<")


async def test_any_progress_can_be_told() -> None:
    """The same for what it tells while it runs."""
    reports: list[tuple[int | None, str | None]] = []
    executor = Coroutine()
    messages_ = ["a\udcff", 5, None, "é"]
    executor.does = lambda context: [context.progress(1, cast("Any", text)) for text in messages_] and None
    await perform(executor, job(), lambda percent, message: reports.append((percent, message)))
    assert reports == [(1, "a?"), (1, "5"), (1, None), (1, "é")]


@pytest.mark.parametrize(
    ("percent", "told_"),
    [(-5, 0), (250, 100), (25.9, 25), (float("nan"), None), (float("inf"), 100), (None, None), (0, 0)],
)
def test_progress_is_an_integer_of_0_to_100(percent: float | None, told_: int | None) -> None:
    reports: list[int | None] = []
    executor = Blocking()
    executor.does = lambda context: context.progress(percent) and None
    perform_blocking(executor, job(), lambda value, message: reports.append(value))
    assert reports == [told_]


def test_a_configuration_that_the_model_refuses() -> None:
    """Before `execute` is called; every field is named."""
    called: list[Any] = []
    outcome = fails(called.append, configuration={"count": "many"})
    assert outcome.error_type == "ConfigurationRefused"
    assert "source: Field required" in outcome.error_message
    assert "count: " in outcome.error_message
    assert (called, outcome.traceback) == ([], None)


def test_what_the_executor_is_given() -> None:
    """The validated model, the job's names, the variables, read-only."""
    seen: list[ExecutionContext[Any]] = []
    run_both(
        seen.append,
        configuration={"source": "a", "count": "2"},
        workflow_id="w",
        attempt=3,
        job_context_variables={"a": 1},
        workflow_context_variables={"b": 2},
    )
    for context in seen:
        assert context.configuration == Settings(source="a", count=2)
        assert (context.execution_id, context.workflow_id, context.attempt) == ("624", "w", 3)
        assert (context.job_context_variables["a"], context.workflow_context_variables["b"]) == (1, 2)
        with pytest.raises(TypeError):
            cast("Any", context.job_context_variables)["a"] = 2


async def test_our_cancellation_goes_through() -> None:
    """It is the daemon's word, not the executor's failure."""
    started = asyncio.Event()

    class Sleeps(ActionExecutor):
        async def execute(self, context: ExecutionContext[Any]) -> None:
            started.set()
            await asyncio.Event().wait()  # for ever

    task = asyncio.create_task(perform(Sleeps(), job(), lambda percent, message: None))
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_an_executor_that_cancels_itself_fails() -> None:
    """Nobody asked for it, so it is FAILED and not CANCELLED."""
    executor = Coroutine()
    executor.does = raising(asyncio.CancelledError())
    outcome = await perform(executor, job(), lambda percent, message: None)
    assert isinstance(outcome, Failed)
    assert outcome.error_type.endswith("CancelledError")


def test_a_plain_function_that_returns_a_coroutine() -> None:
    """A decorator may hide that it is one: it is run to its end all the same."""

    async def answer() -> ActionExecutorResponse:
        return ActionExecutorResponse(result="awaited")

    executor = Blocking()
    executor.does = lambda context: answer()
    assert is_blocking(executor)
    assert perform_blocking(executor, job(), lambda *_: None) == Completed(result="awaited")
    assert not is_blocking(Coroutine())
