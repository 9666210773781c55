"""Work that runs outside: deadlines, retries, checkpoints, calls, remembered cancels."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add columns and tables."""
    for column in (
        sa.Column("outside", sa.Boolean(), nullable=False, server_default=sa.false()),
        sa.Column("max_attempts", sa.Integer(), nullable=False, server_default=sa.text("1")),
        sa.Column("timeout_grace_s", sa.Double(), nullable=False, server_default=sa.text("300")),
        sa.Column("queue_timeout_s", sa.Double(), nullable=True),
        sa.Column("lock_timeout_s", sa.Double(), nullable=True),
    ):
        op.add_column("executions", column)
    watched = sa.text("update_deadline IS NOT NULL")
    op.create_index(
        "executions_by_deadline",
        "executions",
        ["update_deadline"],
        sqlite_where=watched,
        postgresql_where=watched,
    )
    op.create_table(
        "tombstones",
        sa.Column("kind", sa.String(), primary_key=True, comment="execution or workflow"),
        sa.Column("name", sa.Text(), primary_key=True),
        sa.Column("until", sa.Double(), nullable=False),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
    )
    op.create_index("tombstones_by_age", "tombstones", ["until"])
    op.create_table(
        "checkpoints",
        sa.Column("execution_id", sa.Text(), primary_key=True),
        sa.Column("data", sa.Text(), nullable=False, comment="JSON, the executor's own"),
    )
    op.create_table(
        "calls",
        sa.Column("execution_id", sa.Text(), primary_key=True),
        sa.Column("call", sa.String(), primary_key=True, comment="poll, cancel or resume"),
        sa.Column("at", sa.Double(), nullable=False, comment="when it is due"),
        sa.Column("number", sa.Integer(), nullable=False, comment="how often it was made"),
    )
    op.create_index("calls_by_time", "calls", ["at"])
