"""The key column of each view's table, and the deleted resources for readers."""

from alembic import op

revision = "0033"
down_revision = "0032"


def upgrade() -> None:
    """Tables keep the column _resource_key until their view is applied again: it is dropped if the view has a key."""
    op.execute("""
        ALTER TABLE ops.view_tables ADD COLUMN key_column text NOT NULL DEFAULT '_resource_key';
        COMMENT ON COLUMN ops.view_tables.key_column IS 'The column of the table with the id of the resource';
    """)
    op.execute("""
        CREATE INDEX resource_deleted ON fhir.resource (resource_type, deleted_at) WHERE deleted_at IS NOT NULL;
        CREATE VIEW fhir.deleted AS
        SELECT resource_type AS type, id, deleted_at, loaded_at AS recorded_at, 'deleted at the source' AS why, source
        FROM fhir.resource
        WHERE deleted_at IS NOT NULL;
        COMMENT ON VIEW fhir.deleted IS
            'Resources that were in the tables and are deleted at their source. Withheld resources are not among them';
        COMMENT ON COLUMN fhir.deleted.deleted_at IS 'When the source deleted it';
        COMMENT ON COLUMN fhir.deleted.recorded_at IS 'When the deletion was loaded';
    """)
