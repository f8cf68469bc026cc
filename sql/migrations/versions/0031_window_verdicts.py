"""Whether windows reconcile, and the windows that deliveries and exports held back."""

from alembic import op

revision = "0031"
down_revision = "0030"


def upgrade() -> None:
    """Windows that were loaded before have no row: the first delivery, export or lake update evaluates them."""
    op.execute("""
        CREATE TABLE ops.window_verdicts (
            source text NOT NULL DEFAULT ops.current_source(),
            resource_type text NOT NULL,
            partition_key text NOT NULL,
            reconciled boolean,
            faults text NOT NULL DEFAULT '',
            changes bigint NOT NULL DEFAULT 0,
            evaluated_at timestamptz,
            PRIMARY KEY (source, resource_type, partition_key)
        );
        COMMENT ON TABLE ops.window_verdicts IS
            'The last result of the check reconciles by window, which deliveries, exports and the lake read';
        COMMENT ON COLUMN ops.window_verdicts.reconciled IS
            'Whether the window reconciles; null: its partitions changed since the last evaluation';
        COMMENT ON COLUMN ops.window_verdicts.faults IS 'The counts that do not match, without patient data';
        COMMENT ON COLUMN ops.window_verdicts.changes IS
            'Grows with each change of the partitions, so that no evaluation from before a change is recorded after it';

        CREATE TABLE ops.held_windows (
            source text NOT NULL DEFAULT ops.current_source(),
            destination text NOT NULL,
            resource_type text NOT NULL,
            partition_key text NOT NULL,
            run_id text NOT NULL,
            held_at timestamptz NOT NULL DEFAULT now(),
            PRIMARY KEY (source, destination, resource_type, partition_key)
        );
        COMMENT ON TABLE ops.held_windows IS
            'Windows that a delivery or export passed over because they do not reconcile; a later run includes them';
        COMMENT ON COLUMN ops.held_windows.destination IS 'The layer (delivered or exports) and its URL';
    """)
