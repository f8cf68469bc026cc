"""What the source deleted: its rows leave every view, and ``fhir.resource`` keeps a tombstone with the time.

A tombstone takes part in the order of versions as any version does: a version that is older than the deletion does not
bring the resource back, whenever it arrives, and one that is newer does.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import islice

import psycopg
from psycopg import sql

from fhir_assets.errors import DatabaseUnavailable
from fhir_assets.fhir.record import Deletion as Deletion
from fhir_assets.privacy.audit import AuditRecord
from fhir_assets.warehouse.ops import audit_log, consents, visits, withheld_resources
from fhir_assets.warehouse.postgres.db.connections import Connection, OpenSession, Session
from fhir_assets.warehouse.postgres.tables.copy_blocks import parse_version_number
from fhir_assets.warehouse.postgres.tables.encoding import MAX_INDEXED_BYTES
from fhir_assets.warehouse.postgres.tables.layout import KEY_COLUMN

_CHUNK = 5000
_CROSSINGS = 5


@dataclass(slots=True)
class DeletionCounts:
    """What applying deletions did, by type. ``gone`` were in the tables; ``unseen`` were not, and cannot come late any
    more; ``stale`` were deleted already, or are there in a newer version.
    """

    gone: Counter[str] = field(default_factory=Counter)
    unseen: Counter[str] = field(default_factory=Counter)
    stale: Counter[str] = field(default_factory=Counter)

    def update(self, other: "DeletionCounts") -> None:
        """Add what another application did."""
        self.gone.update(other.gone)
        self.unseen.update(other.unseen)
        self.stale.update(other.stale)


def apply(
    conn: Session, deletions: Iterable[Deletion], *, run_id: str, actor: str = "pipeline", partition_key: str = ""
) -> DeletionCounts:
    """Apply deletions in the caller's transaction: seen together with all that it writes, or not at all.

    In any order, and any number of times. ``run_id`` and ``partition_key`` say by what they came.
    """
    total = DeletionCounts()
    rest = iter(deletions)
    while chunk := list(islice(rest, _CHUNK)):
        _apply(conn, chunk, run_id, partition_key, total)
    audit_log.record(
        conn,
        *(AuditRecord("delete", actor, name, count=count, run_id=run_id) for name, count in sorted(total.gone.items())),
    )
    return total


def apply_in_transaction(
    connect: OpenSession, deletions: Sequence[Deletion], *, run_id: str, actor: str = "pipeline"
) -> DeletionCounts:
    """Apply some thousands of deletions in a transaction of their own, again where it crossed a load.

    Raises DatabaseUnavailable.
    """
    for _ in range(_CROSSINGS):
        try:
            with connect() as conn, conn.transaction():
                return apply(conn, deletions, run_id=run_id, actor=actor)
        except psycopg.errors.DeadlockDetected:
            continue
        except psycopg.OperationalError as error:
            raise DatabaseUnavailable(
                f"Postgres went away while deletions were applied ({type(error).__name__}): run it again"
            ) from None
    raise DatabaseUnavailable("Loads of the same resources crossed the deletions again and again: run it again")


def read_checkpoint(conn: Connection, resource_type: str) -> datetime | None:
    """Up to where the source's history was followed; else since when the type is loaded; None if it never was."""
    row = conn.execute(
        "SELECT coalesce((SELECT applied_until FROM ops.deletion_checkpoints WHERE resource_type = %(type)s),"
        " (SELECT min(started_at) FROM ops.ingestion_runs WHERE resource_type = %(type)s))",
        {"type": resource_type},
    ).fetchone()
    return row[0] if row else None


def advance_checkpoint(conn: Connection, resource_type: str, until: datetime, run_id: str) -> None:
    """The history was followed up to ``until``; never back."""
    conn.execute(
        "INSERT INTO ops.deletion_checkpoints (resource_type, applied_until, run_id) VALUES (%s, %s, %s)"
        " ON CONFLICT (resource_type) DO UPDATE SET applied_until ="
        " greatest(ops.deletion_checkpoints.applied_until, excluded.applied_until),"
        " run_id = excluded.run_id, updated_at = now()",
        [resource_type, until, run_id],
    )


def find_unapplied_parts(conn: Connection, names: Sequence[str]) -> list[str]:
    """Those parts of the store whose deletions this database has not applied yet."""
    rows = conn.execute(
        "SELECT name FROM unnest(%s::text[]) AS p (name) WHERE NOT EXISTS"
        " (SELECT FROM ops.deletion_parts d WHERE d.name = p.name)",
        [list(names)],
    ).fetchall()
    return [name for (name,) in rows]


def mark_part_applied(conn: Connection, name: str) -> None:
    """All deletions of a part of the store are applied."""
    conn.execute("INSERT INTO ops.deletion_parts (name) VALUES (%s) ON CONFLICT DO NOTHING", [name])


def _apply(
    conn: Connection, deletions: Sequence[Deletion], run_id: str, partition_key: str, total: DeletionCounts
) -> None:
    newest = _newest(deletions)
    # In one order everywhere, the loader's, so that a load and a deletion do not wait for each other crosswise.
    rows = [newest[key] for key in sorted(newest)]
    ids = {"types": [row.resource_type for row in rows], "ids": [row.id for row in rows]}
    there = set(conn.execute(_THERE, ids).fetchall())
    buried = conn.execute(
        _UPSERT,
        {
            **ids,
            "versions": [row.version_id for row in rows],
            "numbers": [parse_version_number(row.version_id) for row in rows],
            "times": [row.at for row in rows],
            "run": run_id,
            "key": partition_key,
        },
    ).fetchall()
    by_type = defaultdict[str, list[str]](list)
    for resource_type, resource_id in buried:
        by_type[resource_type].append(resource_id)
        known = (resource_type, resource_id) in there
        (total.gone if known else total.unseen)[resource_type] += 1
    for resource_type, count in Counter(row.resource_type for row in rows).items():
        total.stale[resource_type] += count - len(by_type[resource_type])
    for resource_type, keys in by_type.items():
        withheld_resources.remove_deleted(conn, resource_type, keys)
        if resource_type == "Consent":
            consents.remove_deleted(conn, keys)
        visits.remove_deleted(conn, resource_type, keys)
        for table in _tables(conn, resource_type):
            conn.execute(
                sql.SQL("DELETE FROM {} WHERE {} = ANY(%s)").format(
                    sql.Identifier("fhir", table), sql.Identifier(KEY_COLUMN)
                ),
                [keys],
            )


def _newest(deletions: Iterable[Deletion]) -> dict[tuple[str, str], Deletion]:
    """The latest deletion of each resource. What cannot be a key of the tables cannot be in them."""
    newest: dict[tuple[str, str], Deletion] = {}
    for each in deletions:
        key = each.resource_type, each.id
        if "\0" in each.id or len(each.id) > MAX_INDEXED_BYTES // 4:
            continue
        if key not in newest or newest[key].at < each.at:
            newest[key] = each
    return newest


def _tables(conn: Connection, resource_type: str) -> Iterator[str]:
    found = conn.execute(
        "SELECT name FROM ops.view_tables WHERE resource_type = %s"
        " AND to_regclass(format('fhir.%%I', name)) IS NOT NULL ORDER BY 1",
        [resource_type],
    ).fetchall()
    return (name for (name,) in found)


_THERE = """
    SELECT resource_type, id FROM fhir.resource JOIN unnest(%(types)s::text[], %(ids)s::text[]) AS d (type, key)
        ON resource_type = type AND id = key WHERE deleted_at IS NULL
"""
_UPSERT = """
    INSERT INTO fhir.resource AS stored (
        resource_type, id, version_id, version_number, as_of, partition_key, run_id, loaded_at, deleted_at, patients
    )
    SELECT type, id, version, number, at, %(key)s, %(run)s, clock_timestamp(), at, '{}'
    FROM unnest(%(types)s::text[], %(ids)s::text[], %(versions)s::text[], %(numbers)s::bigint[],
        %(times)s::timestamptz[]) AS d (type, id, version, number, at)
    ON CONFLICT (resource_type, id) DO UPDATE SET
        version_id = excluded.version_id,
        version_number = excluded.version_number,
        last_updated = NULL,
        as_of = excluded.as_of,
        run_id = excluded.run_id,
        loaded_at = excluded.loaded_at,
        deleted_at = excluded.deleted_at,
        patients = excluded.patients,
        key_id = NULL,
        resource = NULL
    WHERE stored.deleted_at IS NULL AND (
        excluded.as_of > stored.as_of
        OR excluded.as_of = stored.as_of AND coalesce(excluded.version_number >= stored.version_number, true)
    )
    RETURNING resource_type, id
"""
