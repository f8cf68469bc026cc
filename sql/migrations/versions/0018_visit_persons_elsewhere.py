"""Persons of visits about whom another channel received data."""

from alembic import op

revision = "0018"
down_revision = "0017"


def upgrade() -> None:
    """A separate table, so that a post never waits for a file that is being received."""
    op.execute("""
        CREATE TABLE ops.visit_persons_elsewhere (
            id text PRIMARY KEY,
            at timestamptz NOT NULL
        );
        COMMENT ON TABLE ops.visit_persons_elsewhere IS
            'When another door last said what a Patient is: a newer row of visits is news then, even if it says what '
            'visits said before';
    """)
