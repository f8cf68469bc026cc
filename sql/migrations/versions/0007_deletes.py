"""Tombstones: resources that the source deleted are removed from the views, and fhir.resource has their time."""

from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    """A deleted resource keeps its row in fhir.resource, without its content."""
    op.execute("""
        ALTER TABLE fhir.resource ADD COLUMN deleted_at timestamptz, ALTER COLUMN resource DROP NOT NULL,
            ADD CONSTRAINT content_or_tombstone CHECK ((resource IS NULL) = (deleted_at IS NOT NULL));
        COMMENT ON TABLE fhir.resource IS
            'The newest version of every loaded resource, whole, as JSON; of a deleted one the time of the deletion';
        COMMENT ON COLUMN fhir.resource.deleted_at IS
            'When the source deleted it; resource is null then, and no view has rows of it';
    """)
