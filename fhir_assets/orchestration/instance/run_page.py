"""The events that the page of a run shows."""

from collections.abc import Iterator, Sequence

import dagster as dg
import sqlalchemy

_EVENTS = sqlalchemy.text("""
    SELECT id, event
    FROM event_logs
    WHERE run_id = :run_id
      AND id > :after
      AND (
        partition IS NULL
        OR dagster_event_type NOT IN ('ASSET_MATERIALIZATION_PLANNED', 'ASSET_MATERIALIZATION')
        OR id IN (
            SELECT min(id)
            FROM event_logs
            WHERE run_id = :run_id
              AND partition IS NOT NULL
              AND dagster_event_type IN ('ASSET_MATERIALIZATION_PLANNED', 'ASSET_MATERIALIZATION')
            GROUP BY asset_key, dagster_event_type
        )
      )
    ORDER BY id
    LIMIT :limit
""")


def read_events(conn: sqlalchemy.Connection, run_id: str, *, after: int, limit: int | None) -> list[dg.EventLogRecord]:
    """Return the events of a run with larger ids than ``after``, without those that repeat for each window.

    A run over 31 windows of all types has 18,000 events, nine tenths of which are the plans, materializations and
    passed evaluations of each window. Of plans and materializations, the first of each asset is returned. Evaluations
    are all returned, see ``omit_passed``.
    """
    rows = conn.execute(_EVENTS, {"run_id": run_id, "after": after, "limit": limit}).all()
    return [dg.EventLogRecord(row.id, dg.deserialize_value(row.event, dg.EventLogEntry)) for row in rows]


def omit_passed(records: Sequence[dg.EventLogRecord]) -> Iterator[dg.EventLogRecord]:
    """Yield the records without passed evaluations of windows if an earlier record has one of the same check."""
    shown: set[dg.AssetCheckKey] = set()
    for record in records:
        event = record.event_log_entry.dagster_event
        evaluation = event.event_specific_data if event else None
        if isinstance(evaluation, dg.AssetCheckEvaluation) and evaluation.passed and evaluation.partition:
            if evaluation.asset_check_key in shown:
                continue
            shown.add(evaluation.asset_check_key)
        yield record
