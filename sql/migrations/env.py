"""Alembic's entry: runs on the connection that fhir_assets.warehouse.migrate hands over, in its transaction."""

from alembic import context

context.configure(
    connection=context.config.attributes["connection"],
    version_table="alembic_version",
    version_table_schema="ops",
)
context.run_migrations()
