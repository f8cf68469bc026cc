"""The number of resources in the partitions of raw and validated, for the row counts in the catalog."""

from alembic import op

revision = "0036"
down_revision = "0035"


def upgrade() -> None:
    """Partitions of earlier runs have an unknown number: the next run of their type counts them from the manifests."""
    op.execute("""
        CREATE TABLE ops.partition_rows (
            source text NOT NULL DEFAULT ops.current_source(),
            layer text NOT NULL,
            resource_type text NOT NULL,
            partition_key text NOT NULL,
            row_count bigint,
            PRIMARY KEY (source, layer, resource_type, partition_key)
        );
        COMMENT ON TABLE ops.partition_rows IS
            'The resources in each partition of raw and validated, as its manifest counts them';
        COMMENT ON COLUMN ops.partition_rows.row_count IS
            'Null: the partition was being committed, or was committed before this table existed';

        INSERT INTO ops.partition_rows (source, layer, resource_type, partition_key)
        SELECT DISTINCT r.source, layer, r.resource_type, r.partition_key
        FROM ops.ingestion_runs r
        CROSS JOIN (VALUES ('raw'), ('validated')) AS layers (layer);
    """)
