"""Alembic's entry: runs in the transaction that fhir_assets.warehouse.postgres.db.migrations opens."""

from alembic import context

context.configure(
    connection=context.config.attributes["connection"],
    version_table="alembic_version",
    version_table_schema="ops",
)
context.run_migrations()
