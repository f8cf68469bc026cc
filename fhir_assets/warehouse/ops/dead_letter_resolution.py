"""Resolves the dead letters of completely processed windows, if they did not fail again.

Other runs may process the same windows at the same time. A step therefore takes a number from a sequence before it
reads its input, and resolves only dead letters with smaller numbers, which no run has recorded since. It resolves them
in the transaction that commits its result, so that no dead letter is resolved without the result. Replays and discards
are in ``replays``; recording dead letters is in ``dead_letters``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fhir_assets.warehouse.ops.dead_letters import Stage
from fhir_assets.warehouse.postgres.db.connections import Connection, OpenConnection

SUPERSEDED = "superseded by a newer version"
"""The resolution of a dead letter whose resource has a newer version in the tables."""


@dataclass(frozen=True, slots=True)
class DeadLetterResolution:
    """The dead letters that a step may resolve: those of one stage, in partitions that it processed completely.

    ``recorded_before`` is the number that ``next_record_number`` returned at the start of the step.
    """

    run_id: str
    resource_type: str
    stage: Stage
    partition_keys: Sequence[str]
    recorded_before: int

    def restrict(self, partition_keys: Sequence[str]) -> "DeadLetterResolution":
        """Return a copy that is limited to the given partitions."""
        chosen = frozenset(partition_keys)
        return replace(self, partition_keys=[key for key in self.partition_keys if key in chosen])


def next_record_number(connect: OpenConnection) -> int:
    """Return the next number of a dead letter. Dead letters that are recorded later have larger numbers.

    A step calls this before it reads its input.
    """
    with connect() as conn:
        row = conn.execute("SELECT nextval('ops.dead_letter_records')").fetchone()
    assert row is not None
    return int(row[0])


def resolve_dead_letters(conn: Connection, resolution: DeadLetterResolution) -> int:
    """Resolve the dead letters that did not fail again in the run, and return their number.

    Dead letters that another run recorded since the step began stay open. So do dead letters of stage ``fetch`` that
    came through another channel than the source, because fetching from the source does not repeat their input. Rows
    are locked in the order in which ``dead_letters.record`` locks them, so that the two cannot deadlock.
    """
    if not resolution.partition_keys:
        return 0
    return conn.execute(
        """
        WITH resolved AS (
            SELECT id
            FROM ops.dead_letters
            WHERE source = ops.current_source()
                AND resource_type = %(type)s
                AND stage = %(stage)s
                AND partition_key = ANY(%(keys)s)
                AND (status IN ('open', 'replaying') OR status = 'resolved' AND resolution = %(superseded)s)
                AND run_id <> %(run)s
                AND recorded < %(recorded_before)s
                AND (stage <> 'fetch' OR origin IS NULL)
            ORDER BY fingerprint
            FOR UPDATE
        )
        UPDATE ops.dead_letters d
        SET
            status = 'resolved',
            resolved_at = now(),
            resolved_run_id = %(run)s,
            resolution = CASE
                WHEN EXISTS (
                    SELECT FROM ops.corrections c WHERE (c.source, c.fingerprint) = (d.source, d.fingerprint)
                ) THEN 'corrected'
                ELSE 'did not fail again'
            END,
            claimed_by = NULL,
            replay_requested_at = NULL
        FROM resolved
        WHERE d.id = resolved.id
        """,
        {
            "run": resolution.run_id,
            "type": resolution.resource_type,
            "stage": resolution.stage,
            "keys": list(resolution.partition_keys),
            "recorded_before": resolution.recorded_before,
            "superseded": SUPERSEDED,
        },
    ).rowcount


def count_dead(
    conn: Connection, resource_type: str, partition_keys: Sequence[str], *, replayed_by: Sequence[str] = ()
) -> dict[str, int]:
    """Return the number of resources that became dead letters in validation, by partition key.

    Dead letters that account for a resource are counted: those that are not resolved, and those that a newer version
    superseded. Those that a run in ``replayed_by`` has claimed are left out.
    """
    rows = conn.execute(
        """
        SELECT partition_key, sum(occurrences)::bigint
        FROM ops.dead_letters
        WHERE source = ops.current_source()
            AND resource_type = %(type)s
            AND stage = 'validate'
            AND partition_key = ANY(%(keys)s)
            AND (
                status IN ('open', 'discarded')
                OR status = 'replaying' AND (claimed_by = ANY(%(replayed_by)s)) IS NOT TRUE
                OR status = 'resolved' AND resolution = %(superseded)s
            )
        GROUP BY partition_key
        """,
        {
            "type": resource_type,
            "keys": list(partition_keys),
            "replayed_by": list(replayed_by),
            "superseded": SUPERSEDED,
        },
    )
    return dict(rows.fetchall())
