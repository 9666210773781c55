"""What was refused, in the history of its execution: the first hundred times.

Whoever repeats what is refused, with an old token, or by mistake in a loop, would fill the disk. Later refusals are
answered and counted as before, and no more recorded.
"""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy import Connection, bindparam, func, select

from jef_daemon.events import Event
from jef_daemon.ledger import rows, schema
from jef_daemon.lifecycle import Execution

MOST = 100
"""Refusals that the history of one execution holds, of all its attempts together."""

_LAST = "; it is the last one that is recorded, what is refused from now on is only counted"
_RECORDED = (
    select(func.count())
    .select_from(schema.history)
    .where(
        schema.history.c.execution_id == bindparam("key"),
        schema.history.c.event.like(f"%{rows.REFUSED}"),
    )
)


class Refusals:
    """Of one transaction.

    Args:
        connection: the transaction's.
        now: UTC seconds since the epoch.
        remember: adds a line to a history.
    """

    def __init__(self, connection: Connection, now: float, remember: Callable[[rows.Row], None]) -> None:
        self._connection = connection
        self._now = now
        self._remember = remember
        self._recorded: dict[str, int] = {}
        """How many the history of an execution has, with those of this transaction."""

    def note(self, execution: Execution, event: Event, why: str) -> None:
        """Record that an event changed nothing, and why."""
        name = execution.execution_id
        recorded = self._recorded.get(name)
        if recorded is None:
            recorded = self._connection.execute(_RECORDED, {"key": name}).scalar_one()
        if recorded < MOST:
            recorded += 1
            told = why + _LAST if recorded == MOST else why
            self._remember(rows.refusal_entry(execution, event, told, self._now))
        self._recorded[name] = recorded
