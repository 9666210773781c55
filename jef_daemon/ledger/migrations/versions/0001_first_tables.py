"""Executions, requests, outcomes, history and outbox."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the first tables."""
    
    op.create_table('executions',
    sa.Column('number', sa.Integer(), autoincrement=True, nullable=False),
    sa.Column('execution_id', sa.Text(), nullable=False),
    sa.Column('action', sa.Text(), nullable=False),
    sa.Column('workflow_id', sa.Text(), nullable=True),
    sa.Column('status', sa.String(), nullable=False),
    sa.Column('attempt', sa.Integer(), nullable=False),
    sa.Column('sequence', sa.Integer(), nullable=False),
    sa.Column('progress', sa.Integer(), nullable=False),
    sa.Column('message', sa.Text(), nullable=False),
    sa.Column('priority', sa.Integer(), nullable=False),
    sa.Column('not_before', sa.Double(), nullable=True),
    sa.Column('token', sa.Text(), nullable=False),
    sa.Column('external_id', sa.Text(), nullable=True),
    sa.Column('fenced', sa.Boolean(), nullable=False),
    sa.Column('cancel_requested', sa.Boolean(), nullable=False),
    sa.Column('wants_locks', sa.Boolean(), nullable=False),
    sa.Column('handed_back', sa.Boolean(), nullable=False),
    sa.Column('update_timeout_s', sa.Double(), nullable=True),
    sa.Column('update_deadline', sa.Double(), nullable=True),
    sa.Column('execution_timeout_s', sa.Double(), nullable=True),
    sa.Column('queued_at', sa.Double(), nullable=True),
    sa.Column('started_at', sa.Double(), nullable=True),
    sa.Column('finished_at', sa.Double(), nullable=True),
    sa.Column('updated_at', sa.Double(), nullable=True),
    sa.Column('traceparent', sa.Text(), nullable=True),
    sa.Column('reply_to', sa.Text(), nullable=True),
    sa.Column('correlation_id', sa.Text(), nullable=True),
    sa.PrimaryKeyConstraint('number'),
    sa.UniqueConstraint('execution_id')
    )
    op.create_index('executions_by_external_id', 'executions', ['external_id'], unique=False, sqlite_where=sa.text('external_id IS NOT NULL'), postgresql_where=sa.text('external_id IS NOT NULL'))
    op.create_index('executions_by_finished_at', 'executions', ['finished_at'], unique=False, sqlite_where=sa.text('finished_at IS NOT NULL'), postgresql_where=sa.text('finished_at IS NOT NULL'))
    op.create_index('executions_by_status', 'executions', ['status', 'number'], unique=False)
    op.create_index('executions_by_workflow_id', 'executions', ['workflow_id'], unique=False, sqlite_where=sa.text('workflow_id IS NOT NULL'), postgresql_where=sa.text('workflow_id IS NOT NULL'))
    op.create_index('executions_ready', 'executions', ['action', sa.literal_column('priority DESC'), 'number'], unique=False, sqlite_where=sa.text("status = 'QUEUED'"), postgresql_where=sa.text("status = 'QUEUED'"))
    op.create_table('history',
    sa.Column('number', sa.Integer(), autoincrement=True, nullable=False),
    sa.Column('execution_id', sa.Text(), nullable=False),
    sa.Column('at', sa.Double(), nullable=False),
    sa.Column('attempt', sa.Integer(), nullable=False),
    sa.Column('sequence', sa.Integer(), nullable=False),
    sa.Column('before', sa.String(), nullable=False, comment='place in the transition table'),
    sa.Column('status', sa.String(), nullable=False),
    sa.Column('event', sa.String(), nullable=False),
    sa.Column('actor', sa.Text(), nullable=False),
    sa.Column('reason', sa.Text(), nullable=False),
    sa.Column('detail', sa.Text(), nullable=True, comment='JSON: error and stack trace, result, what it waits for'),
    sa.PrimaryKeyConstraint('number')
    )
    op.create_index('history_by_execution', 'history', ['execution_id', 'number'], unique=False)
    op.create_table('outbox',
    sa.Column('id', sa.Integer(), autoincrement=False, nullable=False),
    sa.Column('exchange', sa.Text(), nullable=False),
    sa.Column('routing_key', sa.Text(), nullable=False),
    sa.Column('body', sa.LargeBinary(), nullable=False),
    sa.Column('headers', sa.Text(), nullable=True, comment='JSON'),
    sa.Column('correlation_id', sa.Text(), nullable=True),
    sa.Column('reply_to', sa.Text(), nullable=True),
    sa.PrimaryKeyConstraint('id')
    )
    op.create_table('outcomes',
    sa.Column('execution_id', sa.Text(), nullable=False),
    sa.Column('notification', sa.LargeBinary(), nullable=False, comment='the final one, told again to a duplicate'),
    sa.PrimaryKeyConstraint('execution_id')
    )
    op.create_table('requests',
    sa.Column('execution_id', sa.Text(), nullable=False),
    sa.Column('body', sa.Text(), nullable=False, comment='as it came, unknown keys included'),
    sa.PrimaryKeyConstraint('execution_id')
    )
    # ### end Alembic commands ###
