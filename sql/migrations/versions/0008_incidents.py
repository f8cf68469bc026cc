"""Incidents, and the alerts about them."""

from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    """``ops.incidents``: a row from the first failure until all of its partitions have recovered."""
    op.execute("""
        CREATE TABLE ops.incidents (
            id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
            kind text NOT NULL CHECK (kind IN ('run', 'check', 'behind')),
            name text NOT NULL,
            partitions text[] NOT NULL,
            counts jsonb NOT NULL DEFAULT '{}',
            run_id text,
            opened_at timestamptz NOT NULL DEFAULT now(),
            closed_at timestamptz,
            alerted_at timestamptz,
            all_clear_at timestamptz
        );
        CREATE UNIQUE INDEX incidents_open ON ops.incidents (kind, name) WHERE closed_at IS NULL;
        CREATE INDEX incidents_untold ON ops.incidents (id) WHERE all_clear_at IS NULL;
        COMMENT ON TABLE ops.incidents IS
            'Failed runs, failed checks and windows behind schedule, each from its first failure to its end';
        COMMENT ON COLUMN ops.incidents.name IS 'The job, the check as asset:check, or the schedule';
        COMMENT ON COLUMN ops.incidents.partitions IS
            'What fails still: windows, or resource types; empty when it is over';
        COMMENT ON COLUMN ops.incidents.alerted_at IS 'When ALERT_WEBHOOK_URL was told that it began';
        COMMENT ON COLUMN ops.incidents.all_clear_at IS 'When ALERT_WEBHOOK_URL was told that it is over';
    """)
