"""The one Alembic environment: runs a service's versions in its own schema, on the connection `migrate` hands over."""

from alembic import context
from sqlalchemy import Connection

connection = context.config.attributes["connection"]
assert isinstance(connection, Connection)
context.configure(
    connection=connection,
    version_table="schema_version",
    version_table_schema=context.config.attributes["service"],
    transaction_per_migration=True,
)
with context.begin_transaction():
    context.run_migrations()
