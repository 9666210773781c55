"""What an executor is given for a call, from what the ledger has of its execution.

Part in the flow: the worker asks here for each attempt that it starts, `outside` for each call that is due. What the
executor sees of it is the boundary's.
"""

from __future__ import annotations

from typing import Protocol

from jef_daemon.lifecycle import Execution
from jef_daemon.messages import JobRequest
from jef_daemon.ports import Claimed
from jef_daemon.run.boundary import JobInput
from jef_daemon.run.catalogue import Action
from jef_daemon.sdk import GrantedLock
from jef_daemon.settings import Settings
from jef_daemon.traceparent import given


class Checkpoints(Protocol):
    """Where executors' checkpoints are."""

    async def saved(self, execution_id: str) -> str | None:
        """The last checkpoint of an execution, as JSON."""
        ...


class Inputs:
    """Makes inputs.

    Args:
        ledger: has the checkpoints.
        settings: limits, folders.
        identity: the ledger's own name: a part of every token, so that updates find it.
    """

    def __init__(self, ledger: Checkpoints, settings: Settings, identity: str = "") -> None:
        self._ledger = ledger
        self._settings = settings
        self._identity = identity
        self._is_traced = settings.tracing.is_wanted
        self._scratch_root = str(settings.scratch_dir.absolute())

    async def of(self, claimed: Claimed, action: Action, call: str = "execute") -> JobInput:
        """The input of a call; the method that is called, by its name."""
        execution = claimed.execution
        request = JobRequest.model_validate_json(claimed.body)
        held = [(lock.resource, lock.mode.value, lock.fencing_token) for lock in request.workflow_locks]
        may_have_saved = action.is_async or execution.attempt > 1
        return JobInput(
            execution_id=execution.execution_id,
            workflow_id=execution.workflow_id,
            action=execution.action,
            attempt=execution.attempt,
            configuration=request.configuration,
            job_context_variables=request.job_context_variables,
            workflow_context_variables=request.workflow_context_variables,
            scratch=self.scratch(execution),
            locks={grant[0]: GrantedLock(*grant) for grant in (*held, *claimed.grants)},
            max_variables_bytes=self._settings.jobs.max_variables_bytes,
            call=call,
            token=f"{self._identity}.{execution.token}",
            external_id=execution.external_id,
            saved=await self._ledger.saved(execution.execution_id) if may_have_saved else None,
            traceparent=given(execution, is_traced=self._is_traced) if execution.traceparent else None,
            is_traced=self._is_traced,
        )

    def scratch(self, execution: Execution) -> str:
        """The scratch folder of an attempt."""
        # An execution id may be "..": the prefix and the attempt keep that from meaning anything.
        return f"{self._scratch_root}/job-{execution.execution_id}-{execution.attempt}"
