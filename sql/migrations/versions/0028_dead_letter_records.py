"""The order in which dead letters were recorded."""

from alembic import op

revision = "0028"
down_revision = "0027"


def upgrade() -> None:
    """Dead letters that were recorded before have the number 0: every load that begins now may resolve them."""
    op.execute("""
        CREATE SEQUENCE ops.dead_letter_records;
        COMMENT ON SEQUENCE ops.dead_letter_records IS 'Numbers the records of dead letters, and the begins of loads';
        ALTER TABLE ops.dead_letters ADD COLUMN recorded bigint NOT NULL DEFAULT 0;
        COMMENT ON COLUMN ops.dead_letters.recorded IS
            'Number of its last record: a load settles only what was recorded before the load began';
    """)
