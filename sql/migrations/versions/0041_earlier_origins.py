"""Dead letters keep the earlier received inputs that had the same failure."""

from alembic import op

revision = "0041"
down_revision = "0040"


def upgrade() -> None:
    """Add a column without a default, so that no row is rewritten. What is overwritten already stays unknown."""
    op.execute("""
        ALTER TABLE ops.dead_letters ADD COLUMN earlier_origins text[];
        COMMENT ON COLUMN ops.dead_letters.earlier_origins IS
            'Earlier values of origin, the latest 100 first: received inputs that had the same failure. Null: none';
    """)
