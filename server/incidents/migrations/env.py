"""Alembic's entry: the steps run on the connection that `database.migrate` made."""

from __future__ import annotations

from alembic import context

from server.incidents.tables import METADATA

connection = context.config.attributes["connection"]
# SQLite changes a table by copying it.
context.configure(connection=connection, target_metadata=METADATA, render_as_batch=True)
with context.begin_transaction():
    context.run_migrations()
