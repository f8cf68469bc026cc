"""Encrypted names of the files of the landing zone."""

from alembic import op

revision = "0047"
down_revision = "0046"


def upgrade() -> None:
    """Add the columns. Names of earlier rows are in the clear until the zone is scanned or the keys are rotated."""
    op.execute("""
        ALTER TABLE ops.landing_files
            ADD COLUMN IF NOT EXISTS encrypted_name bytea,
            ADD COLUMN IF NOT EXISTS key_id text;
        COMMENT ON COLUMN ops.landing_files.name IS
            'The name in the zone. With encryption keys, file- and its keyed hash: `fhir-assets landing list` names it';
        COMMENT ON COLUMN ops.landing_files.encrypted_name IS 'The name in the zone, encrypted; null without keys';
        COMMENT ON COLUMN ops.landing_files.key_id IS 'The key that encrypts the name; null if it is in the clear';
    """)
