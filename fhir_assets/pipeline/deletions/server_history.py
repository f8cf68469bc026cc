"""Applies the deletions in the history of a FHIR server to the tables."""

from collections.abc import Sequence
from datetime import datetime, timedelta

from fhir_assets.errors import NotFhir, ServerRefused
from fhir_assets.fhir.search.history import DeletionHistory
from fhir_assets.pipeline.deletions.deletion_log import DeletionLog
from fhir_assets.pipeline.type_failures import TypeFailures
from fhir_assets.warehouse.postgres.db.connections import OpenSession
from fhir_assets.warehouse.postgres.tables import deletions


def apply_server_deletions(
    connect: OpenSession,
    deletion_log: DeletionLog,
    history: DeletionHistory,
    resource_types: Sequence[str],
    *,
    run_id: str,
    now: datetime,
    overlap: timedelta,
) -> dict[str, int]:
    """Apply the deletions of each type since the last call. Return the numbers of deleted resources by type.

    The first call for a type reads the history from the first load of the type. If the server offers no history for a
    type, the type is skipped, and a warning is added to the notices of ``history``. If the server refuses the history,
    a notice of severity ``error`` is added.

    Raises DatabaseUnavailable immediately. Raises ServerUnavailable after the deletions of the other types are applied.
    """
    offered_types = history.list_types()
    deleted = {}
    failures = TypeFailures()
    for name in resource_types:
        if offered_types is not None and name not in offered_types:
            history.note_not_offered(name)
            continue
        with connect() as conn:
            start = deletions.read_checkpoint(conn, name) or now
            conn.commit()
        with failures.collect(name):
            try:
                new_deletions = history.fetch_since(name, start - overlap)
                deleted[name] = deletion_log.record(new_deletions, run_id=run_id).deleted[name]
            except (ServerRefused, NotFhir) as error:
                history.note_refused(name, error)
                continue
            with connect() as conn, conn.transaction():
                # The server's clock may be behind the clock of this machine: its next deletions may be dated before
                # `now`.
                deletions.advance_checkpoint(conn, name, min(now, history.requested_at or now), run_id)
    failures.raise_collected()
    return deleted
