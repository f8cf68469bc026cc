"""The time up to which a server's history was read for deletions."""

from alembic import op

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    """``ops.deletion_checkpoints`` has a row for each type."""
    op.execute("""
        CREATE TABLE ops.deletion_checkpoints (
            resource_type text PRIMARY KEY,
            applied_until timestamptz NOT NULL,
            run_id text NOT NULL,
            updated_at timestamptz NOT NULL DEFAULT now()
        );
        COMMENT ON TABLE ops.deletion_checkpoints IS
            'All that the server deleted before applied_until has left the tables (FHIR_DELETES=history)';
    """)
