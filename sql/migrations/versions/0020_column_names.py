"""Rename columns, indexes and comments to the terms of FHIR and of encryption. Only the catalog changes, no row."""

from alembic import op

revision = "0020"
down_revision = "0019"


def upgrade() -> None:
    """Rename columns of ``fhir.resource`` and its partitions, of the tables of the views, and of schema ``ops``.

    A rename takes an exclusive lock for an instant and rewrites nothing, whatever the size of the table.
    """
    op.execute("""
        ALTER TABLE fhir.resource RENAME COLUMN sealed_by TO key_id;
        ALTER TABLE ops.dead_letters RENAME COLUMN sealed_by TO key_id;
        ALTER TABLE ops.corrections RENAME COLUMN sealed_by TO key_id;
        ALTER TABLE ops.idempotency RENAME COLUMN sealed_by TO key_id;
        ALTER TABLE ops.consent_records RENAME COLUMN sealed_by TO key_id;
        ALTER TABLE ops.withheld RENAME COLUMN sealed_by TO key_id;
        ALTER TABLE ops.encryption RENAME COLUMN sealed_at TO encrypted_at;
        ALTER TABLE ops.key_rotations RENAME COLUMN doing TO current_step;
        ALTER TABLE ops.dead_letters RENAME COLUMN judged_by TO ruleset;
        ALTER TABLE ops.dead_letters RENAME COLUMN marked_at TO replay_requested_at;
        ALTER TABLE ops.received RENAME COLUMN door TO channel;
        ALTER INDEX ops.dead_letters_stage_resource_type_judged_by_idx
            RENAME TO dead_letters_stage_resource_type_ruleset_idx;
        ALTER INDEX ops.incidents_untold RENAME TO incidents_unannounced;
    """)
    op.execute("""
        DO $$
        DECLARE
            view_table regclass;
        BEGIN
            FOR view_table IN
                SELECT c.oid::regclass
                FROM ops.view_tables v
                JOIN pg_class c ON c.relname = v.name AND c.relnamespace = 'fhir'::regnamespace
                JOIN pg_attribute a ON a.attrelid = c.oid AND a.attname = '_sealed_by' AND NOT a.attisdropped
            LOOP
                EXECUTE format('ALTER TABLE %s RENAME COLUMN _sealed_by TO _key_id', view_table);
            END LOOP;
        END $$;
    """)
    op.execute("""
        COMMENT ON TABLE fhir.resource IS
            'The newest version of every loaded resource as complete JSON; for a deleted one, the time of its deletion';
        COMMENT ON COLUMN fhir.resource.version_number IS
            'meta.versionId where it is a number: orders versions that have the same meta.lastUpdated';
        COMMENT ON COLUMN fhir.resource.last_updated IS 'meta.lastUpdated; null where the source sent none';
        COMMENT ON COLUMN fhir.resource.as_of IS
            'last_updated, or the time of arrival where that is null: an older version never replaces a newer one';
        COMMENT ON COLUMN fhir.resource.partition_key IS 'The window that the version belongs to';
        COMMENT ON COLUMN fhir.resource.run_id IS 'The Dagster run that loaded the version';
        COMMENT ON COLUMN fhir.resource.resource IS
            'The resource as a JSON object; where key_id is set, a JSON string: base64 of the encrypted bytes';
        COMMENT ON COLUMN fhir.resource.key_id IS 'Id of the key that encrypts the resource; null: not encrypted';
        COMMENT ON COLUMN fhir.resource.patients IS
            'Ids of the patients whose compartment contains the resource; empty: no patient, null: not known yet';
        COMMENT ON COLUMN fhir.resource.deleted_at IS
            'When the source deleted the resource; then resource is null and no view has rows of it';

        COMMENT ON SCHEMA fhir IS
            'FHIR resources: one table for each ViewDefinition, and fhir.resource with complete JSON';
        COMMENT ON SCHEMA ops IS 'State of the pipeline: runs, dead letters, checkpoints, consents, audit log';

        COMMENT ON TABLE ops.view_tables IS 'The table layout last applied for each view';
        COMMENT ON TABLE ops.loaded_parts IS
            'Parts of the store whose resources are in the tables; written in the transaction that loads them';
        COMMENT ON TABLE ops.checkpoints IS 'The time up to which each resource type is loaded without a gap';
        COMMENT ON COLUMN ops.checkpoints.loaded_until IS 'Every resource updated before this time is in the tables';
        COMMENT ON COLUMN ops.checkpoints.source_state IS
            'Fingerprint of the source files when loading began; null for a server';
        COMMENT ON TABLE ops.deletion_checkpoints IS
            'Every deletion on the server before applied_until is applied to the tables (FHIR_DELETES=history)';
        COMMENT ON TABLE ops.deletion_parts IS
            'Parts of the store''s layer deleted whose deletions are applied to the tables; empty in a new database';
        COMMENT ON TABLE ops.ingestion_runs IS
            'One row for each run, resource type and partition; a count is null until its layer has run';
        COMMENT ON COLUMN ops.ingestion_runs.seconds IS
            'Time spent in the steps of the resource type, summed over all partitions of the run';
        COMMENT ON VIEW ops.run_types IS 'One row for each run and resource type, summed over its windows';
        COMMENT ON VIEW ops.run_summary IS 'One row for each run, summed over its resource types and windows';
    """)
    op.execute("""
        COMMENT ON TABLE ops.dead_letters IS
            'Resources that failed a step, each with the reason; messages contain no patient data';
        COMMENT ON COLUMN ops.dead_letters.fingerprint IS
            'Hash of stage, type, partition and content: a repeated failure updates the same row';
        COMMENT ON COLUMN ops.dead_letters.resource IS 'The bytes as received, which may not be JSON';
        COMMENT ON COLUMN ops.dead_letters.run_id IS 'The run in which the resource failed last';
        COMMENT ON COLUMN ops.dead_letters.occurrences IS
            'How often the same content occurred in the last run that received it';
        COMMENT ON COLUMN ops.dead_letters.attempts IS 'The number of runs in which the resource failed';
        COMMENT ON COLUMN ops.dead_letters.key_id IS 'Id of the key that encrypts the resource; null: not encrypted';
        COMMENT ON COLUMN ops.dead_letters.last_updated IS
            'meta.lastUpdated of the resource if readable: a newer version in the tables resolves the dead letter';
        COMMENT ON COLUMN ops.dead_letters.ruleset IS
            'Fingerprint of the validation rules (stage validate) or views (transform, load) of the last failure';
        COMMENT ON COLUMN ops.dead_letters.replay_requested_at IS 'When a replay was requested';
        COMMENT ON COLUMN ops.dead_letters.claimed_by IS 'The run that replays the dead letter; one run at a time';
        COMMENT ON COLUMN ops.dead_letters.resolution IS
            'How it was resolved (replayed, corrected, superseded by a newer version, …), or why it was discarded';
        COMMENT ON COLUMN ops.dead_letters.origin IS
            'The origin in ops.received that the resource came from; null if it was fetched from the source';
        COMMENT ON TABLE ops.corrections IS
            'Resources corrected by hand, by the fingerprint of their dead letter: a replay uses the correction '
            'instead of the original';
        COMMENT ON TABLE ops.missing_references IS
            'References of loaded resources that the server did not return; requested again after one day';

        COMMENT ON TABLE ops.received IS
            'Resources that entered raw through another channel than the source; loaded_at is set in the transaction '
            'that loads them';
        COMMENT ON COLUMN ops.received.origin IS 'Identity of the input, for example landing:<sha256>; received once';
        COMMENT ON COLUMN ops.received.channel IS 'The ingestion channel: the part of origin before the colon';
        COMMENT ON COLUMN ops.received.parts IS 'The parts of the raw partition that contain the resources';
        COMMENT ON COLUMN ops.received.asked IS 'The number of runs that were requested to load the resources';
        COMMENT ON TABLE ops.landing_files IS 'Files of the landing zone; equal content is loaded once';
        COMMENT ON COLUMN ops.landing_files.name IS 'Path of the file in the zone, which may contain a patient''s name';
        COMMENT ON COLUMN ops.landing_files.mark IS
            'Version of the content: the modification time of a file, the ETag of an S3 object';
        COMMENT ON COLUMN ops.landing_files.skipped IS
            'The number of resources by type, for types that this deployment does not load';
        COMMENT ON COLUMN ops.landing_files.known_before IS 'True if equal content had been received before';
        COMMENT ON COLUMN ops.landing_files.batch IS
            'The batch of visit files that the file is received in; null for files of other kinds';
        COMMENT ON TABLE ops.idempotency IS
            'Responses to requests with an Idempotency-Key: a repeated request gets the stored response for a day';
    """)
    op.execute("""
        COMMENT ON TABLE ops.visit_persons IS
            'Persons in visit files by the id of their Patient resource; one for each medical record number';
        COMMENT ON COLUMN ops.visit_persons.content IS 'Keyed hash of the known facts about the person';
        COMMENT ON COLUMN ops.visit_persons.as_of IS 'Time of the newest file that states these facts';
        COMMENT ON TABLE ops.visits IS
            'Visits by the id of their Encounter resource; one for each account number, never changed';
        COMMENT ON TABLE ops.visit_files IS 'Counts of each received file of visits';
        COMMENT ON COLUMN ops.visit_files.patients IS 'Persons that were not known before';
        COMMENT ON COLUMN ops.visit_files.updates IS 'Rows with new facts about a known person';
        COMMENT ON COLUMN ops.visit_files.outdated IS 'Rows whose facts about a person a newer file contradicts';
        COMMENT ON COLUMN ops.visit_files.repeats IS 'Known visits with the same content';
        COMMENT ON COLUMN ops.visit_files.conflicts IS 'Known visits with other content; they become dead letters';
        COMMENT ON COLUMN ops.visit_files.received_as IS 'The origin in ops.received that the file was received with';
        COMMENT ON COLUMN ops.visit_files.rows IS 'The number of resources written to raw';
        COMMENT ON COLUMN ops.visit_files.rejected IS 'The number of rows that became dead letters';
        COMMENT ON TABLE ops.visit_posts IS 'Lists of visits posted to the API, and the file written for each';
        COMMENT ON TABLE ops.visit_persons_elsewhere IS
            'When another channel than visits last received a Patient: a newer row of visits then counts as new facts '
            'even if it repeats an earlier row';

        COMMENT ON TABLE ops.bulk_exports IS
            'Bulk Data exports ($export) requested of a FHIR server; an interrupted export is continued';
        COMMENT ON COLUMN ops.bulk_exports.since IS 'The _since parameter; null: all resources';
        COMMENT ON COLUMN ops.bulk_exports.transaction_time IS
            'Every resource updated before this time is in the export';
        COMMENT ON COLUMN ops.bulk_exports.files_done IS
            'Indexes in the manifest''s output of the files that are in the store';
        COMMENT ON TABLE ops.bulk_parts IS 'Parts of the store that contain downloaded resources of an export';

        COMMENT ON TABLE ops.consent_records IS
            'The newest version of every Consent resource, including withheld ones';
        COMMENT ON TABLE ops.consents IS
            'The decision for a patient and a purpose, and the Consent and provision it comes from; no row: undecided';
        COMMENT ON TABLE ops.consent_changes IS
            'When to decide on a patient again: a Consent was received, or a period begins or ends';
        COMMENT ON TABLE ops.consent_policy IS 'The consent policy applied to the tables; no row: off';
        COMMENT ON TABLE ops.withheld IS
            'Resources that consent keeps out of the tables; they are loaded when consent permits it';

        COMMENT ON TABLE ops.encryption IS
            'The secret of the keyed hashes, encrypted with the key named by key_id: a wrong key is detected here';
        COMMENT ON TABLE ops.key_rotations IS
            'Executions of `fhir-assets keys rotate`; one without ended_at that is not running was interrupted';
        COMMENT ON COLUMN ops.key_rotations.key_id IS 'The key that encrypts everything after the rotation';
        COMMENT ON COLUMN ops.key_rotations.current_step IS
            'The table, resource type or layer of the store that is being encrypted again';
        COMMENT ON COLUMN ops.key_rotations.total IS
            'Rows and parts at the start that are not encrypted with the newest key';
        COMMENT ON COLUMN ops.key_rotations.left_over IS
            'Rows and parts that could not be encrypted again; 0: the rotation is complete';

        COMMENT ON TABLE ops.audit_log IS
            'Accesses and changes by actor; append-only, verified by `fhir-assets audit verify`';
        COMMENT ON COLUMN ops.audit_log.subject IS
            'Keyed hash of the resource''s type and id; null for bulk actions';
        COMMENT ON COLUMN ops.audit_log.count IS 'The number of resources that the action touched';
        COMMENT ON COLUMN ops.audit_log.link IS
            'Hash of this record and the link of the record before; an HMAC where keyed is true';
        COMMENT ON TABLE ops.audit_head IS 'The sequence number and the link of the last record of ops.audit_log';
        COMMENT ON TABLE ops.incidents IS
            'Failed runs, failed checks and windows behind schedule, each from the first failure to the recovery';
        COMMENT ON COLUMN ops.incidents.name IS 'The job; the check as asset:check; or the schedule';
        COMMENT ON COLUMN ops.incidents.partitions IS
            'Windows or resource types that still fail; empty when the incident is over';
        COMMENT ON COLUMN ops.incidents.alerted_at IS 'When the start of the incident was sent to ALERT_WEBHOOK_URL';
        COMMENT ON COLUMN ops.incidents.all_clear_at IS 'When the end of the incident was sent to ALERT_WEBHOOK_URL';
    """)
