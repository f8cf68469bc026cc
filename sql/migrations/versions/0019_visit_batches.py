"""Batches of visit files that are received together."""

from alembic import op

revision = "0019"
down_revision = "0018"


def upgrade() -> None:
    """A batch is recorded before it is received, so that the same files form the same batch after a crash."""
    op.execute("""
        ALTER TABLE ops.landing_files ADD COLUMN batch text;
        COMMENT ON COLUMN ops.landing_files.batch IS 'With which others of the same batch a file of visits is received';

        ALTER TABLE ops.visit_files
            ADD COLUMN received_as text NOT NULL DEFAULT '',
            ADD COLUMN rows bigint NOT NULL DEFAULT 0,
            ADD COLUMN rejected bigint NOT NULL DEFAULT 0;
        UPDATE ops.visit_files SET received_as = origin;
        COMMENT ON COLUMN ops.visit_files.received_as IS 'The origin in ops.received that it came with';
        COMMENT ON COLUMN ops.visit_files.rows IS 'Resources that went into raw';
        COMMENT ON COLUMN ops.visit_files.rejected IS 'Rows that became dead letters';
    """)
