"""Encrypted patient data: the id of its key, and the patients to whom a resource belongs."""

from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """An encrypted resource is a JSON string in the column that otherwise holds the resource's JSON object."""
    op.execute("""
        CREATE TABLE ops.encryption (
            one boolean PRIMARY KEY DEFAULT true CHECK (one),
            key_id text NOT NULL,
            secret bytea NOT NULL,
            sealed_at timestamptz NOT NULL DEFAULT now()
        );
        COMMENT ON TABLE ops.encryption IS
            'The secret of the hash keys, sealed with the key that key_id names: who cannot open it has the wrong keys';

        ALTER TABLE fhir.resource ADD COLUMN sealed_by text, ADD COLUMN patients text[];
        CREATE INDEX ON fhir.resource ((patients[1]));
        CREATE INDEX ON fhir.resource USING gin (patients) WHERE cardinality(patients) > 1;
        COMMENT ON COLUMN fhir.resource.resource IS
            'The resource as a JSON object; where sealed_by is set a JSON string: base64 of its sealed bytes';
        COMMENT ON COLUMN fhir.resource.sealed_by IS 'Id of the key that seals the resource; null: in the clear';
        COMMENT ON COLUMN fhir.resource.patients IS
            'Ids of the patients whose compartment the resource belongs to; empty if none, null if not known yet';

        ALTER TABLE ops.dead_letters ADD COLUMN sealed_by text;
        COMMENT ON COLUMN ops.dead_letters.sealed_by IS 'Id of the key that seals the resource; null: in the clear';
    """)
