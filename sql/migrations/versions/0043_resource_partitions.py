"""A schema of their own for the partitions of fhir.resource, so that tools do not list them beside the tables."""

from alembic import op

revision = "0043"
down_revision = "0042"


def upgrade() -> None:
    """Move the partitions. This changes the catalog only, independently of the number of rows."""
    op.execute("""
        CREATE SCHEMA IF NOT EXISTS fhir_partitions;
        COMMENT ON SCHEMA fhir_partitions IS 'The partitions of fhir.resource, one for each resource type';

        DO $$
        DECLARE
            attempts_left integer = 100;
        BEGIN
            -- Readers that come while this waits have to wait, too. Hence it waits for less than two seconds at a time
            -- and lets them pass. That is longer than the deadlock_timeout, after which a vacuum gives way.
            SET LOCAL lock_timeout = '1900ms';
            LOOP
                BEGIN
                    LOCK TABLE fhir.resource IN ACCESS EXCLUSIVE MODE;
                    EXIT;
                EXCEPTION WHEN lock_not_available OR deadlock_detected THEN
                    attempts_left = attempts_left - 1;
                    IF attempts_left = 0 THEN
                        RAISE;
                    END IF;
                END;
                PERFORM pg_sleep(1);
            END LOOP;
            SET LOCAL lock_timeout TO DEFAULT;
        END $$;

        DO $$
        DECLARE
            partition regclass;
        BEGIN
            FOR partition IN
                SELECT c.oid
                FROM pg_inherits i
                JOIN pg_class c ON c.oid = i.inhrelid
                WHERE i.inhparent = 'fhir.resource'::regclass
                    AND c.relnamespace = 'fhir'::regnamespace
                ORDER BY c.relname
            LOOP
                EXECUTE format('ALTER TABLE %s SET SCHEMA fhir_partitions', partition);
            END LOOP;
        END $$;
    """)
