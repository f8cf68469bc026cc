"""A mark on posts over HTTP, by which the post loader finds them and the sensors leave them to it for a short time."""

from alembic import op

revision = "0037"
down_revision = "0036"


def upgrade() -> None:
    """Earlier inputs and files are not marked: Dagster's jobs load them."""
    op.execute("""
        ALTER TABLE ops.received ADD COLUMN posted boolean NOT NULL DEFAULT false;
        COMMENT ON COLUMN ops.received.posted IS
            'Whether it was posted over HTTP: `fhir-assets post-loader` loads it, if it is small';
        CREATE INDEX ON ops.received (received_at) WHERE posted AND loaded_at IS NULL;

        ALTER TABLE ops.landing_files ADD COLUMN posted boolean NOT NULL DEFAULT false;
        COMMENT ON COLUMN ops.landing_files.posted IS
            'Whether the HTTP API wrote the file, which contains a posted list of visits';
        CREATE INDEX ON ops.landing_files (zone, written_at) WHERE posted AND status = 'ready';
    """)
