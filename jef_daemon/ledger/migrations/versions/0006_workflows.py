"""Workflows, the definitions that they are pinned to, their histories; the stage that a job belongs to."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add a column and tables."""
    op.add_column("executions", sa.Column("stage", sa.Text(), nullable=True))
    op.create_table(
        "workflows",
        sa.Column("number", sa.Integer(), primary_key=True, autoincrement=True),
        sa.Column("workflow_id", sa.Text(), nullable=False, unique=True),
        sa.Column("key", sa.Text(), nullable=False, unique=True, comment="begins the execution ids of its jobs"),
        sa.Column("name", sa.Text(), nullable=False, comment="of its definition"),
        sa.Column("revision", sa.String(), nullable=False),
        sa.Column("status", sa.String(), nullable=False),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("updated_at", sa.Double(), nullable=False),
        sa.Column("finished_at", sa.Double(), nullable=True),
        sa.Column("state", sa.Text(), nullable=False, comment="JSON: workflow.state.State"),
    )
    op.create_index("workflows_by_status", "workflows", ["status", "number"])
    for status in ("QUEUED", "RUNNING"):
        is_so = sa.text(f"status = '{status}'")
        op.create_index(
            f"workflows_{status.lower()}",
            "workflows",
            ["name", sa.text("priority DESC"), "number"],
            sqlite_where=is_so,
            postgresql_where=is_so,
        )
    has_finished = sa.text("finished_at IS NOT NULL")
    op.create_index(
        "workflows_by_end", "workflows", ["finished_at"], sqlite_where=has_finished, postgresql_where=has_finished
    )
    op.create_table(
        "workflow_definitions",
        sa.Column("revision", sa.String(), primary_key=True),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("body", sa.Text(), nullable=False, comment="JSON: workflow.definition.Definition"),
        sa.Column("used_at", sa.Double(), nullable=False, comment="when a workflow was last pinned to it"),
    )
    op.create_table(
        "workflow_history",
        sa.Column("number", sa.Integer(), primary_key=True, autoincrement=True),
        sa.Column("workflow_id", sa.Text(), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.Column("event", sa.String(), nullable=False),
        sa.Column("stage", sa.Text(), nullable=False, comment="empty: the workflow itself"),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
    )
    op.create_index("workflow_history_by_workflow", "workflow_history", ["workflow_id", "number"])
