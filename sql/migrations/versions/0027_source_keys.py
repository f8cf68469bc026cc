"""The source as a part of every key, because ids of two servers may be equal."""

from alembic import op

revision = "0027"
down_revision = "0026"


def upgrade() -> None:
    """Add ``source`` to the tables with data of a source, and to their primary and unique keys.

    Adding a column with a constant default changes the catalog only. The default is then ``ops.current_source()``, so
    that rows get the source of the session that inserts them. The indexes of the keys are built again. The column is
    the last of a key, so that a look-up without it still uses the index.
    """
    op.execute("""
        CREATE FUNCTION ops.current_source() RETURNS text LANGUAGE sql STABLE PARALLEL SAFE AS $$
            SELECT coalesce(nullif(current_setting('fhir_assets.source', true), ''), 'default')
        $$;
        COMMENT ON FUNCTION ops.current_source() IS
            'The source of the session: the setting fhir_assets.source of the connection, or default';

        ALTER TABLE ops.consents RENAME COLUMN source TO basis;
        COMMENT ON COLUMN ops.consents.basis IS 'The provision of the Consent that the decision comes from';
    """)
    op.execute("""
        ALTER TABLE fhir.resource
            ADD COLUMN source text NOT NULL DEFAULT 'default',
            DROP CONSTRAINT resource_pkey,
            ADD PRIMARY KEY (resource_type, id, source);
        COMMENT ON COLUMN fhir.resource.source IS 'The key of the source; ids are unique within a source';

        DO $$
        DECLARE
            view_table regclass;
        BEGIN
            FOR view_table IN
                SELECT c.oid::regclass
                FROM ops.view_tables v
                JOIN pg_class c ON c.relname = v.name AND c.relnamespace = 'fhir'::regnamespace
            LOOP
                EXECUTE format('ALTER TABLE %s ADD COLUMN _source text NOT NULL DEFAULT ''default''', view_table);
                EXECUTE format('ALTER TABLE %s ALTER COLUMN _source SET DEFAULT ops.current_source()', view_table);
                EXECUTE format('COMMENT ON COLUMN %s._source IS ''Key of the source of the resource''', view_table);
            END LOOP;
        END $$;
    """)
    op.execute("""
        ALTER TABLE ops.loaded_parts
            ADD COLUMN source text NOT NULL DEFAULT 'default',
            DROP CONSTRAINT loaded_parts_pkey,
            ADD PRIMARY KEY (resource_type, partition_key, part, source);
        ALTER TABLE ops.checkpoints
            ADD COLUMN source text NOT NULL DEFAULT 'default',
            DROP CONSTRAINT checkpoints_pkey,
            ADD PRIMARY KEY (resource_type, source);
        ALTER TABLE ops.deletion_checkpoints
            ADD COLUMN source text NOT NULL DEFAULT 'default',
            DROP CONSTRAINT deletion_checkpoints_pkey,
            ADD PRIMARY KEY (resource_type, source);
        ALTER TABLE ops.deletion_parts
            ADD COLUMN source text NOT NULL DEFAULT 'default',
            DROP CONSTRAINT deletion_parts_pkey,
            ADD PRIMARY KEY (name, source);
        ALTER TABLE ops.ingestion_runs
            ADD COLUMN source text NOT NULL DEFAULT 'default',
            DROP CONSTRAINT ingestion_runs_pkey,
            ADD PRIMARY KEY (run_id, resource_type, partition_key, source);
        ALTER TABLE ops.dead_letters
            ADD COLUMN source text NOT NULL DEFAULT 'default',
            DROP CONSTRAINT dead_letters_fingerprint_key,
            ADD UNIQUE (fingerprint, source);
        ALTER TABLE ops.corrections
            ADD COLUMN source text NOT NULL DEFAULT 'default',
            DROP CONSTRAINT corrections_pkey,
            ADD PRIMARY KEY (fingerprint, source);
        ALTER TABLE ops.missing_references
            ADD COLUMN source text NOT NULL DEFAULT 'default',
            DROP CONSTRAINT missing_references_pkey,
            ADD PRIMARY KEY (resource_type, resource_id, source);
        ALTER TABLE ops.received
            ADD COLUMN source text NOT NULL DEFAULT 'default',
            DROP CONSTRAINT received_pkey,
            ADD PRIMARY KEY (origin, resource_type, partition_key, source);
        ALTER TABLE ops.landing_files
            ADD COLUMN source text NOT NULL DEFAULT 'default',
            DROP CONSTRAINT landing_files_pkey,
            ADD PRIMARY KEY (zone, name, source);
        ALTER TABLE ops.bulk_exports
            ADD COLUMN source text NOT NULL DEFAULT 'default';
    """)
    op.execute("""
        ALTER TABLE ops.withheld
            ADD COLUMN source text NOT NULL DEFAULT 'default',
            DROP CONSTRAINT withheld_pkey,
            ADD PRIMARY KEY (resource_type, id, source);
        ALTER TABLE ops.consent_records
            ADD COLUMN source text NOT NULL DEFAULT 'default',
            DROP CONSTRAINT consent_records_pkey,
            ADD PRIMARY KEY (consent_id, source);
        ALTER TABLE ops.consents
            ADD COLUMN source text NOT NULL DEFAULT 'default',
            DROP CONSTRAINT consents_pkey,
            ADD PRIMARY KEY (patient_id, purpose, source);
        ALTER TABLE ops.consent_changes
            ADD COLUMN source text NOT NULL DEFAULT 'default',
            DROP CONSTRAINT consent_changes_pkey,
            ADD PRIMARY KEY (patient_id, source);
        ALTER TABLE ops.visit_persons
            ADD COLUMN source text NOT NULL DEFAULT 'default',
            DROP CONSTRAINT visit_persons_pkey,
            ADD PRIMARY KEY (id, source);
        ALTER TABLE ops.visit_persons_elsewhere
            ADD COLUMN source text NOT NULL DEFAULT 'default',
            DROP CONSTRAINT visit_persons_elsewhere_pkey,
            ADD PRIMARY KEY (id, source);
        ALTER TABLE ops.visits
            ADD COLUMN source text NOT NULL DEFAULT 'default',
            DROP CONSTRAINT visits_pkey,
            ADD PRIMARY KEY (id, source);
        ALTER TABLE ops.visit_files
            ADD COLUMN source text NOT NULL DEFAULT 'default',
            DROP CONSTRAINT visit_files_pkey,
            ADD PRIMARY KEY (origin, source);
        ALTER TABLE ops.visit_posts
            ADD COLUMN source text NOT NULL DEFAULT 'default',
            DROP CONSTRAINT visit_posts_pkey,
            ADD PRIMARY KEY (task_id, source);
    """)
    op.execute("""
        DO $$
        DECLARE
            keyed regclass;
        BEGIN
            FOR keyed IN
                SELECT attrelid::regclass
                FROM pg_attribute
                JOIN pg_class ON pg_class.oid = attrelid
                WHERE attname = 'source'
                    AND relkind IN ('r', 'p')
                    AND relnamespace IN ('fhir'::regnamespace, 'ops'::regnamespace)
                    AND attrelid <> 'ops.sources'::regclass
            LOOP
                EXECUTE format('ALTER TABLE %s ALTER COLUMN source SET DEFAULT ops.current_source()', keyed);
                EXECUTE format('COMMENT ON COLUMN %s.source IS ''The key of the source''', keyed);
            END LOOP;
        END $$;
    """)
