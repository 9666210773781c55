"""Executors that write to the store with the fencing numbers of their locks, at their beginning and at their end."""

from __future__ import annotations

import asyncio
import os
import time
from typing import Any

from pydantic import BaseModel

from jef_daemon import ActionExecutor, ExecutionContext
from tests.support.store import hold


class Seconds(BaseModel):
    seconds: float = 0.01


def _hold(what: str, context: ExecutionContext[Any]) -> None:
    locks = {lock.resource: (lock.mode, lock.fencing_token) for lock in context.locks.values()}
    job = os.environ["JEF_TEST_HOLDER"], context.execution_id, context.attempt
    hold(what, *job, locks, os.environ["JEF_TEST_STORE"])


class Writes(ActionExecutor):
    """In the event loop; may run again."""

    action = "writes"
    Configuration = Seconds
    may_run_again = True

    async def execute(self, context: ExecutionContext[Seconds]) -> None:
        _hold("begin", context)
        await asyncio.sleep(context.configuration.seconds)
        _hold("end", context)


class WritesOnce(Writes):
    """The same, but what is interrupted has failed."""

    action = "writes-once"
    may_run_again = False


class BlockingWrites(ActionExecutor):
    """In a process of its own; may run again."""

    action = "blocking-writes"
    Configuration = Seconds
    may_run_again = True

    def execute(self, context: ExecutionContext[Seconds]) -> None:
        _hold("begin", context)
        time.sleep(context.configuration.seconds)
        _hold("end", context)


ACTIONS = """
[actions.writes]
executor = "tests.support.lockers:Writes"
[actions.writes-once]
executor = "tests.support.lockers:WritesOnce"
[actions.blocking-writes]
executor = "tests.support.lockers:BlockingWrites"
[actions.command-writes]
command = ["{python}", "-SE", "{store}", "{{configuration.seconds}}", "{{configuration.modes}}"]
inherit_environment = ["JEF_TEST_HOLDER", "JEF_TEST_STORE"]
may_run_again = true
"""
