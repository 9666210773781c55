"""Looking at workflows without disturbing them: one, many, a history. For people and programs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Engine, select
from sqlalchemy.exc import DBAPIError

from jef_daemon.errors import LedgerUnavailable, NotFound
from jef_daemon.ledger import schema
from jef_daemon.ledger.opening import existing, explain, open_engine, version
from jef_daemon.lifecycle import Status
from jef_daemon.messages import timestamp
from jef_daemon.workflow.state import Run, StageState, State, decode, execution_id

_W, _H = schema.workflows.c, schema.workflow_history.c
_COLUMNS = (
    *(_W.number, _W.workflow_id, _W.key, _W.name, _W.revision, _W.status, _W.priority),
    *(_W.created_at, _W.finished_at, _W.state),
)
"""Those that the first ledgers with workflows have."""


@dataclass(frozen=True, slots=True)
class Kept:
    """A workflow as it stands."""

    number: int
    name: str
    revision: str
    state: State


@dataclass(frozen=True, slots=True)
class WorkflowEntry:
    """One line of a workflow's history."""

    at: float
    event: str
    stage: str
    """`name`, or `name.index` of a `forEach`; empty: the workflow itself."""
    actor: str
    reason: str


class WorkflowReader:
    """Reads a ledger's workflows, also while a daemon writes them.

    Raises:
        LedgerUnavailable: there is no ledger, or it cannot be read.
    """

    def __init__(self, ledger_url: str) -> None:
        self._engine: Engine = open_engine(existing(ledger_url), read_only=True)
        try:
            found = version(self._engine)
        except DBAPIError as error:
            raise LedgerUnavailable(explain(error, self._engine.url)) from None
        if found is None or found < "0006":
            raise LedgerUnavailable(
                f"{self._engine.url.database} has no workflows yet; start a daemon on it first"
            )

    def find(self, workflow_id: str) -> Kept:
        """The workflow with this id.

        Raises:
            NotFound: there is none.
        """
        with self._engine.connect() as connection:
            row = connection.execute(select(*_COLUMNS).where(_W.workflow_id == workflow_id)).first()
        if row is None:
            raise NotFound(
                f"no workflow {workflow_id} is in this ledger; `jef workflows list` shows which are"
            )
        return _kept(row)

    def page(
        self, statuses: Sequence[str], name: str | None, most: int, before: int | None = None
    ) -> tuple[list[Kept], int | None]:
        """A page, newest first, and where the next one begins (None: this was the last)."""
        query = select(*_COLUMNS).order_by(_W.number.desc()).limit(most + 1)
        if statuses:
            query = query.where(_W.status.in_(statuses))
        if name:
            query = query.where(_W.name == name)
        if before is not None:
            query = query.where(_W.number < before)
        with self._engine.connect() as connection:
            found = connection.execute(query).all()
        return [_kept(row) for row in found[:most]], found[most - 1].number if len(found) > most else None

    def history(self, workflow_id: str) -> Iterator[WorkflowEntry]:
        """What happened, in order."""
        query = select(schema.workflow_history).where(_H.workflow_id == workflow_id).order_by(_H.number)
        with self._engine.connect() as connection:
            for row in connection.execute(query):
                yield WorkflowEntry(row.at, row.event, row.stage, row.actor, row.reason)


def _kept(row: Any) -> Kept:
    try:
        state = decode(row.state)
    except ValueError as error:  # one of many is no reason not to show the others
        said = f"it cannot be read: {error}"
        state = State(row.workflow_id, row.key, Status(row.status), row.priority, message=said)
        state.created_at, state.finished_at = row.created_at, row.finished_at
    return Kept(row.number, row.name, row.revision, state)


def heading(kept: Kept) -> dict[str, Any]:
    """A workflow in short, as JSON is written."""
    state = kept.state
    return {
        "workflowId": state.workflow_id,
        "workflow": kept.name,
        "revision": kept.revision,
        "status": state.status.value,
        "progress": state.progress,
        "message": state.message,
        "priority": state.priority,
        "waitingFor": state.waiting_for,
        "cancelRequested": state.cancel_requested,
        "parent": state.parent,
        "createdAt": _told(state.created_at),
        "startedAt": _told(state.started_at),
        "finishedAt": _told(state.finished_at),
    }


def document(kept: Kept) -> dict[str, Any]:
    """All about a workflow: its stages with their jobs, its variables and who set each."""
    state = kept.state
    return heading(kept) | {
        "locks": [
            {
                "resource": held.resource,
                "mode": held.mode.value,
                "name": held.name,
                "fencingToken": held.token,
            }
            for held in state.locks
        ],
        "stages": [_stage(state, name, stage) for name, stage in state.stages.items()],
        "variables": [
            {"name": name, "value": value, "setBy": state.origins.get(name, "")}
            for name, value in sorted(state.context.items())
        ],
    }


def _stage(state: State, name: str, stage: StageState) -> dict[str, Any]:
    return {
        "name": name,
        "status": stage.phase.value,
        "error": stage.error,
        "changed": stage.configuration,
        "jobs": [
            _run(state, name, index if stage.is_list else None, run) for index, run in enumerate(stage.runs)
        ],
        "jobContextVariables": stage.job,
    }


def _run(state: State, name: str, index: int | None, run: Run) -> dict[str, Any]:
    return {
        "executionId": execution_id(state.key, name, index, run.attempt) if run.attempt else None,
        "item": run.item,
        "status": run.phase.value,
        "timedOut": run.timed_out,
        "attempt": run.attempt,
        "result": run.result,
        "error": run.error,
        "startedAt": _told(run.started_at),
        "finishedAt": _told(run.finished_at),
    }


def _told(instant: float | None) -> str | None:
    return None if instant is None else timestamp(instant)
