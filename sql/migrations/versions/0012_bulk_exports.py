"""Bulk exports, so that the next run continues an export after a failure."""

from alembic import op

revision = "0012"
down_revision = "0011"


def upgrade() -> None:
    """``ops.bulk_exports`` has a row for each export, ``ops.bulk_parts`` one for each of its parts in the store."""
    op.execute("""
        CREATE TABLE ops.bulk_exports (
            id text PRIMARY KEY,
            base_url text NOT NULL,
            level text NOT NULL,
            resource_types text[] NOT NULL,
            type_filter text NOT NULL,
            since timestamptz,
            status_url text NOT NULL,
            status text NOT NULL DEFAULT 'waiting'
                CHECK (status IN ('waiting', 'downloading', 'done', 'failed', 'cancelled')),
            requested_at timestamptz NOT NULL,
            transaction_time timestamptz,
            manifest jsonb,
            files_done integer[] NOT NULL DEFAULT '{}',
            error text,
            finished_at timestamptz
        );
        CREATE INDEX ON ops.bulk_exports (base_url, requested_at DESC);
        COMMENT ON TABLE ops.bulk_exports IS 'Exports asked of a FHIR server ($export); one that broke off is taken up';
        COMMENT ON COLUMN ops.bulk_exports.since IS 'Only what was updated since; null: everything';
        COMMENT ON COLUMN ops.bulk_exports.transaction_time IS 'All that was updated before this is in the export';
        COMMENT ON COLUMN ops.bulk_exports.files_done IS
            'Places in the manifest''s output of the files that are stored';

        CREATE TABLE ops.bulk_parts (
            export_id text NOT NULL REFERENCES ops.bulk_exports ON DELETE CASCADE,
            resource_type text NOT NULL,
            name text NOT NULL,
            rows bigint NOT NULL,
            bytes bigint NOT NULL,
            stored_bytes bigint NOT NULL,
            first timestamptz,
            last timestamptz,
            PRIMARY KEY (export_id, name)
        );
        COMMENT ON TABLE ops.bulk_parts IS 'The downloaded resources of an export, in parts of the store';
    """)
