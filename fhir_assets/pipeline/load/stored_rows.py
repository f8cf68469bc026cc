"""Builds the rows of resources that are already stored, with the resolved keys of their conditional references."""

from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import chain

from fhir_assets.fhir.conditional_references import find_unmet
from fhir_assets.pipeline.load.row_builder import Batch, BuiltRows, RowBuilder
from fhir_assets.warehouse.postgres.db.connections import Session
from fhir_assets.warehouse.postgres.queries import identifiers

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def build_stored_rows(
    conn: Session, resource_type: str, row_builder: RowBuilder, ids: Sequence[str], bodies: Sequence[bytes]
) -> BuiltRows:
    """Build the rows of stored resources. ``ids`` and ``bodies`` are their ids and their JSON.

    Resources whose conditional references have no target any more are marked, so that the next load resolves them. The
    caller must hold the locks of the resources.
    """
    conditions = identifiers.find_conditions(conn, resource_type, ids)
    targets = identifiers.find_targets(conn, chain.from_iterable(conditions.values())) if conditions else None
    built = row_builder(Batch(list(bodies), "", _EPOCH, targets=targets))
    identifiers.mark_waiting(conn, resource_type, find_unmet(conditions, targets or {}))
    return built
