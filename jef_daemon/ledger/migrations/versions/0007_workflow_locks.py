"""Workflows that wait for locks: among the concurrency of their name, and until when; all of a name."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column and the indexes."""
    op.add_column(
        "workflows",
        sa.Column("due_at", sa.Double(), nullable=True, comment="when its wait for locks is over"),
    )
    op.create_index("workflows_by_name", "workflows", ["name", "number"])
    is_due = sa.text("due_at IS NOT NULL")
    op.create_index("workflows_by_due_time", "workflows", ["due_at"], sqlite_where=is_due, postgresql_where=is_due)
    waits = sa.text("status = 'WAITING_FOR_LOCK'")
    op.create_index(
        "workflows_waiting_for_lock",
        "workflows",
        ["name", sa.text("priority DESC"), "number"],
        sqlite_where=waits,
        postgresql_where=waits,
    )
