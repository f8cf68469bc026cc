"""Deletions at the source: the rows of a deleted resource are removed from all views, and a tombstone is stored.

A tombstone is a row of ``fhir.resource`` with ``deleted_at`` and without JSON. The time of the deletion orders it among
the versions of the resource: a version that is newer than the deletion restores the resource, an older version does
not, even if it is loaded later.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import islice

import psycopg
from psycopg import sql

from fhir_assets.errors import DatabaseUnavailable
from fhir_assets.fhir.record import Deletion as Deletion
from fhir_assets.privacy.audit import AuditRecord
from fhir_assets.warehouse.ops import audit_log, consent_records, visits, withheld_resources
from fhir_assets.warehouse.postgres import version_order
from fhir_assets.warehouse.postgres.db.connections import Connection, OpenSession, Session
from fhir_assets.warehouse.postgres.tables.copy_blocks import parse_version_number
from fhir_assets.warehouse.postgres.tables.encoding import MAX_INDEXED_BYTES

_DELETIONS_PER_STATEMENT = 5000
_DEADLOCK_ATTEMPTS = 5


@dataclass(slots=True)
class DeletionCounts:
    """Counts of applied deletions by resource type.

    - ``deleted``: resources that were in the tables
    - ``unknown``: resources that were not in the tables; their tombstones prevent older versions from being loaded
    - ``outdated``: deletions without effect: the resource is already deleted, or its stored version is newer
    """

    deleted: Counter[str] = field(default_factory=Counter)
    unknown: Counter[str] = field(default_factory=Counter)
    outdated: Counter[str] = field(default_factory=Counter)

    def update(self, other: "DeletionCounts") -> None:
        """Add the counts of ``other``."""
        self.deleted.update(other.deleted)
        self.unknown.update(other.unknown)
        self.outdated.update(other.outdated)


def apply(
    conn: Session, deletions: Iterable[Deletion], *, run_id: str, actor: str = "pipeline", partition_key: str = ""
) -> DeletionCounts:
    """Apply deletions, in any order, in the caller's transaction. Applying a deletion twice has no further effect.

    ``run_id`` and ``partition_key`` are stored with the tombstones of resources that were not in the tables.
    """
    total = DeletionCounts()
    iterator = iter(deletions)
    while chunk := list(islice(iterator, _DELETIONS_PER_STATEMENT)):
        _apply_chunk(conn, chunk, run_id, partition_key, total)
    audit_log.record(
        conn,
        *(
            AuditRecord("delete", actor, name, count=count, run_id=run_id)
            for name, count in sorted(total.deleted.items())
        ),
    )
    return total


def apply_in_transaction(
    connect: OpenSession, deletions: Sequence[Deletion], *, run_id: str, actor: str = "pipeline"
) -> DeletionCounts:
    """Apply deletions in a new transaction, which is retried after a deadlock with a load.

    Pass at most a few thousand deletions, because the transaction locks all of their resources. Raises
    DatabaseUnavailable.
    """
    for _ in range(_DEADLOCK_ATTEMPTS):
        try:
            with connect() as conn, conn.transaction():
                return apply(conn, deletions, run_id=run_id, actor=actor)
        except psycopg.errors.DeadlockDetected:
            continue
        except psycopg.OperationalError as error:
            raise DatabaseUnavailable(
                f"Postgres became unavailable while deletions were applied ({type(error).__name__}): try again"
            ) from None
    raise DatabaseUnavailable(
        f"Deletions deadlocked with loads of the same resources {_DEADLOCK_ATTEMPTS} times: try again"
    )


def read_checkpoint(conn: Connection, resource_type: str) -> datetime | None:
    """Return the time up to which the deletions of the source's history are applied.

    If no deletion of the type has been applied yet, return the start of the type's first run, or None if there was no
    run.
    """
    row = conn.execute(
        """
        SELECT coalesce(
            (
                SELECT applied_until
                FROM ops.deletion_checkpoints
                WHERE source = ops.current_source() AND resource_type = %(type)s
            ),
            (
                SELECT min(started_at)
                FROM ops.ingestion_runs
                WHERE source = ops.current_source() AND resource_type = %(type)s
            )
        )
        """,
        {"type": resource_type},
    ).fetchone()
    return row[0] if row else None


def advance_checkpoint(conn: Connection, resource_type: str, until: datetime, run_id: str) -> None:
    """Record that the deletions of the source's history before ``until`` are applied. A checkpoint never moves back."""
    conn.execute(
        """
        INSERT INTO ops.deletion_checkpoints AS checkpoint (resource_type, applied_until, run_id)
        VALUES (%s, %s, %s)
        ON CONFLICT (resource_type, source) DO UPDATE SET
            applied_until = greatest(checkpoint.applied_until, excluded.applied_until),
            run_id = excluded.run_id,
            updated_at = now()
        """,
        [resource_type, until, run_id],
    )


def are_applied(conn: Connection, deletions: Sequence[Deletion]) -> bool:
    """Return whether each of these deletions is already applied, or a later version of its resource is stored."""
    latest = _keep_latest(deletions).values()
    row = conn.execute(
        """
        SELECT bool_and(EXISTS (
            SELECT FROM fhir.resource r
            WHERE r.source = ops.current_source()
                AND r.resource_type = d.type
                AND r.id = d.id
                AND r.as_of >= d.at
        ))
        FROM unnest(%s::text[], %s::text[], %s::timestamptz[]) AS d (type, id, at)
        """,
        [[d.resource_type for d in latest], [d.id for d in latest], [d.at for d in latest]],
    ).fetchone()
    return row is None or row[0] is not False


def find_unapplied_parts(conn: Connection, names: Sequence[str]) -> list[str]:
    """Return those of the parts ``names`` of the store whose deletions are not applied to this database yet."""
    rows = conn.execute(
        """
        SELECT name
        FROM unnest(%s::text[]) AS p (name)
        WHERE NOT EXISTS (
            SELECT FROM ops.deletion_parts d WHERE d.source = ops.current_source() AND d.name = p.name
        )
        """,
        [list(names)],
    ).fetchall()
    return [name for (name,) in rows]


def mark_part_applied(conn: Connection, name: str) -> None:
    """Record that all deletions in a part of the store are applied."""
    conn.execute("INSERT INTO ops.deletion_parts (name) VALUES (%s) ON CONFLICT DO NOTHING", [name])


def _apply_chunk(
    conn: Connection, deletions: Sequence[Deletion], run_id: str, partition_key: str, total: DeletionCounts
) -> None:
    latest = _keep_latest(deletions)
    # Rows are locked in the order of ids, as in loads, so that deadlocks between loads and deletions are rare.
    rows = [latest[key] for key in sorted(latest)]
    ids = {"types": [row.resource_type for row in rows], "ids": [row.id for row in rows]}
    stored = set(conn.execute(_FIND_STORED, ids).fetchall())
    written = conn.execute(
        _WRITE_TOMBSTONES,
        {
            **ids,
            "versions": [row.version_id for row in rows],
            "numbers": [parse_version_number(row.version_id) for row in rows],
            "times": [row.at for row in rows],
            "run": run_id,
            "partition_key": partition_key,
        },
    ).fetchall()
    ids_by_type = defaultdict[str, list[str]](list)
    for resource_type, resource_id in written:
        ids_by_type[resource_type].append(resource_id)
        was_stored = (resource_type, resource_id) in stored
        (total.deleted if was_stored else total.unknown)[resource_type] += 1
    for resource_type, count in Counter(row.resource_type for row in rows).items():
        total.outdated[resource_type] += count - len(ids_by_type[resource_type])
    for resource_type, resource_ids in ids_by_type.items():
        withheld_resources.remove_deleted(conn, resource_type, resource_ids)
        if resource_type == "Consent":
            consent_records.remove_deleted(conn, resource_ids)
        visits.remove_deleted(conn, resource_type, resource_ids)
        withheld_resources.delete_view_rows(conn, resource_type, resource_ids)


def _keep_latest(deletions: Iterable[Deletion]) -> dict[tuple[str, str], Deletion]:
    """Return the latest deletion of each resource by type and id, without ids that the tables cannot store."""
    latest: dict[tuple[str, str], Deletion] = {}
    for deletion in deletions:
        key = deletion.resource_type, deletion.id
        if "\0" in deletion.id or len(deletion.id) > MAX_INDEXED_BYTES // 4:
            continue
        if key not in latest or latest[key].at < deletion.at:
            latest[key] = deletion
    return latest


_FIND_STORED = """
    SELECT resource_type, id
    FROM fhir.resource
    JOIN unnest(%(types)s::text[], %(ids)s::text[]) AS d (type, key) ON resource_type = type AND id = key
    WHERE source = ops.current_source() AND deleted_at IS NULL
"""
_WRITE_TOMBSTONES = sql.SQL("""
    INSERT INTO fhir.resource AS stored (
        resource_type, id, version_id, version_number, as_of, arrived, partition_key, run_id, loaded_at, deleted_at,
        patients
    )
    SELECT type, id, version, number, at, at, %(partition_key)s, %(run)s, clock_timestamp(), at, '{{}}'
    FROM unnest(
        %(types)s::text[], %(ids)s::text[], %(versions)s::text[], %(numbers)s::bigint[], %(times)s::timestamptz[]
    ) AS d (type, id, version, number, at)
    ON CONFLICT (resource_type, id, source) DO UPDATE SET
        version_id = excluded.version_id,
        version_number = excluded.version_number,
        last_updated = NULL,
        as_of = excluded.as_of,
        arrived = excluded.arrived,
        replaced_last_updated = NULL,
        run_id = excluded.run_id,
        loaded_at = excluded.loaded_at,
        deleted_at = excluded.deleted_at,
        patients = excluded.patients,
        mentions = NULL,
        identifiers = NULL,
        key_id = NULL,
        resource = NULL
    WHERE {deletes}
    RETURNING resource_type, id
""").format(deletes=version_order.deletes("excluded", "stored"))
