"""The references of a resource that have no key."""

from alembic import op

revision = "0026"
down_revision = "0025"


def upgrade() -> None:
    """Resources that were loaded before have null until they are loaded again, because their references are unknown."""
    op.execute("""
        ALTER TABLE fhir.resource ADD COLUMN keyless text[];
        CREATE INDEX ON fhir.resource (resource_type) WHERE keyless <> '{}';
        COMMENT ON COLUMN fhir.resource.keyless IS
            'Forms and types of references that make no key, such as "absolute Patient"; null: not known';
    """)
