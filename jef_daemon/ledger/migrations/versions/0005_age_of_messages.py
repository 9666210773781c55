"""When a message was put into the outbox: how long the broker has not confirmed it."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column; messages that are there have no age."""
    op.add_column(
        "outbox",
        sa.Column(
            "at", sa.Double(), nullable=True, comment="when it was put in; NULL: by a version that did not say"
        ),
    )
