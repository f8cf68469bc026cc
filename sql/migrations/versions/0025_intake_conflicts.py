"""Hashes of the name and of the birth date of a person of visits; files that the landing zone passes over."""

from alembic import op

revision = "0025"
down_revision = "0024"


def upgrade() -> None:
    """Persons that were received before have empty hashes until their next row: what they hash is not known."""
    op.execute("""
        ALTER TABLE ops.visit_persons
            ADD COLUMN name bytea NOT NULL DEFAULT '',
            ADD COLUMN birth bytea NOT NULL DEFAULT '';
        COMMENT ON COLUMN ops.visit_persons.name IS 'Keyed hash of the name; empty: not known';
        COMMENT ON COLUMN ops.visit_persons.birth IS 'Keyed hash of the birth date; empty: not known';

        ALTER TABLE ops.landing_files
            DROP CONSTRAINT landing_files_status_check,
            ADD CONSTRAINT landing_files_status_check
                CHECK (status IN ('arriving', 'ready', 'loaded', 'failed', 'ignored'));
        COMMENT ON COLUMN ops.landing_files.status IS
            'arriving, ready, loaded, failed; ignored: the suffix is none of those that the landing zone reads';
    """)
