"""Runs migrations over the connection that :mod:`slmops.store.index` hands in; there is no alembic.ini."""

from alembic import context

from slmops.store.schema import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata, render_as_batch=True)
with context.begin_transaction():
    context.run_migrations()
