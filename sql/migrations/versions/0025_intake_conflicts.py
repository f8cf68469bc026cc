"""Hashes of the name and the birth date of persons of visits; ignored files of the landing zone."""

from alembic import op

revision = "0025"
down_revision = "0024"


def upgrade() -> None:
    """Persons that were received before have empty hashes until their next row, because their data is not stored."""
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
