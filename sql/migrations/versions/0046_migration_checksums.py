"""The checksum of each applied migration, so that a file that was changed afterwards is noticed."""

from alembic import op

revision = "0046"
down_revision = "0044"


def upgrade() -> None:
    """Create the table, which the upgrade fills, and a column that databases of an early text of 0004 lacked."""
    op.execute("""
        CREATE TABLE IF NOT EXISTS ops.migration_checksums (
            revision text PRIMARY KEY,
            checksum text NOT NULL,
            recorded_at timestamptz NOT NULL DEFAULT now()
        );
        COMMENT ON TABLE ops.migration_checksums IS 'Checksums of the files of the migrations that were applied';

        ALTER TABLE ops.corrections ADD COLUMN IF NOT EXISTS key_id text;
    """)
