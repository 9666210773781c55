"""When the clocks of waits, work outside and time-outs run out; calls about an attempt that has ended."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

_ARM = """UPDATE executions SET due_at = CASE
    WHEN status = 'TIMED_OUT' THEN finished_at + timeout_grace_s
    WHEN status = 'RUNNING' THEN started_at + execution_timeout_s
    WHEN wants_locks THEN queued_at + lock_timeout_s
    ELSE queued_at + queue_timeout_s END
    WHERE status IN ('QUEUED', 'WAITING_FOR_LOCK')
    OR (status = 'RUNNING' AND outside) OR (status = 'TIMED_OUT' AND NOT fenced)"""


def upgrade() -> None:
    """Add columns, and fill the clocks of what waits and runs."""
    op.add_column("executions", sa.Column("due_at", sa.Double(), nullable=True))
    op.execute(_ARM)
    op.create_index(
        "executions_by_due_time",
        "executions",
        ["due_at"],
        sqlite_where=sa.text("due_at IS NOT NULL AND handed_back IS 0"),
        postgresql_where=sa.text("due_at IS NOT NULL AND handed_back IS false"),
    )
    op.add_column(
        "calls",
        sa.Column(
            "attempt",
            sa.Integer(),
            nullable=True,
            comment="the one that is meant, where it has ended; NULL: the current one",
        ),
    )
    op.add_column("calls", sa.Column("external_id", sa.Text(), nullable=True, comment="of that attempt"))
