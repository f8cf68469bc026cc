"""Comparison of the resources of a source with those of the tables, for the command ``reconcile``."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from fhir_assets.warehouse.postgres.db.connections import Connection
from fhir_assets.warehouse.postgres.tables.encoding import is_storable


@dataclass(frozen=True, slots=True)
class AccountedCounts:
    """The numbers of distinct resources of a type that are in the tables, or missing for a known reason."""

    loaded: int
    withheld: int
    dead: int

    @property
    def total(self) -> int:
        """The sum of all counts."""
        return self.loaded + self.withheld + self.dead


@dataclass(frozen=True, slots=True)
class SourceVersion:
    """The identity of a version in the source."""

    id: str
    version_id: str | None
    last_updated: datetime | None


def count_accounted(conn: Connection, resource_type: str) -> AccountedCounts:
    """Count the resources of a type by outcome. Each resource is counted once."""
    row = conn.execute(
        """
        SELECT
            (
                SELECT count(*)
                FROM fhir.resource
                WHERE source = ops.current_source() AND resource_type = %(type)s AND deleted_at IS NULL
            ),
            (
                SELECT count(*)
                FROM ops.withheld w
                WHERE w.source = ops.current_source()
                    AND w.resource_type = %(type)s
                    AND NOT EXISTS (
                        SELECT FROM fhir.resource r
                        WHERE r.source = w.source
                            AND r.resource_type = %(type)s
                            AND r.id = w.id
                            AND r.deleted_at IS NULL
                    )
            ),
            (
                SELECT count(DISTINCT coalesce(d.resource_id, 'dead letter ' || d.id))
                FROM ops.dead_letters d
                WHERE d.source = ops.current_source()
                    AND d.resource_type = %(type)s
                    AND d.status IN ('open', 'replaying', 'discarded')
                    AND d.stage <> 'deliver'
                    AND NOT EXISTS (
                        SELECT FROM fhir.resource r
                        WHERE r.source = d.source
                            AND r.resource_type = %(type)s
                            AND r.id = d.resource_id
                            AND r.deleted_at IS NULL
                    )
            )
        """,
        {"type": resource_type},
    ).fetchone()
    return AccountedCounts(*row) if row else AccountedCounts(0, 0, 0)


def find_missing(conn: Connection, resource_type: str, versions: Sequence[SourceVersion]) -> list[SourceVersion]:
    """Return the versions that are neither accounted for nor in the tables, in this or a newer version.

    Withheld resources, resources with an unresolved dead letter, and those with a recorded deletion are accounted for.
    A dead letter whose resource has no valid id cannot be assigned to a version: see ``count_dead_without_id``.
    """
    unstorable = [version for version in versions if not is_storable(version.id + (version.version_id or ""))]
    storable = [version for version in versions if version not in unstorable] if unstorable else versions
    rows = conn.execute(
        """
        SELECT s.id, s.version_id, s.last_updated
        FROM unnest(%(ids)s::text[], %(versions)s::text[], %(times)s::timestamptz[])
            AS s (id, version_id, last_updated)
        LEFT JOIN fhir.resource r ON r.source = ops.current_source() AND r.resource_type = %(type)s AND r.id = s.id
        WHERE (
                r.id IS NULL
                OR s.last_updated > r.as_of
                OR s.last_updated IS NULL AND s.version_id <> r.version_id
            )
            AND NOT EXISTS (
                SELECT FROM ops.withheld w
                WHERE w.source = ops.current_source() AND w.resource_type = %(type)s AND w.id = s.id
            )
            AND NOT EXISTS (
                SELECT FROM ops.dead_letters d
                WHERE d.source = ops.current_source()
                    AND d.resource_type = %(type)s
                    AND d.resource_id = s.id
                    AND d.status IN ('open', 'replaying', 'discarded')
                    AND d.stage <> 'deliver'
            )
        """,
        {
            "type": resource_type,
            "ids": [version.id for version in storable],
            "versions": [version.version_id for version in storable],
            "times": [version.last_updated for version in storable],
        },
    )
    return [*(SourceVersion(*row) for row in rows), *unstorable]


def count_dead_without_id(conn: Connection, resource_type: str) -> int:
    """Return the number of unresolved dead letters of a type whose resource has no valid id."""
    row = conn.execute(
        """
        SELECT count(*)
        FROM ops.dead_letters
        WHERE source = ops.current_source()
            AND resource_type = %s
            AND resource_id IS NULL
            AND status IN ('open', 'replaying', 'discarded')
            AND stage <> 'deliver'
        """,
        [resource_type],
    ).fetchone()
    return row[0] if row else 0
