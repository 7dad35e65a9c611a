"""Alembic's entry: migrates over the connection that it is given, in its transaction."""

from alembic import context

from controller.store.schema import metadata

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=metadata, transactional_ddl=True)
context.run_migrations()
