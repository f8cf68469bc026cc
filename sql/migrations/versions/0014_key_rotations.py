"""Rotations of the encryption keys, and their progress."""

from alembic import op

revision = "0014"
down_revision = "0013"


def upgrade() -> None:
    """A rotation does not need the table to continue; the table shows its progress to people."""
    op.execute("""
        CREATE TABLE ops.key_rotations (
            id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
            key_id text NOT NULL,
            actor text NOT NULL,
            doing text NOT NULL DEFAULT '',
            total bigint NOT NULL,
            done bigint NOT NULL DEFAULT 0,
            left_over bigint,
            started_at timestamptz NOT NULL DEFAULT clock_timestamp(),
            updated_at timestamptz NOT NULL DEFAULT clock_timestamp(),
            ended_at timestamptz
        );
        COMMENT ON TABLE ops.key_rotations IS
            'Runs of `fhir-assets keys rotate`; one that has not ended and is not at work was stopped';
        COMMENT ON COLUMN ops.key_rotations.key_id IS 'The key that seals everything afterwards';
        COMMENT ON COLUMN ops.key_rotations.total IS 'Rows and parts that other keys sealed, or none, when it began';
        COMMENT ON COLUMN ops.key_rotations.left_over IS 'How many of them could not be sealed anew; 0: all are';
    """)
