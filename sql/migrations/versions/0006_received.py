"""Inputs that were received through other channels than the source: landing files, intake, corrections."""

from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    """``ops.received`` has a row for each origin, type and window; dead letters have the column ``origin``."""
    op.execute("""
        CREATE TABLE ops.received (
            origin text NOT NULL,
            door text NOT NULL,
            resource_type text NOT NULL,
            partition_key text NOT NULL,
            parts text[] NOT NULL,
            rows bigint NOT NULL,
            rejected bigint NOT NULL,
            received_at timestamptz NOT NULL DEFAULT clock_timestamp(),
            asked integer NOT NULL DEFAULT 0,
            asked_at timestamptz,
            loaded_at timestamptz,
            loaded_run_id text,
            PRIMARY KEY (origin, resource_type, partition_key)
        );
        CREATE INDEX ON ops.received (partition_key, resource_type) WHERE loaded_at IS NULL;
        CREATE INDEX ON ops.received (received_at DESC);
        COMMENT ON TABLE ops.received IS
            'What came into raw by another door than the source; loaded_at is set in the transaction of its rows';
        COMMENT ON COLUMN ops.received.origin IS 'What it came by, such as landing:<sha256>: received once';
        COMMENT ON COLUMN ops.received.parts IS 'The parts of the raw partition that hold it';
        COMMENT ON COLUMN ops.received.asked IS 'How many runs were asked for to load it';

        ALTER TABLE ops.dead_letters ADD COLUMN origin text;
        COMMENT ON COLUMN ops.dead_letters.origin IS 'What it was received by; null if fetched from the source';
    """)
