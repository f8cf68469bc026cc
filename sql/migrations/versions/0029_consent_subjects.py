"""The subjects of resources beyond the patients of their compartments, and denials whose patient is not known."""

from alembic import op

revision = "0029"
down_revision = "0028"


def upgrade() -> None:
    """``mentions`` is null until a consent policy is on and its first run determines it, so that the index is empty."""
    op.execute("""
        ALTER TABLE fhir.resource ADD COLUMN mentions text[];
        CREATE INDEX ON fhir.resource USING gin (mentions) WHERE mentions IS NOT NULL;
        COMMENT ON COLUMN fhir.resource.mentions IS
            'For consent: what the resource refers to, and tokens of identifiers; null: not known, or no policy is on';

        ALTER TABLE ops.withheld
            ADD COLUMN mentions text[],
            ADD COLUMN direct boolean NOT NULL DEFAULT true,
            ADD COLUMN due boolean NOT NULL DEFAULT true;
        CREATE INDEX ON ops.withheld USING gin (mentions);
        CREATE INDEX ON ops.withheld (resource_type, id) WHERE due;
        COMMENT ON COLUMN ops.withheld.mentions IS
            'What the resource refers to, and tokens of identifiers; null: not known';
        COMMENT ON COLUMN ops.withheld.direct IS
            'Whether consent itself withholds the resource, and not only because it refers to another withheld one';
        COMMENT ON COLUMN ops.withheld.due IS
            'Whether the next application of consent must look at the resource';

        ALTER TABLE ops.consent_records ADD COLUMN keys text[];
        UPDATE ops.consent_records SET keys = ARRAY[patient_id];
        ALTER TABLE ops.consent_records ALTER COLUMN keys SET NOT NULL, DROP COLUMN patient_id;
        CREATE INDEX ON ops.consent_records USING gin (keys);
        COMMENT ON COLUMN ops.consent_records.keys IS
            'Whom the Consent is about: ids of patients, #tokens of identifiers, @arrival or ?id if it is not known';

        CREATE INDEX ON ops.consents (patient_id) WHERE starts_with(patient_id, '@');
        COMMENT ON COLUMN ops.consents.patient_id IS
            'The id of a patient, or another key of ops.consent_records.keys';

        ALTER TABLE ops.consent_policy ADD COLUMN subjects text;
        COMMENT ON COLUMN ops.consent_policy.subjects IS
            'How the subjects of resources were determined, by source (JSON)';

        ALTER TABLE ops.received ADD COLUMN arrivals timestamptz[];
        COMMENT ON COLUMN ops.received.arrivals IS
            'Times of arrival of the resources of the origin; null: not known';
    """)
