"""The working time of a run for each type, and the views that summarize runs."""

from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """``ops.run_types`` has a row for each run and type, ``ops.run_summary`` a row for each run."""
    op.execute("""
        ALTER TABLE ops.ingestion_runs ADD COLUMN seconds double precision NOT NULL DEFAULT 0;
        COMMENT ON COLUMN ops.ingestion_runs.seconds IS
            'How long the steps of the type worked, over all partitions of the run together';

        CREATE VIEW ops.run_types AS
        SELECT run_id, resource_type, max(triggered_by) AS triggered_by, max(replay_of_run_id) AS replay_of_run_id,
            CASE WHEN bool_or(status = 'RUNNING') THEN 'RUNNING' WHEN bool_or(status = 'FAILED') THEN 'FAILED'
                 ELSE 'SUCCESS' END AS status,
            count(*) AS windows, min(partition_key) AS first_window, max(partition_key) AS last_window,
            sum(server_total)::bigint AS server_total, sum(fetched)::bigint AS fetched, sum(valid)::bigint AS valid,
            sum(dead)::bigint AS dead, sum(withheld)::bigint AS withheld, sum(loaded)::bigint AS loaded,
            max(seconds) AS seconds, min(started_at) AS started_at, max(finished_at) AS finished_at,
            min(checkpoint_before) AS checkpoint_before, max(checkpoint_after) AS checkpoint_after,
            max(error) AS error
        FROM ops.ingestion_runs GROUP BY run_id, resource_type;
        COMMENT ON VIEW ops.run_types IS 'A row a run and resource type, over all of its windows';

        CREATE VIEW ops.run_summary AS
        SELECT run_id, max(triggered_by) AS triggered_by, max(replay_of_run_id) AS replay_of_run_id,
            CASE WHEN bool_or(status = 'RUNNING') THEN 'RUNNING' WHEN bool_or(status = 'FAILED') THEN 'FAILED'
                 ELSE 'SUCCESS' END AS status,
            max(windows) AS windows, min(first_window) AS first_window, max(last_window) AS last_window,
            sum(server_total)::bigint AS server_total, sum(fetched)::bigint AS fetched, sum(valid)::bigint AS valid,
            sum(dead)::bigint AS dead, sum(withheld)::bigint AS withheld, sum(loaded)::bigint AS loaded,
            sum(seconds) AS seconds, min(started_at) AS started_at, max(finished_at) AS finished_at
        FROM ops.run_types GROUP BY run_id;
        COMMENT ON VIEW ops.run_summary IS 'A row a run, over all of its resource types and windows';
    """)
