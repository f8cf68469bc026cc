"""Group roles for readers, operators and loaders. They cannot log in."""

from alembic import op

revision = "0015"
down_revision = "0014"


def upgrade() -> None:
    """Roles belong to the whole server: they may exist already, and the migrating user may not be allowed to create
    them.

    Their rights are granted by ``warehouse/postgres/db/roles.py`` after each migration.
    """
    op.execute("""
        DO $$
        DECLARE
            role text;
        BEGIN
            FOREACH role IN ARRAY ARRAY['fhir_reader', 'fhir_operator', 'fhir_loader'] LOOP
                IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = role) THEN
                    BEGIN
                        EXECUTE format('CREATE ROLE %I NOLOGIN', role);
                    EXCEPTION
                        WHEN duplicate_object OR unique_violation THEN NULL;
                        WHEN insufficient_privilege THEN RAISE NOTICE 'may not create role %', role;
                    END;
                END IF;
            END LOOP;
        END $$;
    """)
