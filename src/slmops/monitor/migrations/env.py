"""Runs migrations over the connection that :mod:`slmops.monitor.database` hands in; there is no alembic.ini."""

from alembic import context

from slmops.monitor.schema import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata, render_as_batch=True)
with context.begin_transaction():
    context.run_migrations()
