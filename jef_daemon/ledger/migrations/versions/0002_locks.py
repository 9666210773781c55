"""The ledger's name; locks, waiters, fencing numbers; what jobs asked of a lock service."""

import json
import uuid

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the tables of locks."""
    identity = op.create_table("identity", sa.Column("id", sa.Text(), primary_key=True))
    op.bulk_insert(identity, [{"id": uuid.uuid4().hex[:12]}])
    op.create_table(
        "lock_grants",
        sa.Column("resource", sa.Text(), primary_key=True),
        sa.Column("owner", sa.Text(), primary_key=True),
        sa.Column("mode", sa.String(), nullable=False),
        sa.Column("fencing_token", sa.BigInteger(), nullable=False),
        sa.Column("lease_until", sa.Double(), nullable=False),
        sa.Column("granted_at", sa.Double(), nullable=False),
        sa.Column("reply_to", sa.Text()),
        sa.Column("correlation_id", sa.Text()),
    )
    op.create_index("lock_grants_by_owner", "lock_grants", ["owner", "resource"])
    op.create_index("lock_grants_by_age", "lock_grants", ["resource", "fencing_token"])
    op.create_index("lock_grants_by_lease", "lock_grants", ["lease_until", "resource", "owner"])
    op.create_table(
        "lock_waiters",
        sa.Column("ticket", sa.BigInteger(), primary_key=True, autoincrement=False),
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("locks", sa.Text(), nullable=False, comment="JSON: [[resource, mode], ...]"),
        sa.Column("reply_to", sa.Text()),
        sa.Column("correlation_id", sa.Text()),
        sa.Column("asked_at", sa.Double(), nullable=False),
        sa.Column("wait_until", sa.Double(), nullable=False),
        sa.Column("lease_s", sa.Double(), nullable=False),
        sa.Column("blocked_at", sa.Text(), nullable=False),
        sa.Column("overtaken", sa.Integer(), nullable=False),
        sa.Column("firm", sa.Boolean(), nullable=False),
        sa.UniqueConstraint("owner"),
    )
    op.create_index("lock_waiters_by_lease", "lock_waiters", ["wait_until", "ticket"])
    op.create_table(
        "lock_wants",
        sa.Column("resource", sa.Text(), primary_key=True),
        sa.Column("ticket", sa.BigInteger(), primary_key=True, autoincrement=False),
        sa.Column("mode", sa.String(), nullable=False),
        sa.Column("firm", sa.Boolean(), nullable=False),
        sa.Column("blocked", sa.Boolean(), nullable=False, comment="the waiter's blocked_at is this resource"),
    )
    of_mode = ["resource", "mode", "ticket"]
    op.create_index("lock_wants_by_mode", "lock_wants", of_mode)
    for name in ("firm", "blocked"):
        where = sa.text(name)
        op.create_index(f"lock_wants_{name}", "lock_wants", of_mode, sqlite_where=where, postgresql_where=where)
    op.create_table(
        "lock_resources",
        sa.Column("resource", sa.Text(), primary_key=True),
        sa.Column("fence", sa.BigInteger(), nullable=False, comment="the last fencing number; kept for ever"),
        sa.Column("waiting", sa.Integer(), nullable=False),
    )
    where = sa.text("waiting > 0")
    op.create_index(
        "lock_resources_waited_for", "lock_resources", ["resource"], sqlite_where=where, postgresql_where=where
    )
    op.create_table(
        "lock_history",
        sa.Column("number", sa.Integer(), primary_key=True, autoincrement=True),
        sa.Column("at", sa.Double(), nullable=False),
        sa.Column("resource", sa.Text(), nullable=False),
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("event", sa.String(), nullable=False),
        sa.Column("mode", sa.String(), nullable=False),
        sa.Column("fencing_token", sa.BigInteger()),
        sa.Column("reason", sa.Text(), nullable=False),
    )
    op.create_index("lock_history_by_resource", "lock_history", ["resource", "number"])
    op.create_index("lock_history_by_age", "lock_history", ["at"])
    job_locks = op.create_table(
        "job_locks",
        sa.Column("execution_id", sa.Text(), primary_key=True),
        sa.Column("action", sa.Text(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False, comment="of the request"),
        sa.Column("locks", sa.Text(), nullable=False, comment="JSON: [[resource, mode], ...]"),
        sa.Column("state", sa.String(), nullable=False, comment="see ledger.job_locks"),
        sa.Column("at", sa.Double(), nullable=False, comment="what it means depends on the state"),
        sa.Column("grants", sa.Text(), comment="JSON: [[resource, mode, fencing token], ...]"),
        sa.Column("place", sa.Text(), comment="JSON: what was last told of the queue"),
    )
    op.create_index("job_locks_by_time", "job_locks", ["state", "at"])
    op.create_index("job_locks_by_state", "job_locks", ["state", "execution_id"])
    where = sa.text("state = 'granted'")
    op.create_index("job_locks_granted", "job_locks", ["action"], sqlite_where=where, postgresql_where=where)
    op.drop_index("executions_ready", "executions")
    ready = "status = 'QUEUED' AND handed_back IS {0} AND wants_locks IS {0}"
    op.create_index(
        "executions_ready",
        "executions",
        ["action", sa.text("priority DESC"), "number"],
        sqlite_where=sa.text(ready.format(0)),
        postgresql_where=sa.text(ready.format("false")),
    )
    _ask_for_those_that_wait(job_locks)


def _ask_for_those_that_wait(job_locks: sa.Table) -> None:
    """Jobs that an older version took in and that name locks: they ask as soon as the daemon runs."""
    connection = op.get_bind()
    found = connection.execute(sa.text(
        "SELECT executions.execution_id, executions.action, executions.attempt, requests.body FROM executions "
        "JOIN requests ON requests.execution_id = executions.execution_id "
        "WHERE wants_locks AND NOT handed_back AND status IN ('QUEUED', 'WAITING_FOR_LOCK')"
    )).all()
    rows = [
        {"execution_id": row[0], "action": row[1], "attempt": row[2], "number": 1, "state": "later", "at": 0.0,
         "locks": json.dumps([[lock["resource"], lock["mode"]] for lock in json.loads(row[3])["locks"]])}
        for row in found
    ]
    if rows:
        op.bulk_insert(job_locks, rows)
