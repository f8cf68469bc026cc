"""Failed ticks are incidents, and the position of the alerts sensor is stored with the incidents."""

from alembic import op

revision = "0035"
down_revision = "0034"


def upgrade() -> None:
    """The sensor begins at the cursor that Dagster has for it."""
    op.execute("""
        ALTER TABLE ops.incidents DROP CONSTRAINT incidents_kind_check;
        ALTER TABLE ops.incidents
            ADD CONSTRAINT incidents_kind_check CHECK (kind IN ('run', 'check', 'behind', 'tick'));
        COMMENT ON COLUMN ops.incidents.name IS 'The job, the check as asset:check, the schedule or the sensor';

        CREATE TABLE ops.alert_cursor (
            one boolean PRIMARY KEY DEFAULT true CHECK (one),
            runs bigint NOT NULL,
            checks bigint NOT NULL
        );
        COMMENT ON TABLE ops.alert_cursor IS
            'The ids of the last events of runs and checks that the sensor alerts has recorded as incidents';
    """)
