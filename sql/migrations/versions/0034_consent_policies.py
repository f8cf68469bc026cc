"""The consent policy of each source."""

from alembic import op

revision = "0034"
down_revision = "0033"


def upgrade() -> None:
    """The policy that was applied becomes the one of the source ``default``, the only one so far."""
    op.execute("""
        ALTER TABLE ops.consent_policy ADD COLUMN source text NOT NULL DEFAULT 'default';
        ALTER TABLE ops.consent_policy DROP COLUMN one, ADD PRIMARY KEY (source);
        ALTER TABLE ops.consent_policy ALTER COLUMN source SET DEFAULT ops.current_source();
        UPDATE ops.consent_policy SET subjects = subjects::jsonb ->> source;
        COMMENT ON COLUMN ops.consent_policy.source IS 'The key of the source';
        COMMENT ON COLUMN ops.consent_policy.subjects IS 'How the subjects of resources were determined';
    """)
