"""The schema ``marts``, for the SQL views of ``sql/marts`` over the tables of ViewDefinitions."""

from alembic import op

revision = "0038"
down_revision = "0037"


def upgrade() -> None:
    """The views themselves are created after the tables that they read."""
    op.execute("""
        CREATE SCHEMA IF NOT EXISTS marts;
        COMMENT ON SCHEMA marts IS 'Ready views over the tables of schema fhir';
        CREATE TABLE ops.marts (
            name text PRIMARY KEY,
            definition text NOT NULL,
            refused text,
            applied_at timestamptz NOT NULL DEFAULT now()
        );
        COMMENT ON TABLE ops.marts IS 'The views of schema marts that fhir_assets created';
        COMMENT ON COLUMN ops.marts.definition IS 'A hash of the statement of the view and its comments';
        COMMENT ON COLUMN ops.marts.refused IS 'Why the view could not be made in this form; null: it was made';
    """)
