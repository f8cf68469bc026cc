"""Group roles: who may read the tables, who looks after what failed, what loads. Nobody logs in as one of them."""

from alembic import op

revision = "0015"
down_revision = "0014"


def upgrade() -> None:
    """Roles belong to the whole server: they may be there already, and a migration may not be allowed to make them.

    What they may do is said in warehouse/roles.py, after each migration anew.
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
