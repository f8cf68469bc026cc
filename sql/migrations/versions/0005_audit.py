"""The audit log: append-only, each record linked to the previous one."""

from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """``ops.audit_head`` has the number and link of the last record, and serves as the lock that serializes records."""
    op.execute("""
        CREATE TABLE ops.audit_log (
            seq bigint PRIMARY KEY,
            at timestamptz NOT NULL,
            action text NOT NULL,
            actor text NOT NULL,
            resource_type text,
            subject text,
            count bigint NOT NULL,
            run_id text,
            request_id text,
            detail jsonb NOT NULL,
            keyed boolean NOT NULL,
            link bytea NOT NULL
        );
        CREATE INDEX ON ops.audit_log (subject, seq) WHERE subject IS NOT NULL;
        CREATE INDEX ON ops.audit_log (at);
        CREATE INDEX ON ops.audit_log (run_id) WHERE run_id IS NOT NULL;
        COMMENT ON TABLE ops.audit_log IS
            'Who did what to whose data; append-only, checked by `fhir-assets audit verify`';
        COMMENT ON COLUMN ops.audit_log.subject IS 'Keyed hash of the resource''s type and id; null for bulk deeds';
        COMMENT ON COLUMN ops.audit_log.count IS 'How many resources the deed touched';
        COMMENT ON COLUMN ops.audit_log.link IS 'Hash of this record and the link before; an HMAC where keyed';

        CREATE TABLE ops.audit_head (
            one boolean PRIMARY KEY DEFAULT true CHECK (one),
            seq bigint NOT NULL,
            link bytea NOT NULL
        );
        INSERT INTO ops.audit_head (seq, link) VALUES (0, decode(repeat('00', 32), 'hex'));
        COMMENT ON TABLE ops.audit_head IS 'The number and the link of the last record of ops.audit_log';

        CREATE FUNCTION ops.refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            RAISE EXCEPTION '% on %.% is refused: the audit log is append-only', TG_OP, TG_TABLE_SCHEMA, TG_TABLE_NAME
                USING ERRCODE = 'insufficient_privilege';
        END $$;
        CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON ops.audit_log
            FOR EACH STATEMENT EXECUTE FUNCTION ops.refuse_change();
        CREATE TRIGGER kept BEFORE DELETE OR TRUNCATE ON ops.audit_head
            FOR EACH STATEMENT EXECUTE FUNCTION ops.refuse_change();
    """)
