"""Consent: the Consent resources, the decisions that follow from them, and the withheld resources."""

from alembic import op

revision = "0013"
down_revision = "0012"


def upgrade() -> None:
    """A withheld resource is in ``ops.withheld``, in the same form as in ``fhir.resource``."""
    op.execute("""
        CREATE TABLE ops.consent_records (
            consent_id text PRIMARY KEY,
            patient_id text NOT NULL,
            version_id text,
            version_number bigint,
            as_of timestamptz NOT NULL,
            resource jsonb NOT NULL,
            sealed_by text
        );
        CREATE INDEX ON ops.consent_records (patient_id);
        COMMENT ON TABLE ops.consent_records IS 'The newest version of every Consent resource, also of withheld ones';

        CREATE TABLE ops.consents (
            patient_id text NOT NULL,
            purpose text NOT NULL,
            decision text NOT NULL CHECK (decision IN ('permit', 'deny')),
            consent_id text NOT NULL,
            version_id text,
            source text NOT NULL,
            decided_at timestamptz NOT NULL DEFAULT now(),
            PRIMARY KEY (patient_id, purpose)
        );
        CREATE INDEX ON ops.consents (consent_id);
        COMMENT ON TABLE ops.consents IS
            'What holds for a patient and a purpose, and which provision of which Consent says so; no row: none';

        CREATE TABLE ops.consent_changes (
            patient_id text PRIMARY KEY,
            at timestamptz NOT NULL
        );
        CREATE INDEX ON ops.consent_changes (at);
        COMMENT ON TABLE ops.consent_changes IS
            'When a patient is to be decided on next: consents came, or a period begins or ends';

        CREATE TABLE ops.consent_policy (
            one boolean PRIMARY KEY DEFAULT true CHECK (one),
            policy text NOT NULL,
            purpose text NOT NULL
        );
        COMMENT ON TABLE ops.consent_policy IS 'The policy that the tables follow; no row: off';

        CREATE TABLE ops.withheld (
            resource_type text NOT NULL,
            id text NOT NULL,
            version_id text,
            version_number bigint,
            last_updated timestamptz,
            as_of timestamptz NOT NULL,
            partition_key text NOT NULL,
            run_id text NOT NULL,
            withheld_at timestamptz NOT NULL DEFAULT clock_timestamp(),
            sealed_by text,
            patients text[] NOT NULL,
            resource jsonb NOT NULL,
            PRIMARY KEY (resource_type, id)
        );
        CREATE INDEX ON ops.withheld (resource_type, partition_key);
        CREATE INDEX ON ops.withheld USING gin (patients);
        COMMENT ON TABLE ops.withheld IS
            'Resources that consent keeps out of the tables; they go there by themselves when it does no more';
    """)
