"""Replays and corrections of dead letters, references that a server does not have, and indexes for lists of them."""

from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """The list is ordered by the last failure, so that a range of dates is a range of each index."""
    op.execute("""
        ALTER TABLE ops.dead_letters
            ADD COLUMN last_updated timestamptz,
            ADD COLUMN judged_by text NOT NULL DEFAULT '',
            ADD COLUMN marked_at timestamptz,
            ADD COLUMN claimed_by text,
            ADD COLUMN resolution text;
        COMMENT ON COLUMN ops.dead_letters.last_updated IS
            'meta.lastUpdated of the resource, where it can be read: a newer version in the tables settles the letter';
        COMMENT ON COLUMN ops.dead_letters.judged_by IS
            'The rules (stage validate) or views (transform, load) that it failed under last';
        COMMENT ON COLUMN ops.dead_letters.marked_at IS 'When its replay was asked for';
        COMMENT ON COLUMN ops.dead_letters.claimed_by IS 'The run that replays it: one at a time';
        COMMENT ON COLUMN ops.dead_letters.resolution IS
            'replayed, corrected, superseded by a newer version, gone from its window; or why it was discarded';

        CREATE INDEX ON ops.dead_letters (last_failure DESC, id DESC);
        CREATE INDEX ON ops.dead_letters (status, last_failure DESC, id DESC);
        CREATE INDEX ON ops.dead_letters (resource_type, status, last_failure DESC, id DESC);
        CREATE INDEX ON ops.dead_letters (stage, last_failure DESC, id DESC);
        CREATE INDEX ON ops.dead_letters (rule, last_failure DESC, id DESC);
        CREATE INDEX ON ops.dead_letters (run_id, last_failure DESC, id DESC);
        CREATE INDEX ON ops.dead_letters (first_run_id, last_failure DESC, id DESC);
        CREATE INDEX ON ops.dead_letters (resource_type, resource_id) WHERE status IN ('open', 'replaying');
        CREATE INDEX ON ops.dead_letters (stage, resource_type, judged_by) WHERE status = 'open';
        DROP INDEX ops.dead_letters_resource_type_id_idx, ops.dead_letters_resource_type_status_rule_id_idx,
            ops.dead_letters_run_id_id_idx, ops.dead_letters_status_id_idx, ops.dead_letters_stage_id_idx,
            ops.dead_letters_rule_id_idx, ops.dead_letters_last_failure_id_idx;
    """)
    op.execute("""
        CREATE TABLE ops.corrections (
            fingerprint bytea PRIMARY KEY,
            resource_type text NOT NULL,
            stage text NOT NULL,
            partition_key text NOT NULL,
            original bytea,
            resource bytea NOT NULL,
            sealed_by text,
            corrected_by text NOT NULL,
            corrected_at timestamptz NOT NULL DEFAULT now()
        );
        CREATE INDEX ON ops.corrections (resource_type, stage, partition_key);
        COMMENT ON TABLE ops.corrections IS
            'Resources corrected by hand, by the fingerprint of their dead letter: each takes the place of its '
            'original whenever that is judged again';

        CREATE TABLE ops.missing_references (
            resource_type text NOT NULL,
            resource_id text NOT NULL,
            asked_at timestamptz NOT NULL DEFAULT now(),
            run_id text NOT NULL,
            PRIMARY KEY (resource_type, resource_id)
        );
        COMMENT ON TABLE ops.missing_references IS
            'What loaded resources refer to, was asked for by id and is not loaded: not asked for again for a day';
    """)
