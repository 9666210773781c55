"""Looks at executors from a process of its own, before the daemon trusts them.

An import may fail, hang, segfault or end the interpreter. The child tells of each executor as it goes; the one
after which it falls silent or dies is the culprit, and the rest are asked in another child.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import signal
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from pydantic import BaseModel
from pydantic.errors import PydanticUserError

from jef_daemon.errors import ExecutorNotLoaded
from jef_daemon.retry import RetryPolicy
from jef_daemon.run.boundary import hooks_of, is_blocking
from jef_daemon.run.catalogue import Action, ActionSpec, Catalogue, load, specs
from jef_daemon.run.forking import context
from jef_daemon.sdk import ActionExecutor, AsyncActionExecutor
from jef_daemon.sections import Action as ActionSettings
from jef_daemon.settings import Settings

_EACH_S = 30.0
"""Longest time for one executor to import."""


async def examine(settings: Settings) -> Catalogue:
    """Find all actions and look at each executor; nothing of theirs is imported here."""
    found = specs(settings)
    python_path = [str(path) for path in settings.python_path]
    answers: dict[str, dict[str, Any]] = {}
    open_specs = list(found.values())
    while open_specs:
        told, problem = await _ask(open_specs, python_path, settings.tracing.is_wanted)
        answers |= told
        open_specs = [spec for spec in open_specs if spec.name not in answers]
        if problem and open_specs:
            culprit = open_specs.pop(0)
            answers[culprit.name] = {
                "problem": f"actions.{culprit.name}: importing {culprit.executor} {problem}"
            }
    return Catalogue({name: _action(spec, answers[name], settings) for name, spec in found.items()})


def _action(spec: ActionSpec, answer: dict[str, Any], settings: Settings) -> Action:
    configured = settings.actions.get(spec.name)
    action = Action(spec, problem=answer.get("problem", ""))
    if action.problem:
        return action
    action.is_blocking = answer["is_blocking"]
    action.schema = answer["schema"]
    action.description = answer["description"]
    action.may_run_again = answer["may_run_again"]
    for key in ("is_async", "hooks", "cancellable", "update_timeout_s", "scope"):
        setattr(action, key, answer[key])
    action.execution_timeout_s = settings.jobs.execution_timeout_s
    action.retry = RetryPolicy(attempts=answer["retry_attempts"])
    if configured is not None:
        _override(action, configured)
    return action


def _override(action: Action, configured: ActionSettings) -> None:
    """What the operator says wins over what the executor's author says."""
    action.concurrency = configured.concurrency
    action.is_blocking = action.is_blocking or configured.isolation == "process"
    for key in ("may_run_again", "cancellable", "execution_timeout_s", "update_timeout_s"):
        if (value := getattr(configured, key)) is not None:
            setattr(action, key, value)
    for key in ("timeout_grace_s", "queue_timeout_s", "lock_timeout_s"):
        setattr(action, key, getattr(configured, key))
    retry = configured.retry
    action.retry = RetryPolicy(
        attempts=retry.attempts or action.retry.attempts,
        first_s=retry.first_s,
        factor=retry.factor,
        most_s=retry.most_s,
        jitter=retry.jitter,
        not_on=frozenset(retry.not_on),
        on_timeout=retry.on_timeout,
    )


async def _ask(
    wanted: Sequence[ActionSpec], python_path: list[str], is_traced: bool
) -> tuple[dict[str, dict[str, Any]], str]:
    """Ask one child. Returns what it said, and what happened to it where it did not come to the end."""
    processes = context(is_traced)
    answers, theirs = processes.Pipe(duplex=False)
    child = processes.Process(target=_tell, args=(theirs, wanted, python_path), name="probe")
    try:
        # In a thread: who asks first waits until the fork server is there.
        return await asyncio.to_thread(_converse, child, answers, theirs, wanted)
    except asyncio.CancelledError:
        if child.pid is not None:
            child.kill()  # which ends the thread, too
        raise


def _converse(
    child: BaseProcess, answers: Connection, theirs: Connection, wanted: Sequence[ActionSpec]
) -> tuple[dict[str, dict[str, Any]], str]:
    told: dict[str, dict[str, Any]] = {}
    with answers:
        child.start()
        theirs.close()
        try:
            for _ in wanted:
                if not answers.poll(_EACH_S):
                    return told, f"took longer than {_EACH_S:g} s"
                answer = json.loads(answers.recv_bytes())
                told[answer.pop("name")] = answer
        except (EOFError, OSError):
            return told, "ended the interpreter"
        finally:
            child.kill()
            child.join()
    return told, ""


def describe(spec: ActionSpec) -> dict[str, Any]:
    """What the daemon needs to know of an executor, as JSON."""
    try:
        executor, where = load(spec), f"actions.{spec.name}"
        _check(executor, where)
        _check_program(executor, where)
        schema = _schema(executor, where)
        return {
            "name": spec.name,
            "is_blocking": is_blocking(executor),
            "may_run_again": executor.may_run_again,
            "is_async": isinstance(executor, AsyncActionExecutor),
            "hooks": hooks_of(executor),
            "cancellable": executor.cancellable,
            "update_timeout_s": getattr(executor, "update_timeout_s", None),
            "retry_attempts": executor.retry_attempts,
            "scope": executor.scope,
            "schema": schema,
            "description": inspect.cleandoc(type(executor).__doc__ or "").strip().partition("\n")[0],
        }
    except ExecutorNotLoaded as error:
        return {"name": spec.name, "problem": str(error)}


def _check(executor: ActionExecutor, where: str) -> None:
    """Whether it has a method that can do the work.

    Raises:
        ExecutorNotLoaded: it has none; each of its jobs would fail.
    """
    kind = type(executor)
    base, name = (
        (AsyncActionExecutor, "start")
        if isinstance(executor, AsyncActionExecutor)
        else (ActionExecutor, "execute")
    )
    if getattr(kind, name) is getattr(base, name):
        raise ExecutorNotLoaded(f"{where}: {kind.__name__} has no method {name}; write it: it does the work")
    method = getattr(executor, name)
    if inspect.isgeneratorfunction(method) or inspect.isasyncgenfunction(method):
        raise ExecutorNotLoaded(
            f"{where}: {kind.__name__}.{name} yields, so that nothing of it would run; return a response, "
            "and tell progress by context.progress()"
        )
    try:
        inspect.signature(method).bind(None)
    except TypeError as error:
        raise ExecutorNotLoaded(
            f"{where}: {kind.__name__}.{name} cannot be called with the context alone ({error}); "
            f"write {name}(self, context)"
        ) from None


def _check_program(executor: ActionExecutor, where: str) -> None:
    """Whether a command's program is there.

    Raises:
        ExecutorNotLoaded: it is not; each job that this daemon takes would fail, though another one may have it.
    """
    # Here, in the child: the daemon itself needs it for its first command only.
    from jef_daemon.actions.command import Command

    if isinstance(executor, Command) and (said := executor.lacks()):
        raise ExecutorNotLoaded(f"{where}: {said}")


def _schema(executor: ActionExecutor, where: str) -> dict[str, Any]:
    """Of its configuration.

    Raises:
        ExecutorNotLoaded: it has none; each of its jobs would fail.
    """
    kind, model = type(executor), executor.Configuration
    if not (inspect.isclass(model) and issubclass(model, BaseModel)):
        raise ExecutorNotLoaded(
            f"{where}: {kind.__name__}.Configuration is no pydantic model; write class Configuration(BaseModel)"
        )
    try:
        return model.model_json_schema()
    except PydanticUserError as error:
        raise ExecutorNotLoaded(
            f"{where}: {kind.__name__}.Configuration has no JSON Schema: {error.message}"
        ) from None


def _tell(answers: Connection, wanted: Sequence[ActionSpec], python_path: list[str]) -> None:
    """In the child: answer for each executor; whatever imports print goes to stderr."""
    os.dup2(2, 1)
    # Ctrl-C at a terminal is the daemon's to answer.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.path[:0] = [path for path in python_path if path not in sys.path]
    for spec in wanted:
        answers.send_bytes(json.dumps(describe(spec)).encode())
