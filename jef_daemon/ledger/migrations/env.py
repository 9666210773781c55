"""Alembic's entry: runs the versions on the connection that `ledger.opening` hands over."""

from alembic import context

from jef_daemon.ledger.schema import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_as_batch=True,
    transaction_per_migration=False,
)
context.run_migrations()
