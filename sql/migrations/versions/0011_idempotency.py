"""API requests with an Idempotency-Key, and their responses."""

from alembic import op

revision = "0011"
down_revision = "0010"


def upgrade() -> None:
    """``ops.idempotency`` has a row for each request, which is kept for a day."""
    op.execute("""
        CREATE TABLE ops.idempotency (
            key bytea PRIMARY KEY,
            body bytea NOT NULL,
            status integer NOT NULL,
            answer bytea NOT NULL,
            sealed_by text,
            answered_at timestamptz NOT NULL DEFAULT now()
        );
        CREATE INDEX ON ops.idempotency (answered_at);
        COMMENT ON TABLE ops.idempotency IS
            'What requests with an Idempotency-Key were answered: the same again gets the same, for a day';
        COMMENT ON COLUMN ops.idempotency.key IS 'Keyed hash of the token''s name, the path and the key';
        COMMENT ON COLUMN ops.idempotency.body IS 'Keyed hash of the body';
    """)
