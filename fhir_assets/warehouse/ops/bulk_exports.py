"""``ops.bulk_exports`` and ``ops.bulk_parts``: requested bulk exports, their progress, and their parts in the store."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import msgspec
from psycopg.types.json import Jsonb

from fhir_assets.fhir.bulk.manifest import ExportManifest, ExportRequest, manifest_from_json, manifest_to_json
from fhir_assets.notices import Notice
from fhir_assets.storage.manifest import Part
from fhir_assets.warehouse.postgres.db import advisory_locks
from fhir_assets.warehouse.postgres.db.connections import Connection

_FIND = """
    SELECT
        id, base_url, status_url, status, resource_types, since, requested_at, kick_off_date, transaction_time,
        manifest, files_done, used_at, finished_at, notices
    FROM ops.bulk_exports
    WHERE source = ops.current_source()
        AND base_url = %(base)s
        AND level = %(level)s
        AND type_filter = %(filter)s
        AND status IN ('waiting', 'downloading', 'done')
    ORDER BY requested_at DESC
"""
_FIND_FULLY_LOADED = """
    SELECT DISTINCT resource_type
    FROM ops.bulk_exports e
    CROSS JOIN unnest(e.resource_types) resource_type
    JOIN ops.checkpoints c USING (resource_type, source)
    WHERE source = ops.current_source()
        AND e.base_url = %(base)s
        AND e.level = %(level)s
        AND e.type_filter = %(filter)s
        AND e.since IS NULL
        AND e.status IN ('done', 'removed')
        AND c.loaded_until >= e.transaction_time
        AND resource_type = ANY(%(types)s)
"""


@dataclass(frozen=True, slots=True)
class Scope:
    """What all exports of one deployment have in common: the server, the level and the type filter."""

    base_url: str
    level: str
    type_filter: str


@dataclass(frozen=True, slots=True)
class BulkExport:
    """A bulk export. ``manifest`` is None until the export is complete on the server.

    ``files_done`` contains the index in the manifest's ``output`` of every file that is in the store. The export
    contains every resource of its types that was updated from ``since`` (None: without a lower limit) to
    ``transaction_time``. ``used_at`` is the time at which a load first used it. ``kick_off_date`` is the ``Date`` of
    the server's response to the request.
    """

    id: str
    base_url: str
    status_url: str
    status: str
    resource_types: tuple[str, ...]
    since: datetime | None
    requested_at: datetime
    kick_off_date: datetime | None = None
    transaction_time: datetime | None = None
    manifest: ExportManifest | None = None
    files_done: frozenset[int] = frozenset()
    used_at: datetime | None = None
    finished_at: datetime | None = None
    notices: tuple[Notice, ...] = ()

    @property
    def until(self) -> datetime:
        """The transaction time of an export that is complete on the server."""
        assert self.transaction_time is not None
        return self.transaction_time

    def covers(self, resource_type: str, since: datetime | None) -> bool:
        """Return whether the export contains all resources of a type that were updated since ``since``."""
        return resource_type in self.resource_types and (
            self.since is None or (since is not None and self.since <= since)
        )


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


def find_usable(conn: Connection, scope: Scope) -> list[BulkExport]:
    """Return the exports that are in the store or not finished, the latest first."""
    rows = conn.execute(_FIND, _parameters(scope)).fetchall()
    conn.commit()
    return [_export(row) for row in rows]


def find_fully_loaded_types(conn: Connection, scope: Scope, resource_types: Sequence[str]) -> frozenset[str]:
    """Return the types for which an export of all resources is loaded into the tables.

    For these types an export of later changes suffices. For other types it does not, because a server need not return
    resources without ``lastUpdated`` in such an export.
    """
    rows = conn.execute(_FIND_FULLY_LOADED, {**_parameters(scope), "types": list(resource_types)}).fetchall()
    conn.commit()
    return frozenset(resource_type for (resource_type,) in rows)


def _parameters(scope: Scope) -> dict[str, Any]:
    return {"base": scope.base_url, "level": scope.level, "filter": scope.type_filter}


def begin(conn: Connection, export: BulkExport, request: ExportRequest) -> None:
    """Record an export as soon as the server has accepted the request. Commits."""
    conn.execute(
        """
        INSERT INTO ops.bulk_exports
            (id, base_url, level, resource_types, type_filter, since, status_url, requested_at, kick_off_date)
        VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s)
        """,
        [
            export.id,
            export.base_url,
            request.level,
            list(request.resource_types),
            request.type_filter,
            request.since,
            export.status_url,
            export.requested_at,
            export.kick_off_date,
        ],
    )
    conn.commit()


def record_manifest(conn: Connection, export_id: str, manifest: ExportManifest, transaction_time: datetime) -> None:
    """Record that the server has completed the export, and the time up to which it is complete. Commits."""
    conn.execute(
        "UPDATE ops.bulk_exports SET status = 'downloading', manifest = %s, transaction_time = %s WHERE id = %s",
        [Jsonb(manifest_to_json(manifest)), transaction_time, export_id],
    )
    conn.commit()


def renew_manifest(conn: Connection, export_id: str, manifest: ExportManifest, files_done: Collection[int]) -> None:
    """Replace the links of an export. Without ``files_done`` its download is restarted. Commits."""
    conn.execute(
        "UPDATE ops.bulk_exports SET manifest = %s, files_done = %s WHERE id = %s",
        [Jsonb(manifest_to_json(manifest)), list(files_done), export_id],
    )
    if not files_done:
        conn.execute("DELETE FROM ops.bulk_parts WHERE export_id = %s", [export_id])
    conn.commit()


def read_files_done(conn: Connection, export_id: str) -> frozenset[int]:
    """Return the indexes in the manifest's ``output`` of the files that are in the store."""
    row = conn.execute("SELECT files_done FROM ops.bulk_exports WHERE id = %s", [export_id]).fetchone()
    conn.commit()
    return frozenset(row[0] if row else ())


def record_notices(conn: Connection, export_id: str, notices: Sequence[Notice]) -> None:
    """Add notices to an export, for the windows of every run that reads it. Commits."""
    conn.execute(
        "UPDATE ops.bulk_exports SET notices = notices || %s WHERE id = %s",
        [Jsonb([msgspec.to_builtins(notice) for notice in notices]), export_id],
    )
    conn.commit()


def mark_used(conn: Connection, export_ids: Collection[str], at: datetime) -> None:
    """Record that a load uses the exports. Commits."""
    conn.execute(
        "UPDATE ops.bulk_exports SET used_at = %s WHERE id = ANY(%s) AND used_at IS NULL", [at, list(export_ids)]
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
        WHERE e.source = ops.current_source() AND base_url = %s AND finished_at < %s
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
        SET status = 'removed'
        WHERE id = %s AND status = 'done'
        """,
        [export_id],
    )
    conn.commit()


def _export(row: Sequence[Any]) -> BulkExport:
    (
        export_id, base_url, status_url, status, resource_types, since, requested_at, kick_off_date, transaction_time,
        manifest_json, files_done, used_at, finished_at, notices,
    ) = row  # fmt: skip
    return BulkExport(
        export_id,
        base_url,
        status_url,
        status,
        tuple(resource_types),
        since,
        requested_at,
        kick_off_date,
        transaction_time,
        manifest_from_json(manifest_json) if manifest_json else None,
        frozenset(files_done),
        used_at,
        finished_at,
        msgspec.convert(notices, tuple[Notice, ...]),
    )
