"""Alembic's environment script. The module fhir_assets.warehouse.postgres.db.migrations opens the transaction."""

from alembic import context

context.configure(
    connection=context.config.attributes["connection"],
    version_table="alembic_version",
    version_table_schema="ops",
)
context.run_migrations()
