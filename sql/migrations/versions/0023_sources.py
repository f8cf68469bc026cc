"""The settings to which a source is bound, and the store that belongs to the database."""

from alembic import op

revision = "0023"
down_revision = "0022"


def upgrade() -> None:
    """Create ``ops.sources`` and ``ops.deployment``. Both are empty until the next load, which records its settings.

    A deployment of an earlier version therefore keeps the settings that it has at the time of the upgrade.
    """
    op.execute("""
        CREATE TABLE ops.sources (
            source text PRIMARY KEY,
            settings jsonb NOT NULL,
            bound_at timestamptz NOT NULL DEFAULT now(),
            changed_at timestamptz NOT NULL DEFAULT now()
        );
        COMMENT ON TABLE ops.sources IS
            'The settings that the windows, checkpoints and partitions of each source belong to; '
            'a load under other settings is refused, see `fhir-assets sources list`';
        COMMENT ON COLUMN ops.sources.source IS 'The key of the source';
        COMMENT ON COLUMN ops.sources.settings IS 'Values by name of the setting, without credentials';

        CREATE TABLE ops.deployment (
            one boolean PRIMARY KEY DEFAULT true CHECK (one),
            database_id uuid NOT NULL DEFAULT gen_random_uuid(),
            store_id uuid NOT NULL DEFAULT gen_random_uuid(),
            store_confirmed boolean NOT NULL DEFAULT false
        );
        COMMENT ON TABLE ops.deployment IS
            'The ids of this database and of the store that belongs to it; no row before the first load';
        COMMENT ON COLUMN ops.deployment.store_confirmed IS 'Whether store.json of the store names both ids';
    """)
