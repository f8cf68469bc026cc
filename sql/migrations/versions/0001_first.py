"""Complete resources, dead letters, runs and checkpoints."""

from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Create the first tables.

    The partitions of fhir.resource are created from the catalog (``warehouse.postgres.db.migrations``).
    """
    op.execute("""
        CREATE SCHEMA fhir;
        CREATE SCHEMA IF NOT EXISTS health;
        COMMENT ON SCHEMA fhir IS
            'FHIR resources: one table a ViewDefinition, and fhir.resource with the whole JSON';
        COMMENT ON SCHEMA ops IS 'What the pipeline did: runs, dead letters, checkpoints';
        COMMENT ON SCHEMA health IS 'Source tables whose changes are delivered to a FHIR server';

        CREATE TABLE fhir.resource (
            resource_type text NOT NULL,
            id text NOT NULL,
            version_id text,
            version_number bigint,
            last_updated timestamptz,
            as_of timestamptz NOT NULL,
            partition_key text NOT NULL,
            run_id text NOT NULL,
            loaded_at timestamptz NOT NULL DEFAULT now(),
            resource jsonb NOT NULL,
            PRIMARY KEY (resource_type, id)
        ) PARTITION BY LIST (resource_type);
        CREATE INDEX ON fhir.resource (partition_key);
        CREATE TABLE fhir.resource_other PARTITION OF fhir.resource DEFAULT;
        COMMENT ON TABLE fhir.resource IS 'The newest version of every loaded resource, whole, as JSON';
        COMMENT ON COLUMN fhir.resource.version_number IS
            'meta.versionId where it is a number: orders versions of one instant';
        COMMENT ON COLUMN fhir.resource.last_updated IS 'meta.lastUpdated; null where the source gave none';
        COMMENT ON COLUMN fhir.resource.as_of IS
            'last_updated, else the time of arrival: an older version never replaces a newer one';
        COMMENT ON COLUMN fhir.resource.partition_key IS 'The window that the version belongs to';
        COMMENT ON COLUMN fhir.resource.run_id IS 'The Dagster run that loaded it';
    """)
    op.execute("""
        CREATE TABLE ops.view_tables (
            name text PRIMARY KEY,
            resource_type text NOT NULL,
            layout text NOT NULL,
            applied_at timestamptz NOT NULL DEFAULT now()
        );
        COMMENT ON TABLE ops.view_tables IS 'The layout that each view''s table was last brought to';

        CREATE TABLE ops.loaded_parts (
            resource_type text NOT NULL,
            partition_key text NOT NULL,
            part text NOT NULL,
            rows bigint NOT NULL,
            run_id text NOT NULL,
            loaded_at timestamptz NOT NULL DEFAULT now(),
            PRIMARY KEY (resource_type, partition_key, part)
        );
        COMMENT ON TABLE ops.loaded_parts IS
            'Parts of the store whose resources are in the tables; written in the transaction that put them there';

        CREATE TABLE ops.checkpoints (
            resource_type text PRIMARY KEY,
            loaded_until timestamptz NOT NULL,
            source_state text,
            run_id text,
            updated_at timestamptz NOT NULL DEFAULT now()
        );
        COMMENT ON TABLE ops.checkpoints IS 'Up to where each resource type is loaded without a gap';
        COMMENT ON COLUMN ops.checkpoints.loaded_until IS 'All that was updated before this is in the tables';
        COMMENT ON COLUMN ops.checkpoints.source_state IS 'What the files were when loading began; null for a server';
    """)
    op.execute("""
        CREATE TABLE ops.ingestion_runs (
            run_id text NOT NULL,
            resource_type text NOT NULL,
            partition_key text NOT NULL,
            status text NOT NULL CHECK (status IN ('RUNNING', 'SUCCESS', 'FAILED')),
            triggered_by text,
            server_total bigint,
            fetched bigint,
            valid bigint,
            dead bigint,
            withheld bigint,
            loaded bigint,
            started_at timestamptz NOT NULL DEFAULT clock_timestamp(),
            finished_at timestamptz,
            checkpoint_before timestamptz,
            checkpoint_after timestamptz,
            replay_of_run_id text,
            error text,
            PRIMARY KEY (run_id, resource_type, partition_key)
        );
        CREATE INDEX ON ops.ingestion_runs (resource_type, partition_key, started_at DESC);
        CREATE INDEX ON ops.ingestion_runs (started_at DESC);
        CREATE INDEX ON ops.ingestion_runs (status) WHERE status <> 'SUCCESS';
        COMMENT ON TABLE ops.ingestion_runs IS
            'One row a run, resource type and partition; a count is null until its layer ran';
    """)
    op.execute("""
        CREATE TABLE ops.dead_letters (
            id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
            fingerprint bytea NOT NULL UNIQUE,
            resource_type text NOT NULL,
            resource_id text,
            stage text NOT NULL CHECK (stage IN ('fetch', 'validate', 'transform', 'load', 'export', 'deliver')),
            rule text NOT NULL,
            path text NOT NULL,
            message text NOT NULL,
            issues jsonb NOT NULL DEFAULT '[]',
            resource bytea,
            partition_key text NOT NULL,
            run_id text NOT NULL,
            first_run_id text NOT NULL,
            status text NOT NULL DEFAULT 'open' CHECK (status IN ('open', 'replaying', 'resolved', 'discarded')),
            occurrences bigint NOT NULL,
            attempts integer NOT NULL DEFAULT 1,
            first_failure timestamptz NOT NULL DEFAULT now(),
            last_failure timestamptz NOT NULL DEFAULT now(),
            resolved_at timestamptz,
            resolved_run_id text
        );
        CREATE INDEX ON ops.dead_letters (resource_type, stage, partition_key);
        CREATE INDEX ON ops.dead_letters (resource_type, id);
        CREATE INDEX ON ops.dead_letters (resource_type, status, rule, id);
        CREATE INDEX ON ops.dead_letters (run_id, id);
        CREATE INDEX ON ops.dead_letters (status, id);
        CREATE INDEX ON ops.dead_letters (stage, id);
        CREATE INDEX ON ops.dead_letters (rule, id);
        CREATE INDEX ON ops.dead_letters (last_failure, id);
        COMMENT ON TABLE ops.dead_letters IS
            'Resources that could not go on, each with its reason; messages hold no patient data';
        COMMENT ON COLUMN ops.dead_letters.fingerprint IS
            'Stage, type, partition and content: the same failure again is the same row';
        COMMENT ON COLUMN ops.dead_letters.resource IS 'The bytes as received; they need not be JSON';
        COMMENT ON COLUMN ops.dead_letters.run_id IS 'The run in which it failed last';
        COMMENT ON COLUMN ops.dead_letters.occurrences IS
            'How often the same content came in the last run that had it';
        COMMENT ON COLUMN ops.dead_letters.attempts IS 'In how many runs it failed';
    """)
