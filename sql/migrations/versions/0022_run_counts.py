"""Counts of a run that add up: resources older than the first window, and versions that the tables already had."""

from alembic import op

revision = "0022"
down_revision = "0021"


def upgrade() -> None:
    """Add ``older`` and ``superseded`` to ``ops.ingestion_runs`` and to the views that sum it up."""
    op.execute("""
        ALTER TABLE ops.ingestion_runs
            ADD COLUMN IF NOT EXISTS older bigint,
            ADD COLUMN IF NOT EXISTS superseded bigint;
        COMMENT ON COLUMN ops.ingestion_runs.fetched IS
            'Resources that the source returned in this run, without those that the store had already';
        COMMENT ON COLUMN ops.ingestion_runs.older IS
            'Fetched resources that are older than FHIR_LAST_UPDATED_GTE and were not kept';
        COMMENT ON COLUMN ops.ingestion_runs.dead IS 'Resources that became dead letters in any step of this run';
        COMMENT ON COLUMN ops.ingestion_runs.superseded IS
            'Valid resources of which the tables have the same version or a newer one';
        COMMENT ON COLUMN ops.ingestion_runs.loaded IS 'Distinct versions that this run loaded and the tables have';
    """)
    op.execute("""
        CREATE OR REPLACE VIEW ops.run_types AS
        SELECT
            run_id,
            resource_type,
            max(triggered_by) AS triggered_by,
            max(replay_of_run_id) AS replay_of_run_id,
            CASE
                WHEN bool_or(status = 'RUNNING') THEN 'RUNNING'
                WHEN bool_or(status = 'FAILED') THEN 'FAILED'
                ELSE 'SUCCESS'
            END AS status,
            count(*) AS windows,
            min(partition_key) AS first_window,
            max(partition_key) AS last_window,
            sum(server_total)::bigint AS server_total,
            sum(fetched)::bigint AS fetched,
            sum(valid)::bigint AS valid,
            sum(dead)::bigint AS dead,
            sum(withheld)::bigint AS withheld,
            sum(loaded)::bigint AS loaded,
            max(seconds) AS seconds,
            min(started_at) AS started_at,
            max(finished_at) AS finished_at,
            min(checkpoint_before) AS checkpoint_before,
            max(checkpoint_after) AS checkpoint_after,
            max(error) AS error,
            sum(older)::bigint AS older,
            sum(superseded)::bigint AS superseded
        FROM ops.ingestion_runs
        GROUP BY run_id, resource_type
    """)
    op.execute("""
        CREATE OR REPLACE VIEW ops.run_summary AS
        SELECT
            run_id,
            max(triggered_by) AS triggered_by,
            max(replay_of_run_id) AS replay_of_run_id,
            CASE
                WHEN bool_or(status = 'RUNNING') THEN 'RUNNING'
                WHEN bool_or(status = 'FAILED') THEN 'FAILED'
                ELSE 'SUCCESS'
            END AS status,
            max(windows) AS windows,
            min(first_window) AS first_window,
            max(last_window) AS last_window,
            sum(server_total)::bigint AS server_total,
            sum(fetched)::bigint AS fetched,
            sum(valid)::bigint AS valid,
            sum(dead)::bigint AS dead,
            sum(withheld)::bigint AS withheld,
            sum(loaded)::bigint AS loaded,
            sum(seconds) AS seconds,
            min(started_at) AS started_at,
            max(finished_at) AS finished_at,
            sum(older)::bigint AS older,
            sum(superseded)::bigint AS superseded
        FROM ops.run_types
        GROUP BY run_id
    """)
