"""Visits that are received as CSV: known persons and visits, and the counts of each file."""

from alembic import op

revision = "0016"
down_revision = "0015"


def upgrade() -> None:
    """Two ledgers of ids and keyed hashes without patient data, a row for each file, and a row for each post."""
    op.execute("""
        CREATE TABLE ops.visit_persons (
            id text PRIMARY KEY,
            version integer NOT NULL,
            content bytea NOT NULL,
            as_of timestamptz NOT NULL,
            origin text NOT NULL
        );
        COMMENT ON TABLE ops.visit_persons IS 'The persons of visits, by the id of their Patient: one an MRN';
        COMMENT ON COLUMN ops.visit_persons.content IS 'Keyed hash of what is known of the person';
        COMMENT ON COLUMN ops.visit_persons.as_of IS 'When the newest file was written that says so';

        CREATE TABLE ops.visits (
            id text PRIMARY KEY,
            person text NOT NULL,
            content bytea NOT NULL,
            origin text NOT NULL
        );
        CREATE INDEX ON ops.visits (person);
        COMMENT ON TABLE ops.visits IS 'Visits by the id of their Encounter, one an account number: never changed';

        CREATE TABLE ops.visit_files (
            origin text PRIMARY KEY,
            patients bigint NOT NULL,
            updates bigint NOT NULL,
            outdated bigint NOT NULL,
            visits bigint NOT NULL,
            repeats bigint NOT NULL,
            conflicts bigint NOT NULL,
            received_at timestamptz NOT NULL DEFAULT clock_timestamp()
        );
        COMMENT ON TABLE ops.visit_files IS 'What each file of visits brought';
        COMMENT ON COLUMN ops.visit_files.patients IS 'Persons that were not known before';
        COMMENT ON COLUMN ops.visit_files.updates IS 'Rows that say something new of a known person';
        COMMENT ON COLUMN ops.visit_files.outdated IS 'Rows that say of a person what a newer file contradicts';
        COMMENT ON COLUMN ops.visit_files.repeats IS 'Visits that were known, with the same content';
        COMMENT ON COLUMN ops.visit_files.conflicts IS 'Visits that were known with other content: dead letters';

        CREATE TABLE ops.visit_posts (
            task_id text PRIMARY KEY,
            zone text NOT NULL,
            csv_filename text NOT NULL,
            records bigint NOT NULL,
            rejected bigint NOT NULL,
            posted_by text NOT NULL,
            posted_at timestamptz NOT NULL DEFAULT clock_timestamp()
        );
        COMMENT ON TABLE ops.visit_posts IS 'Lists of visits that were posted, and the file that each became';
    """)
