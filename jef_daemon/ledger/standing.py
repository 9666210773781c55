"""How much stands where in a ledger: numbers for who watches it, read without taking its write lock."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import Engine, func, select

from jef_daemon.ledger import schema
from jef_daemon.lifecycle import SETTLED, Status

_EX, _GRANTS = schema.executions.c, schema.lock_grants.c
_OPEN = [status.value for status in Status if status not in SETTLED and status is not Status.FAILED]
_OLDEST = select(schema.outbox.c.at).where(
    schema.outbox.c.id == select(func.min(schema.outbox.c.id)).scalar_subquery()
)
"""Messages are confirmed in any order and numbered in the order of time: a look at the first, however many wait."""
_JOBS = (
    select(_EX.action, _EX.status, func.count())
    .where(_EX.status.in_(_OPEN), _EX.handed_back.is_(False), _EX.fenced.is_(False))
    .group_by(_EX.action, _EX.status)
)
_WF = schema.workflows.c
_WORKFLOWS = (
    select(_WF.status, func.count())
    .where(_WF.status.in_([Status.QUEUED.value, Status.WAITING_FOR_LOCK.value, Status.RUNNING.value]))
    .group_by(_WF.status)
)


@dataclass(frozen=True, slots=True)
class Standing:
    """Numbers of one moment."""

    jobs: Mapping[tuple[str, str], int]
    """Executions that are not over, by action and status."""
    outbox: int
    """Messages that no broker has confirmed yet."""
    outbox_age_s: float
    """Seconds since the first of them was put in; 0 where there is none."""
    locks_held: Mapping[str, int]
    """Grants of the lock service that is kept here, by mode."""
    lock_waiters: int
    """Requests that wait there."""
    workflows: Mapping[str, int]
    """Workflows of the coordinator that is kept here and are not over, by status."""


def read(engine: Engine, now: float) -> Standing:
    """Count.

    Args:
        engine: for looking.
        now: UTC seconds since the epoch.
    """
    with engine.connect() as connection:
        return Standing(
            jobs={(row[0], row[1]): row[2] for row in connection.execute(_JOBS)},
            outbox=connection.scalar(select(func.count()).select_from(schema.outbox)) or 0,
            outbox_age_s=max(0.0, now - (connection.scalar(_OLDEST) or now)),
            locks_held={
                row[0]: row[1]
                for row in connection.execute(select(_GRANTS.mode, func.count()).group_by(_GRANTS.mode))
            },
            lock_waiters=connection.scalar(select(func.count()).select_from(schema.lock_waiters)) or 0,
            workflows={row[0]: row[1] for row in connection.execute(_WORKFLOWS)},
        )
