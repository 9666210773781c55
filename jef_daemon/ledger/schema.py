"""The tables. One row per execution and its request, an append-only history, an outbox.

Times are UTC seconds since the epoch. The columns of `executions` are the fields of `lifecycle.Execution`,
in its order, so that a row is an execution. Every change of this file needs a migration beside it
(`migrations/versions`); a test compares the two.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from sqlalchemy import (
    Boolean,
    Column,
    Double,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    text,
)
from sqlalchemy.types import TypeEngine

from jef_daemon.lifecycle import Execution

HEAD = "0001"
"""The newest migration. A ledger at this version needs no migration tool to be opened."""

metadata = MetaData()

_TYPES: dict[str, type[TypeEngine[Any]]] = {
    "str": Text,
    "str | None": Text,
    "Status": String,
    "int": Integer,
    "bool": Boolean,
    "float | None": Double,
}

executions = Table(
    "executions",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=True),
    *(
        Column(
            field.name,
            _TYPES[str(field.type)],
            nullable="None" in str(field.type),
            unique=True if field.name == "execution_id" else None,
        )
        for field in dataclasses.fields(Execution)
    ),
)

_waiting = text("status = 'QUEUED'")
Index(
    "executions_ready",
    executions.c.action,
    executions.c.priority.desc(),
    executions.c.number,
    sqlite_where=_waiting,
    postgresql_where=_waiting,
)
Index("executions_by_status", executions.c.status, executions.c.number)
for _column in (executions.c.workflow_id, executions.c.external_id, executions.c.finished_at):
    _known = _column.is_not(None)
    Index(f"executions_by_{_column.name}", _column, sqlite_where=_known, postgresql_where=_known)

requests = Table(
    "requests",
    metadata,
    Column("execution_id", Text, primary_key=True),
    Column("body", Text, nullable=False, comment="as it came, unknown keys included"),
)

outcomes = Table(
    "outcomes",
    metadata,
    Column("execution_id", Text, primary_key=True),
    Column("notification", LargeBinary, nullable=False, comment="the final one, told again to a duplicate"),
)

history = Table(
    "history",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("execution_id", Text, nullable=False),
    Column("at", Double, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("sequence", Integer, nullable=False),
    Column("before", String, nullable=False, comment="place in the transition table"),
    Column("status", String, nullable=False),
    Column("event", String, nullable=False),
    Column("actor", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("detail", Text, comment="JSON: error and stack trace, result, what it waits for"),
)
Index("history_by_execution", history.c.execution_id, history.c.number)

outbox = Table(
    "outbox",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("exchange", Text, nullable=False),
    Column("routing_key", Text, nullable=False),
    Column("body", LargeBinary, nullable=False),
    Column("headers", Text, comment="JSON"),
    Column("correlation_id", Text),
    Column("reply_to", Text),
)
