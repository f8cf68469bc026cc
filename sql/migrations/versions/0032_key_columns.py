"""The column of each view's table that has the id of the row's resource."""

from alembic import op

revision = "0032"
down_revision = "0031"


def upgrade() -> None:
    """Tables keep the column _resource_key until their view is applied again: it is dropped if the view has a key."""
    op.execute("""
        ALTER TABLE ops.view_tables ADD COLUMN key_column text NOT NULL DEFAULT '_resource_key';
        COMMENT ON COLUMN ops.view_tables.key_column IS 'The column of the table with the id of the resource';
    """)
