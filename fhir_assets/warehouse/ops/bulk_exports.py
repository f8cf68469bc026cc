"""``ops.bulk_exports`` and ``ops.bulk_parts``: requested bulk exports, their progress, and their parts in the store."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from psycopg.types.json import Jsonb

from fhir_assets.fhir.bulk.manifest import ExportManifest, ExportRequest, manifest_from_json, manifest_to_json
from fhir_assets.storage.manifest import Part
from fhir_assets.warehouse.postgres.db import advisory_locks
from fhir_assets.warehouse.postgres.db.connections import Connection

_FIND = """
    SELECT id, base_url, status_url, status, since, requested_at, transaction_time, manifest, files_done
    FROM ops.bulk_exports
    WHERE base_url = %(base)s
        AND level = %(level)s
        AND type_filter = %(filter)s
        AND resource_types @> %(types)s
        AND status = ANY(%(statuses)s)
        AND (since IS NULL OR since <= %(since)s)
        AND (%(until)s::timestamptz IS NULL OR transaction_time >= %(until)s)
    ORDER BY requested_at DESC
    LIMIT 1
"""


@dataclass(frozen=True, slots=True)
class BulkExport:
    """A bulk export. ``manifest`` is None until the export is complete on the server.

    ``files_done`` contains the index in the manifest's ``output`` of every file that is in the store.
    """

    id: str
    base_url: str
    status_url: str
    status: str
    since: datetime | None
    requested_at: datetime
    transaction_time: datetime | None
    manifest: ExportManifest | None
    files_done: frozenset[int]


@contextmanager
def lock_server(conn: Connection, base_url: str) -> Iterator[None]:
    """Hold the lock of a server's exports, so that a waiting process finds the export that the holder requested."""
    conn.execute("SELECT pg_advisory_lock(%s, hashtext(%s))", [advisory_locks.BULK_EXPORT, base_url])
    conn.commit()
    try:
        yield
    finally:
        conn.rollback()
        conn.execute("SELECT pg_advisory_unlock(%s, hashtext(%s))", [advisory_locks.BULK_EXPORT, base_url])
        conn.commit()


def find(
    conn: Connection, base_url: str, request: ExportRequest, statuses: Sequence[str], *, until: datetime | None = None
) -> BulkExport | None:
    """Return the latest export that contains the types and time range of ``request``, None if there is none.

    With ``until``, exports whose transaction time is earlier are ignored.
    """
    row = conn.execute(
        _FIND,
        {
            "base": base_url,
            "level": request.level,
            "filter": request.type_filter,
            "types": list(request.resource_types),
            "since": request.since,
            "statuses": list(statuses),
            "until": until,
        },
    ).fetchone()
    conn.commit()
    return None if row is None else _export(row)


def begin(
    conn: Connection, export_id: str, base_url: str, request: ExportRequest, status_url: str, at: datetime
) -> BulkExport:
    """Record an export as soon as the server has accepted the request. Commits."""
    conn.execute(
        """
        INSERT INTO ops.bulk_exports
            (id, base_url, level, resource_types, type_filter, since, status_url, requested_at)
        VALUES (%s, %s, %s, %s, %s, %s, %s, %s)
        """,
        [
            export_id,
            base_url,
            request.level,
            list(request.resource_types),
            request.type_filter,
            request.since,
            status_url,
            at,
        ],
    )
    conn.commit()
    return BulkExport(export_id, base_url, status_url, "waiting", request.since, at, None, None, frozenset())


def record_manifest(conn: Connection, export_id: str, manifest: ExportManifest) -> None:
    """Record that the server has completed the export. Commits."""
    conn.execute(
        "UPDATE ops.bulk_exports SET status = 'downloading', manifest = %s, transaction_time = %s WHERE id = %s",
        [Jsonb(manifest_to_json(manifest)), manifest.transaction_time, export_id],
    )
    conn.commit()


def record_parts(conn: Connection, export_id: str, parts: Mapping[str, Sequence[Part]], files: Sequence[int]) -> None:
    """Record parts by resource type, and the indexes of the export files that they contain completely. Commits."""
    with conn.cursor() as cursor:
        cursor.executemany(
            """
            INSERT INTO ops.bulk_parts (export_id, resource_type, name, rows, bytes, stored_bytes, first, last)
            VALUES (%s, %s, %s, %s, %s, %s, %s, %s)
            """,
            [
                (export_id, resource_type, p.name, p.rows, p.bytes, p.stored_bytes, p.first, p.last)
                for resource_type, parts_of_type in parts.items()
                for p in parts_of_type
            ],
        )
        cursor.execute(
            "UPDATE ops.bulk_exports SET files_done = files_done || %s WHERE id = %s",
            [list(files), export_id],
        )
    conn.commit()


def end(conn: Connection, export_id: str, status: str, *, error: str | None = None) -> None:
    """Record that the export is done, failed or cancelled; ``error`` must contain no patient data. Commits."""
    conn.execute(
        "UPDATE ops.bulk_exports SET status = %s, error = %s, finished_at = now() WHERE id = %s",
        [status, error, export_id],
    )
    conn.commit()


def list_parts(conn: Connection, export_id: str) -> list[tuple[str, Part]]:
    """Return the parts of an export that are in the store, each with its resource type."""
    rows = conn.execute(
        """
        SELECT resource_type, name, rows, bytes, stored_bytes, first, last
        FROM ops.bulk_parts
        WHERE export_id = %s
        ORDER BY resource_type, name
        """,
        [export_id],
    ).fetchall()
    conn.commit()
    return [(resource_type, Part(*columns)) for resource_type, *columns in rows]


def find_expired(conn: Connection, base_url: str, before: datetime) -> list[str]:
    """Return the ids of exports that ended before a time and still have parts in the store."""
    rows = conn.execute(
        """
        SELECT DISTINCT e.id
        FROM ops.bulk_exports e
        JOIN ops.bulk_parts p ON p.export_id = e.id
        WHERE base_url = %s AND finished_at < %s
        """,
        [base_url, before],
    ).fetchall()
    conn.commit()
    return [export_id for (export_id,) in rows]


def remove_parts(conn: Connection, export_id: str) -> None:
    """Record that the parts of an export are deleted from the store, so that it is not used again. Commits."""
    conn.execute("DELETE FROM ops.bulk_parts WHERE export_id = %s", [export_id])
    conn.execute(
        """
        UPDATE ops.bulk_exports
        SET status = 'failed', error = 'its files were deleted from the store'
        WHERE id = %s AND status = 'done'
        """,
        [export_id],
    )
    conn.commit()


def _export(row: Sequence[Any]) -> BulkExport:
    export_id, base_url, status_url, status, since, requested_at, transaction_time, manifest_json, files_done = row
    manifest = manifest_from_json(manifest_json) if manifest_json else None
    return BulkExport(
        export_id,
        base_url,
        status_url,
        status,
        since,
        requested_at,
        transaction_time,
        manifest,
        frozenset(files_done),
    )
