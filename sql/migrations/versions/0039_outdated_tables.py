"""Tables whose rows `fhir-assets migrate` has still to fill, so that a rebuild that was killed is continued."""

from alembic import op

revision = "0039"
down_revision = "0038"


def upgrade() -> None:
    op.execute("""
        ALTER TABLE ops.view_tables ADD COLUMN outdated boolean NOT NULL DEFAULT false;
        COMMENT ON COLUMN ops.view_tables.outdated IS
            'Whether the table was changed and its rows are not all written again: `fhir-assets migrate` writes them';
    """)
