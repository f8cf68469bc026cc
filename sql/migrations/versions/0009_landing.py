"""The files of the landing zone."""

from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    """``ops.landing_files`` has a row for each file, as of the last scan."""
    op.execute("""
        CREATE TABLE ops.landing_files (
            zone text NOT NULL,
            name text NOT NULL,
            size bigint NOT NULL,
            mark text NOT NULL,
            written_at timestamptz NOT NULL,
            status text NOT NULL CHECK (status IN ('arriving', 'ready', 'loaded', 'failed')),
            found_at timestamptz NOT NULL DEFAULT clock_timestamp(),
            attempts integer NOT NULL DEFAULT 0,
            tried_at timestamptz,
            sha256 text,
            rows bigint,
            rejected bigint,
            deleted bigint,
            skipped jsonb NOT NULL DEFAULT '{}',
            known_before boolean NOT NULL DEFAULT false,
            error text,
            run_id text,
            PRIMARY KEY (zone, name)
        );
        CREATE INDEX ON ops.landing_files (zone, status);
        COMMENT ON TABLE ops.landing_files IS 'Files of the landing zone; each content is loaded once';
        COMMENT ON COLUMN ops.landing_files.name IS 'As it lies in the zone: it may hold a patient''s name';
        COMMENT ON COLUMN ops.landing_files.mark IS
            'Changes when the content does: the time of a file, the ETag of an object';
        COMMENT ON COLUMN ops.landing_files.skipped IS 'By type, resources of types that are not loaded here';
        COMMENT ON COLUMN ops.landing_files.known_before IS
            'The same content had been received already: nothing was done';
    """)
