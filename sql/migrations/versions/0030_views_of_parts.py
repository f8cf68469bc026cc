"""The views into which a part was loaded."""

from alembic import op

revision = "0030"
down_revision = "0029"


def upgrade() -> None:
    """Parts that were loaded before have null: they are loaded into all views that existed at that time."""
    op.execute("""
        ALTER TABLE ops.loaded_parts ADD COLUMN views text[];
        COMMENT ON COLUMN ops.loaded_parts.views IS 'The views whose tables have its rows; null: all';
    """)
