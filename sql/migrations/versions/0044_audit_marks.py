"""Functions that alone append to the audit log, who wrote a record, and the flag of the mark in the store."""

from alembic import op

revision = "0044"
down_revision = "0043"


def upgrade() -> None:
    """Who may append to the audit log executes the functions, and needs no right to its tables.

    The link of a record is computed by its writer, who has the keys, and not by ``ops.append_audit``.
    """
    op.execute("""
        ALTER TABLE ops.audit_log
            ADD COLUMN IF NOT EXISTS database_user text,
            ADD COLUMN IF NOT EXISTS account text,
            ADD COLUMN IF NOT EXISTS claim text;
        COMMENT ON COLUMN ops.audit_log.database_user IS
            'The login of the session that wrote the record, as Postgres knows it; null before migration 0044';
        COMMENT ON COLUMN ops.audit_log.account IS
            'The account of the operating system that the process ran as, by its uid; null before migration 0044';
        COMMENT ON COLUMN ops.audit_log.claim IS
            'The name that the caller gave (--by, LOGNAME) where it differs from the account; nobody verified it';

        ALTER TABLE ops.audit_head ADD COLUMN IF NOT EXISTS has_mark boolean NOT NULL DEFAULT false;
        COMMENT ON COLUMN ops.audit_head.has_mark IS
            'Whether audit.json in the store has vouched for the end of the log: it must not be missing since';

        CREATE OR REPLACE FUNCTION ops.lock_audit_head(
            OUT seq bigint, OUT link bytea, OUT at timestamptz, OUT database_user text
        )
        LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
        BEGIN
            SELECT h.seq, h.link INTO seq, link FROM ops.audit_head h FOR UPDATE;
            at := clock_timestamp();
            database_user := session_user;
        END $$;
        COMMENT ON FUNCTION ops.lock_audit_head() IS
            'Locks the end of the audit log until the transaction ends, and returns what the next link depends on';

        CREATE OR REPLACE FUNCTION ops.append_audit(at timestamptz, records jsonb) RETURNS bigint
        LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
        DECLARE
            last bigint;
        BEGIN
            SELECT h.seq INTO STRICT last FROM ops.audit_head h FOR UPDATE;
            INSERT INTO ops.audit_log (
                seq, at, action, actor, resource_type, subject, count, run_id, request_id, detail, keyed, link,
                database_user, account, claim
            )
            SELECT
                last + e.position, append_audit.at, r.action, r.actor, r.resource_type, r.subject, r.count, r.run_id,
                r.request_id, r.detail, r.keyed, decode(r.link, 'hex'), session_user, r.account, r.claim
            FROM jsonb_array_elements(append_audit.records) WITH ORDINALITY AS e (record, position)
            CROSS JOIN LATERAL jsonb_to_record(e.record) AS r (
                action text, actor text, resource_type text, subject text, count bigint, run_id text, request_id text,
                detail jsonb, keyed boolean, link text, account text, claim text
            );
            UPDATE ops.audit_head h
            SET seq = l.seq, link = l.link
            FROM ops.audit_log l
            WHERE l.seq = last + jsonb_array_length(append_audit.records);
            RETURN last + jsonb_array_length(append_audit.records);
        END $$;
        COMMENT ON FUNCTION ops.append_audit(timestamptz, jsonb) IS
            'Appends records to the audit log. The number and the login are not the caller''s to choose';

        CREATE OR REPLACE FUNCTION ops.confirm_audit_mark() RETURNS void
        LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
            UPDATE ops.audit_head SET has_mark = true WHERE NOT has_mark;
        $$;
        COMMENT ON FUNCTION ops.confirm_audit_mark() IS 'Records that audit.json in the store exists';

        CREATE OR REPLACE FUNCTION ops.commit_synchronously() RETURNS trigger
        LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
        BEGIN
            IF current_setting('synchronous_commit') = 'off' THEN
                PERFORM set_config('synchronous_commit', 'on', true);
            END IF;
            RETURN NULL;
        END $$;
        COMMENT ON FUNCTION ops.commit_synchronously() IS
            'Makes the commit of the transaction wait for the disk, whatever the settings of the server, the database, '
            'the role and the session say';

        -- Deferred to the commit: it acts after every statement of the caller.
        DROP TRIGGER IF EXISTS commit_synchronously ON ops.audit_head;
        CREATE CONSTRAINT TRIGGER commit_synchronously AFTER UPDATE ON ops.audit_head
            DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION ops.commit_synchronously();

        REVOKE EXECUTE ON FUNCTION ops.lock_audit_head() FROM PUBLIC;
        REVOKE EXECUTE ON FUNCTION ops.append_audit(timestamptz, jsonb) FROM PUBLIC;
        REVOKE EXECUTE ON FUNCTION ops.confirm_audit_mark() FROM PUBLIC;
        REVOKE EXECUTE ON FUNCTION ops.commit_synchronously() FROM PUBLIC;
    """)
