"""Integer numbers of patients, encounters and runs for the API, and when a resource entered the tables."""

from alembic import op

revision = "0040"
down_revision = "0039"


def upgrade() -> None:
    """Resources that are in the tables already have an unknown ``created_at``. The default comes after the column, so
    that no row is rewritten.
    """
    op.execute("""
        CREATE TABLE ops.numbers (
            source text NOT NULL DEFAULT ops.current_source(),
            kind text NOT NULL,
            id text NOT NULL,
            number bigint NOT NULL GENERATED ALWAYS AS IDENTITY UNIQUE,
            PRIMARY KEY (source, kind, id)
        );
        COMMENT ON TABLE ops.numbers IS
            'Integers that the API shows beside ids. A number is given when the API first returns the id, and is kept';
        COMMENT ON COLUMN ops.numbers.kind IS 'Patient, Encounter or run';

        ALTER TABLE fhir.resource ADD COLUMN created_at timestamptz;
        ALTER TABLE fhir.resource ALTER COLUMN created_at SET DEFAULT now();
        COMMENT ON COLUMN fhir.resource.created_at IS
            'When a version of the resource was first loaded, or loaded again after consent had withheld it. Null: '
            'before this column existed';
    """)
