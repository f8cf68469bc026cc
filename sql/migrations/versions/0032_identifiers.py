"""Identifiers by which conditional references find resources."""

from alembic import op

revision = "0032"
down_revision = "0031"


def upgrade() -> None:
    """Resources with conditional references are marked, so that the next load examines them. All others keep null.

    The identifiers of a type are determined when a conditional reference names it.
    """
    op.execute("""
        ALTER TABLE fhir.resource ADD COLUMN identifiers text[];
        CREATE INDEX ON fhir.resource USING gin (identifiers) WHERE identifiers IS NOT NULL;
        COMMENT ON COLUMN fhir.resource.identifiers IS
            'Hashes of identifiers (#), hashes of those in conditional references (?Type#), and ? if one of the '
            'references has no resource; null, or -: its own are not known, as no conditional reference names the type';

        CREATE TABLE ops.identifier_types (
            resource_type text NOT NULL,
            tokens text NOT NULL,
            complete boolean NOT NULL DEFAULT false,
            source text NOT NULL DEFAULT ops.current_source(),
            PRIMARY KEY (resource_type, source)
        );
        COMMENT ON TABLE ops.identifier_types IS
            'Types that conditional references name, whose resources are loaded with hashes of their identifiers';
        COMMENT ON COLUMN ops.identifier_types.tokens IS 'The rules and the key by which identifiers were hashed';
        COMMENT ON COLUMN ops.identifier_types.complete IS 'Whether all resources of the type have their identifiers';
        COMMENT ON COLUMN ops.identifier_types.source IS 'The key of the source';

        UPDATE fhir.resource
        SET identifiers = '{?,-}'
        WHERE keyless <> '{}'
            AND resource IS NOT NULL
            AND EXISTS (SELECT FROM unnest(keyless) form WHERE starts_with(form, 'conditional'));
    """)
