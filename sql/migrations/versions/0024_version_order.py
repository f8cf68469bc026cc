"""The order of versions: a version without a valid ``lastUpdated`` is ordered by its time of arrival."""

from alembic import op

revision = "0024"
down_revision = "0023"


def upgrade() -> None:
    """Add the columns of the order of versions. Versions dated in the future get the time of their load."""
    for table in ("fhir.resource", "ops.withheld", "ops.consent_records"):
        op.execute(f"ALTER TABLE {table} ADD COLUMN arrived timestamptz, ADD COLUMN replaced_last_updated timestamptz")
        op.execute(f"COMMENT ON COLUMN {table}.arrived IS 'Time of arrival; null in rows of earlier releases'")
        op.execute(f"""
            COMMENT ON COLUMN {table}.replaced_last_updated IS
                'If last_updated is null: the newest last_updated of the versions that this one replaced'
        """)
    op.execute("""
        ALTER TABLE ops.consent_records ADD COLUMN last_updated timestamptz;
        UPDATE ops.consent_records c
        SET last_updated = r.last_updated
        FROM fhir.resource r
        WHERE r.resource_type = 'Consent' AND r.id = c.consent_id AND r.as_of = c.as_of;
        UPDATE ops.consent_records c
        SET last_updated = w.last_updated
        FROM ops.withheld w
        WHERE w.resource_type = 'Consent' AND w.id = c.consent_id AND w.as_of = c.as_of;

        COMMENT ON COLUMN fhir.resource.last_updated IS
            'meta.lastUpdated; null without one that counts: of a source, and not in the future';
        COMMENT ON COLUMN fhir.resource.as_of IS 'last_updated, or the time of arrival where that is null';

        UPDATE fhir.resource
        SET last_updated = NULL, as_of = loaded_at, arrived = loaded_at
        WHERE last_updated > loaded_at + interval '5 minutes';
        UPDATE ops.withheld
        SET last_updated = NULL, as_of = now(), arrived = now()
        WHERE last_updated > now() + interval '5 minutes';
        UPDATE ops.consent_records
        SET last_updated = NULL, as_of = now(), arrived = now()
        WHERE as_of > now() + interval '5 minutes';

        ALTER TABLE ops.dead_letters
            ADD COLUMN arrived timestamptz,
            ADD COLUMN dated boolean NOT NULL DEFAULT true;
        COMMENT ON COLUMN ops.dead_letters.arrived IS 'Time of arrival of the resource, if known';
        COMMENT ON COLUMN ops.dead_letters.dated IS
            'False if meta.lastUpdated of the resource does not count (of a client, in the future)';
    """)
