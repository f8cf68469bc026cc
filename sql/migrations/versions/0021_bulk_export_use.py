"""The use of bulk exports: whether a load has begun to read one, and the notices about it."""

from alembic import op

revision = "0021"
down_revision = "0020"


def upgrade() -> None:
    """An export whose files were deleted from the store after its use is ``removed``, no longer ``failed``."""
    op.execute("""
        ALTER TABLE ops.bulk_exports
            ADD COLUMN kick_off_date timestamptz,
            ADD COLUMN used_at timestamptz,
            ADD COLUMN notices jsonb NOT NULL DEFAULT '[]',
            DROP CONSTRAINT bulk_exports_status_check,
            ADD CONSTRAINT bulk_exports_status_check
                CHECK (status IN ('waiting', 'downloading', 'done', 'removed', 'failed', 'cancelled'));
        UPDATE ops.bulk_exports
        SET status = 'removed', error = NULL
        WHERE status = 'failed' AND error = 'its files were deleted from the store';
        UPDATE ops.bulk_exports SET used_at = finished_at WHERE status IN ('done', 'removed');

        COMMENT ON COLUMN ops.bulk_exports.kick_off_date IS 'The Date header of the response to the request';
        COMMENT ON COLUMN ops.bulk_exports.used_at IS 'When a load first read it; null: no load has read it yet';
        COMMENT ON COLUMN ops.bulk_exports.notices IS
            'What the server said or did: shown on the windows it was loaded into';
        COMMENT ON COLUMN ops.bulk_exports.transaction_time IS
            'All that was updated before this is in the export: the transactionTime as far as it is trusted';
    """)
