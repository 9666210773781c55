"""The tables. One row per execution and its request, an append-only history, an outbox; the locks.

Times are UTC seconds since the epoch. The columns of `executions` are the fields of `lifecycle.Execution`,
in its order, so that a row is an execution. Every change of this file needs a migration beside it
(`migrations/versions`); a test compares the two.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from sqlalchemy import (
    BigInteger,
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
    false,
    text,
)
from sqlalchemy.types import TypeEngine

from jef_daemon.lifecycle import Execution

HEAD = "0007"
"""The newest migration. A ledger at this version needs no migration tool to be opened."""

metadata = MetaData()

_DEFAULTS: dict[str, Any] = {"outside": false(), "max_attempts": text("1"), "timeout_grace_s": text("300")}
"""Of columns that came with a later migration: what they are for executions from before it."""

_TYPES: dict[str, type[TypeEngine[Any]]] = {
    "str": Text,
    "str | None": Text,
    "Status": String,
    "int": Integer,
    "bool": Boolean,
    "float": Double,
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
            server_default=_DEFAULTS.get(field.name),
        )
        for field in dataclasses.fields(Execution)
    ),
)

# Exactly what a claim looks for: those that wait for locks, or went to another daemon, would have to be passed over.
_ready = "status = 'QUEUED' AND handed_back IS {0} AND wants_locks IS {0}"
Index(
    "executions_ready",
    executions.c.action,
    executions.c.priority.desc(),
    executions.c.number,
    sqlite_where=text(_ready.format(0)),
    postgresql_where=text(_ready.format("false")),
)
Index("executions_by_status", executions.c.status, executions.c.number)
for _column in (executions.c.workflow_id, executions.c.external_id, executions.c.finished_at):
    _known = _column.is_not(None)
    Index(f"executions_by_{_column.name}", _column, sqlite_where=_known, postgresql_where=_known)

_is_watched = text("update_deadline IS NOT NULL")
Index(
    "executions_by_deadline",
    executions.c.update_deadline,
    sqlite_where=_is_watched,
    postgresql_where=_is_watched,
)

_is_due = "due_at IS NOT NULL AND handed_back IS {0}"
Index(
    "executions_by_due_time",
    executions.c.due_at,
    sqlite_where=text(_is_due.format(0)),
    postgresql_where=text(_is_due.format("false")),
)

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
    Column("at", Double, comment="when it was put in; NULL: by a version that did not say"),
)

tombstones = Table(
    "tombstones",
    metadata,
    Column("kind", String, primary_key=True, comment="execution or workflow"),
    Column("name", Text, primary_key=True),
    Column("until", Double, nullable=False),
    Column("actor", Text, nullable=False),
    Column("reason", Text, nullable=False),
)
"""Cancels for what is not known yet: applied when it arrives."""
Index("tombstones_by_age", tombstones.c.until)

checkpoints = Table(
    "checkpoints",
    metadata,
    Column("execution_id", Text, primary_key=True),
    Column("data", Text, nullable=False, comment="JSON, the executor's own"),
)
"""What an executor saved to go on from; kept until the execution is COMPLETED, CANCELLED or purged."""

calls = Table(
    "calls",
    metadata,
    Column("execution_id", Text, primary_key=True),
    Column("call", String, primary_key=True, comment="poll, cancel or resume"),
    Column("at", Double, nullable=False, comment="when it is due"),
    Column("number", Integer, nullable=False, comment="how often it was made"),
    Column("attempt", Integer, comment="the one that is meant, where it has ended; NULL: the current one"),
    Column("external_id", Text, comment="of that attempt"),
)
"""Calls that async executors are due: of those whose work runs outside."""
Index("calls_by_time", calls.c.at)

identity = Table("identity", metadata, Column("id", Text, primary_key=True))
"""One row: the ledger's own name. A lock service keeps its locks under it, a daemon has its answers sent to it."""

# --- workflows ---------------------------------------------------------------------------------------------

workflows = Table(
    "workflows",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("workflow_id", Text, nullable=False, unique=True),
    Column("key", Text, nullable=False, unique=True, comment="begins the execution ids of its jobs"),
    Column("name", Text, nullable=False, comment="of its definition"),
    Column("revision", String, nullable=False),
    Column("status", String, nullable=False),
    Column("priority", Integer, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("updated_at", Double, nullable=False),
    Column("finished_at", Double),
    Column("state", Text, nullable=False, comment="JSON: workflow.state.State"),
    Column("due_at", Double, comment="when its wait for locks is over"),
)
Index("workflows_by_status", workflows.c.status, workflows.c.number)
Index("workflows_by_name", workflows.c.name, workflows.c.number)
_in_turn = (workflows.c.name, workflows.c.priority.desc(), workflows.c.number)
for _word in ("QUEUED", "WAITING_FOR_LOCK", "RUNNING"):
    _is_so = text(f"status = '{_word}'")
    Index(f"workflows_{_word.lower()}", *_in_turn, sqlite_where=_is_so, postgresql_where=_is_so)
for _word, _column in (("end", workflows.c.finished_at), ("due_time", workflows.c.due_at)):
    _known = _column.is_not(None)
    Index(f"workflows_by_{_word}", _column, sqlite_where=_known, postgresql_where=_known)

workflow_definitions = Table(
    "workflow_definitions",
    metadata,
    Column("revision", String, primary_key=True),
    Column("name", Text, nullable=False),
    Column("body", Text, nullable=False, comment="JSON: workflow.definition.Definition"),
    Column("used_at", Double, nullable=False, comment="when a workflow was last pinned to it"),
)

workflow_history = Table(
    "workflow_history",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("workflow_id", Text, nullable=False),
    Column("at", Double, nullable=False),
    Column("event", String, nullable=False),
    Column("stage", Text, nullable=False, comment="empty: the workflow itself"),
    Column("actor", Text, nullable=False),
    Column("reason", Text, nullable=False),
)
Index("workflow_history_by_workflow", workflow_history.c.workflow_id, workflow_history.c.number)

# --- what the lock service keeps ---------------------------------------------------------------------------

lock_grants = Table(
    "lock_grants",
    metadata,
    Column("resource", Text, primary_key=True),
    Column("owner", Text, primary_key=True),
    Column("mode", String, nullable=False),
    Column("fencing_token", BigInteger, nullable=False),
    Column("lease_until", Double, nullable=False),
    Column("granted_at", Double, nullable=False),
    Column("reply_to", Text),
    Column("correlation_id", Text),
)
Index("lock_grants_by_owner", lock_grants.c.owner, lock_grants.c.resource)
Index("lock_grants_by_age", lock_grants.c.resource, lock_grants.c.fencing_token)
Index("lock_grants_by_lease", lock_grants.c.lease_until, lock_grants.c.resource, lock_grants.c.owner)

lock_waiters = Table(
    "lock_waiters",
    metadata,
    Column("ticket", BigInteger, primary_key=True, autoincrement=False),
    Column("owner", Text, nullable=False, unique=True),
    Column("locks", Text, nullable=False, comment="JSON: [[resource, mode], ...]"),
    Column("reply_to", Text),
    Column("correlation_id", Text),
    Column("asked_at", Double, nullable=False),
    Column("wait_until", Double, nullable=False),
    Column("lease_s", Double, nullable=False),
    Column("blocked_at", Text, nullable=False),
    Column("overtaken", Integer, nullable=False),
    Column("firm", Boolean, nullable=False),
)
Index("lock_waiters_by_lease", lock_waiters.c.wait_until, lock_waiters.c.ticket)

lock_wants = Table(
    "lock_wants",
    metadata,
    Column("resource", Text, primary_key=True),
    Column("ticket", BigInteger, primary_key=True, autoincrement=False),
    Column("mode", String, nullable=False),
    Column("firm", Boolean, nullable=False),
    Column("blocked", Boolean, nullable=False, comment="the waiter's blocked_at is this resource"),
)
_of_mode = (lock_wants.c.resource, lock_wants.c.mode, lock_wants.c.ticket)
Index("lock_wants_by_mode", *_of_mode)
for _name in ("firm", "blocked"):
    _is_so = text(_name)
    Index(f"lock_wants_{_name}", *_of_mode, sqlite_where=_is_so, postgresql_where=_is_so)

lock_resources = Table(
    "lock_resources",
    metadata,
    Column("resource", Text, primary_key=True),
    Column("fence", BigInteger, nullable=False, comment="the last fencing number; kept for ever"),
    Column("waiting", Integer, nullable=False),
)
_has_waiters = text("waiting > 0")
Index(
    "lock_resources_waited_for",
    lock_resources.c.resource,
    sqlite_where=_has_waiters,
    postgresql_where=_has_waiters,
)

lock_history = Table(
    "lock_history",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("at", Double, nullable=False),
    Column("resource", Text, nullable=False),
    Column("owner", Text, nullable=False),
    Column("event", String, nullable=False),
    Column("mode", String, nullable=False),
    Column("fencing_token", BigInteger),
    Column("reason", Text, nullable=False),
)
Index("lock_history_by_resource", lock_history.c.resource, lock_history.c.number)
Index("lock_history_by_age", lock_history.c.at)

# --- what this daemon's jobs asked of a lock service -------------------------------------------------------

job_locks = Table(
    "job_locks",
    metadata,
    Column("execution_id", Text, primary_key=True),
    Column("action", Text, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("number", Integer, nullable=False, comment="of the request"),
    Column("locks", Text, nullable=False, comment="JSON: [[resource, mode], ...]"),
    Column("state", String, nullable=False, comment="see ledger.job_locks"),
    Column("at", Double, nullable=False, comment="what it means depends on the state"),
    Column("grants", Text, comment="JSON: [[resource, mode, fencing token], ...]"),
    Column("place", Text, comment="JSON: what was last told of the queue"),
)
Index("job_locks_by_time", job_locks.c.state, job_locks.c.at)
Index("job_locks_by_state", job_locks.c.state, job_locks.c.execution_id)
_is_granted = text("state = 'granted'")
Index("job_locks_granted", job_locks.c.action, sqlite_where=_is_granted, postgresql_where=_is_granted)
