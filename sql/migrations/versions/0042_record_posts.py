"""Posts of records and resources, so that a task can be asked, and the resources in them."""

from alembic import op

revision = "0042"
down_revision = "0041"


def upgrade() -> None:
    """Earlier posts have no task."""
    op.execute("""
        CREATE TABLE ops.record_posts (
            source text NOT NULL DEFAULT ops.current_source(),
            task_id text NOT NULL,
            origin text NOT NULL,
            records bigint NOT NULL,
            rejected bigint NOT NULL,
            posted_by text NOT NULL,
            posted_at timestamptz NOT NULL DEFAULT clock_timestamp(),
            PRIMARY KEY (source, task_id)
        );
        CREATE INDEX ON ops.record_posts (posted_at);
        COMMENT ON TABLE ops.record_posts IS
            'Posts of records and resources to the API, one row for each request that stored something';
        COMMENT ON COLUMN ops.record_posts.origin IS 'The origin in ops.received, which simultaneous posts share';
        COMMENT ON COLUMN ops.record_posts.records IS 'The number of posted records, including rejected ones';

        CREATE TABLE ops.posted_resources (
            source text NOT NULL DEFAULT ops.current_source(),
            resource_type text NOT NULL,
            id text NOT NULL,
            task_id text NOT NULL,
            PRIMARY KEY (source, resource_type, id, task_id),
            FOREIGN KEY (source, task_id) REFERENCES ops.record_posts ON DELETE CASCADE
        );
        CREATE INDEX ON ops.posted_resources (source, task_id);
        COMMENT ON TABLE ops.posted_resources IS 'The resources that each row of ops.record_posts stored';
    """)
