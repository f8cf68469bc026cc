"""``ops.landing_files``: the files of each landing zone, with their status and counts.

With encryption keys their names are encrypted: see ``landing_file_names``.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

from psycopg import sql
from psycopg.types.json import Jsonb

from fhir_assets.warehouse.ops import landing_file_names, post_loader
from fhir_assets.warehouse.ops.landing_file_names import IS_NAMED, encrypt_name, get_label, label_names, read_name
from fhir_assets.warehouse.postgres.db.connections import Connection, Session

FIRST_WAIT_SECONDS = 60
"""Seconds between the first failure of a file and the next attempt; doubled with each failure."""

LONGEST_WAIT_SECONDS = 3600


class ListedFile(Protocol):
    """A file in the listing of a zone."""

    @property
    def name(self) -> str:
        """The path in the zone."""
        ...

    @property
    def size(self) -> int:
        """The size in bytes."""
        ...

    @property
    def mark(self) -> str:
        """The version of the content: modification time or ETag."""
        ...

    @property
    def written(self) -> datetime:
        """The time of the last modification."""
        ...

    @property
    def fault(self) -> str | None:
        """The reason why the file can never be read, None if it can."""
        ...


@dataclass(frozen=True, slots=True)
class ReadyFile:
    """A complete file to be received. ``batch`` is the batch it is assigned to, None if it has no batch yet.

    ``posted`` states that the HTTP API wrote it.
    """

    name: str
    size: int
    mark: str
    written: datetime
    batch: str | None = None
    posted: bool = False


def record_listing(conn: Session, zone: str, files: Iterable[tuple[ListedFile, bool | None]]) -> None:
    """Record the current listing of a zone: pairs of a file and whether the file is known to be complete.

    None in place of the latter marks a file that the zone ignores: it has the status ``ignored``. A file is ready if it
    is known to be complete or unchanged since the last listing. The row of a changed file is reset. The rows of files
    that were removed from the zone before they were loaded are deleted. A file with a fault has the status ``failed``
    with the fault as its error, and is not tried again.
    """
    if conn.cipher.encrypts:
        landing_file_names.encrypt_zone(conn, zone)
    with conn.cursor() as cursor:
        cursor.execute(
            """
            CREATE TEMPORARY TABLE listing (
                name text, encrypted_name bytea, size bigint, mark text, written timestamptz, complete boolean,
                fault text
            ) ON COMMIT DROP
            """
        )
        with cursor.copy("COPY listing FROM STDIN") as copy:
            for file, complete in files:
                label = get_label(conn, zone, file.name)
                encrypted = encrypt_name(conn, zone, label, file.name)
                copy.write_row((label, encrypted, file.size, file.mark, file.written, complete, file.fault))
        cursor.execute("ANALYZE listing")
        cursor.execute(
            """
            DELETE FROM ops.landing_files f
            WHERE source = ops.current_source()
                AND zone = %s
                AND status <> 'loaded'
                -- The zone may have been listed before the API wrote the file.
                AND NOT (posted AND found_at > clock_timestamp() - interval '10 minutes')
                AND NOT EXISTS (SELECT FROM listing s WHERE s.name = f.name)
            """,
            [zone],
        )
        cursor.execute(_UPSERT_LISTING, {"zone": zone, "key_id": conn.cipher.key_id})
        if conn.cipher.encrypts:
            readable = [conn.cipher.key_id, *conn.cipher.outdated_key_ids]
            cursor.execute(_REPLACE_UNREADABLE, {"zone": zone, "key_id": conn.cipher.key_id, "readable": readable})
        cursor.execute("DROP TABLE listing")


def record_posted(conn: Session, zone: str, file: ListedFile) -> None:
    """Record a file that the HTTP API has written as ready. The commit wakes the post loader."""
    label = get_label(conn, zone, file.name)
    encrypted = encrypt_name(conn, zone, label, file.name)
    conn.execute(
        """
        INSERT INTO ops.landing_files AS f
            (zone, name, encrypted_name, key_id, size, mark, written_at, status, posted)
        VALUES (%s, %s, %s, %s, %s, %s, %s, 'ready', true)
        ON CONFLICT (zone, name, source) DO UPDATE SET posted = true, written_at = excluded.written_at
        """,
        [zone, label, encrypted, conn.cipher.key_id, file.size, file.mark, file.written],
    )
    post_loader.notify(conn)


def find_posted(conn: Session, zone: str, *, limit: int) -> list[ReadyFile]:
    """Return at most ``limit`` posted files to receive, oldest first, without those that failed before."""
    rows = conn.execute(
        """
        SELECT name, encrypted_name, size, mark, written_at, batch, posted
        FROM ops.landing_files f
        WHERE source = ops.current_source()
            AND zone = %s
            AND posted
            AND status = 'ready'
            -- A batch is received as a whole: one with other files belongs to the run that has formed it.
            AND NOT EXISTS (
                SELECT FROM ops.landing_files o
                WHERE o.source = f.source AND o.zone = f.zone AND o.batch = f.batch AND NOT o.posted
            )
        ORDER BY written_at
        FETCH FIRST %s ROWS WITH TIES
        """,
        [zone, limit],
    )
    return _read_ready(conn, zone, rows, limit)


_IS_READY = sql.SQL("""
    source = ops.current_source()
    AND zone = %(zone)s
    AND (
        status = 'ready'
        OR status = 'failed'
            -- Files that can never be read, such as links, were never tried.
            AND tried_at < %(now)s
                - least(%(first)s * power(2, least(attempts, 20) - 1), %(longest)s) * interval '1 second'
    )
    AND (
        %(reserved_since)s::timestamptz IS NULL
        OR NOT (posted AND status = 'ready' AND found_at >= %(reserved_since)s)
    )
""")


def find_ready(conn: Session, zone: str, *, now: datetime, limit: int) -> list[ReadyFile]:
    """Return at most ``limit`` files to receive, oldest first. Failed files are included after their waiting time."""
    query = sql.SQL("""
        SELECT name, encrypted_name, size, mark, written_at, batch, posted
        FROM ops.landing_files
        WHERE {is_ready}
        ORDER BY written_at
        FETCH FIRST %(limit)s ROWS WITH TIES
    """).format(is_ready=_IS_READY)
    rows = conn.execute(query, {**_build_ready_params(zone, now, None), "limit": limit})
    return _read_ready(conn, zone, rows, limit)


def count_ready(conn: Connection, zone: str, *, now: datetime, reserved_since: datetime | None) -> int:
    """Return the number of files to receive, without those that were posted since ``reserved_since``.

    See ``post_loader`` for the latter.
    """
    query = sql.SQL("SELECT count(*) FROM ops.landing_files WHERE {is_ready}").format(is_ready=_IS_READY)
    row = conn.execute(query, _build_ready_params(zone, now, reserved_since)).fetchone()
    return int(row[0]) if row else 0


def _build_ready_params(zone: str, now: datetime, reserved_since: datetime | None) -> dict[str, object]:
    return {
        "zone": zone,
        "now": now,
        "reserved_since": reserved_since,
        "first": FIRST_WAIT_SECONDS,
        "longest": LONGEST_WAIT_SECONDS,
    }


def _read_ready(conn: Session, zone: str, rows: Iterable[tuple[Any, ...]], limit: int) -> list[ReadyFile]:
    """Return the first files. Those that were written at the same time are in the order of their names."""
    files = [ReadyFile(read_name(conn, zone, name, encrypted), *rest) for name, encrypted, *rest in rows]
    return sorted(files, key=lambda file: (file.written, file.name))[:limit]


@dataclass(frozen=True, slots=True)
class Retries:
    """The ``files`` that could not be read and are tried again, the first of them from the time ``next_at`` on."""

    files: int
    next_at: datetime

    def __str__(self) -> str:
        subject = f"{self.files:,} files that could not be read wait for their" if self.files > 1 else _ONE_FILE
        return f"{subject} next attempt, from {self.next_at.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC on"


_ONE_FILE = "1 file that could not be read waits for its"


def find_retries(conn: Connection, zone: str) -> Retries | None:
    """Return the failed files of a zone, None if there are none."""
    row = conn.execute(
        """
        SELECT
            count(*),
            min(tried_at + least(%(first)s * power(2, least(attempts, 20) - 1), %(longest)s) * interval '1 second')
        FROM ops.landing_files
        WHERE source = ops.current_source() AND zone = %(zone)s AND status = 'failed' AND tried_at IS NOT NULL
        """,
        {"zone": zone, "first": FIRST_WAIT_SECONDS, "longest": LONGEST_WAIT_SECONDS},
    ).fetchone()
    return Retries(*row) if row and row[0] else None


def assign_batch(conn: Session, zone: str, files: Sequence[ReadyFile], batch: str) -> list[ReadyFile]:
    """Assign files to a batch and return the files that were assigned.

    The files of a batch are received together, even if a crashed attempt is repeated. Files that another process has
    assigned in the meantime are not returned.
    """
    query = sql.SQL("""
        UPDATE ops.landing_files
        SET batch = %(batch)s
        WHERE source = ops.current_source()
            AND zone = %(zone)s
            AND {is_named}
            AND batch IS NULL
        RETURNING name
    """).format(is_named=IS_NAMED)
    names = label_names(conn, zone, [file.name for file in files])
    assigned = {name for (name,) in conn.execute(query, {**names, "zone": zone, "batch": batch})}
    return [file for file in files if not assigned.isdisjoint((file.name, get_label(conn, zone, file.name)))]


def record_loaded(
    conn: Session,
    zone: str,
    file: ReadyFile,
    *,
    run_id: str,
    sha256: str,
    counts: Mapping[str, int],
    skipped: Mapping[str, int],
    known_before: bool,
) -> None:
    """Record that a file was received completely. ``counts`` has the keys ``rows``, ``rejected`` and ``deleted``."""
    _record_attempt(
        conn,
        zone,
        file,
        {
            "status": "loaded",
            "run_id": run_id,
            "sha256": sha256,
            "skipped": Jsonb(dict(skipped)),
            "known_before": known_before,
            "error": None,
            **counts,
        },
    )


def record_failure(conn: Session, zone: str, file: ReadyFile, *, run_id: str, error: str) -> None:
    """Record that a file could not be received and must be tried again. ``error`` must contain no patient data."""
    _record_attempt(conn, zone, file, {"status": "failed", "run_id": run_id, "error": error, "batch": None})


def _record_attempt(conn: Session, zone: str, file: ReadyFile, values: Mapping[str, object]) -> None:
    assignments = sql.SQL(", ").join(
        sql.SQL("{} = {}").format(sql.Identifier(name), sql.Placeholder(name)) for name in values
    )
    conn.execute(
        sql.SQL("""
            UPDATE ops.landing_files
            SET {}, attempts = attempts + 1, tried_at = clock_timestamp()
            WHERE source = ops.current_source()
                AND zone = %(zone)s AND {} AND mark = %(mark)s AND size = %(size)s
        """).format(assignments, IS_NAMED),
        {**values, **label_names(conn, zone, [file.name]), "zone": zone, "mark": file.mark, "size": file.size},
    )


_UPSERT_LISTING = """
    INSERT INTO ops.landing_files AS f (zone, name, encrypted_name, key_id, size, mark, written_at, status, error)
    SELECT DISTINCT ON (name)
        %(zone)s, name, encrypted_name, %(key_id)s::text, size, mark, written,
        CASE
            WHEN complete IS NULL THEN 'ignored'
            WHEN fault IS NOT NULL THEN 'failed'
            WHEN complete THEN 'ready'
            ELSE 'arriving'
        END,
        CASE WHEN complete IS NOT NULL THEN fault END
    FROM listing
    -- The name of a file with a fault is escaped, and may then be that of another file.
    ORDER BY name, fault NULLS FIRST
    ON CONFLICT (zone, name, source) DO UPDATE SET
        size = excluded.size,
        mark = excluded.mark,
        written_at = excluded.written_at,
        status = CASE
            WHEN excluded.status IN ('ignored', 'failed') THEN excluded.status
            WHEN (f.size, f.mark) = (excluded.size, excluded.mark) THEN 'ready'
            ELSE excluded.status
        END,
        tried_at = CASE WHEN (f.size, f.mark) = (excluded.size, excluded.mark) THEN f.tried_at END,
        attempts = CASE WHEN (f.size, f.mark) = (excluded.size, excluded.mark) THEN f.attempts ELSE 0 END,
        found_at = CASE
            WHEN (f.size, f.mark) = (excluded.size, excluded.mark) THEN f.found_at
            ELSE clock_timestamp()
        END,
        rows = NULL,
        rejected = NULL,
        deleted = NULL,
        skipped = '{}',
        sha256 = NULL,
        error = excluded.error,
        known_before = false,
        batch = NULL
    WHERE f.status = 'arriving'
        OR f.status = 'ignored' AND excluded.status <> 'ignored'
        OR (f.size, f.mark) <> (excluded.size, excluded.mark)
"""

_REPLACE_UNREADABLE = """
    UPDATE ops.landing_files f
    SET encrypted_name = s.encrypted_name, key_id = %(key_id)s
    FROM listing s
    WHERE f.source = ops.current_source()
        AND f.zone = %(zone)s
        AND f.name = s.name
        AND f.key_id <> ALL(%(readable)s)
"""
