"""The deletions of the store that a database has applied."""

from alembic import op

revision = "0017"
down_revision = "0016"


def upgrade() -> None:
    """``ops.deletion_parts`` has a row for each part of the layer ``deleted``."""
    op.execute("""
        CREATE TABLE ops.deletion_parts (
            name text PRIMARY KEY,
            applied_at timestamptz NOT NULL DEFAULT now()
        );
        COMMENT ON TABLE ops.deletion_parts IS
            'Parts of the store''s layer deleted whose deletions have left the tables; a new database has none';
    """)
