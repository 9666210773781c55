"""Looks at executors from a process of its own, before the daemon trusts them.

An import may fail, hang, segfault or end the interpreter. The child says a line about each executor as it
goes; the one after which it falls silent or dies is the culprit, and the rest are asked in another child.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from jef_daemon.errors import ExecutorNotLoaded
from jef_daemon.retry import RetryPolicy
from jef_daemon.run.boundary import hooks_of, is_blocking
from jef_daemon.run.catalogue import Action, ActionSpec, Catalogue, load, specs
from jef_daemon.sdk import AsyncActionExecutor
from jef_daemon.settings import Action as ActionSettings
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
        told, problem = await _ask(open_specs, python_path)
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


async def _ask(wanted: Sequence[ActionSpec], python_path: list[str]) -> tuple[dict[str, dict[str, Any]], str]:
    """Ask one child. Returns what it said, and what happened to it where it did not come to the end."""
    # However this process found its modules, the child finds them too.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        __name__,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env=environment,
    )
    if child.stdin is None or child.stdout is None:
        raise AssertionError("both are pipes")
    question = {"python_path": python_path, "specs": [asdict(spec) for spec in wanted]}
    child.stdin.write(json.dumps(question).encode())
    child.stdin.close()
    told: dict[str, dict[str, Any]] = {}
    problem = ""
    try:
        for _ in wanted:
            line = await asyncio.wait_for(child.stdout.readline(), _EACH_S)
            if not line:
                problem = "ended the interpreter"
                break
            answer = json.loads(line)
            told[answer.pop("name")] = answer
    except TimeoutError:
        problem = f"took longer than {_EACH_S:g} s"
    finally:
        if child.returncode is None:
            child.kill()
        await child.wait()
    return told, problem


def describe(spec: ActionSpec) -> dict[str, Any]:
    """What the daemon needs to know of an executor, as JSON."""
    try:
        executor = load(spec)
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
            "schema": executor.Configuration.model_json_schema(),
            "description": inspect.cleandoc(type(executor).__doc__ or "").partition("\n")[0],
        }
    except ExecutorNotLoaded as error:
        return {"name": spec.name, "problem": str(error)}


def main() -> None:
    """Answer for each executor on the original standard output; whatever imports print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    question = json.load(sys.stdin)
    sys.path[:0] = question["python_path"]
    for fields in question["specs"]:
        answers.write(json.dumps(describe(ActionSpec(**fields))) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
