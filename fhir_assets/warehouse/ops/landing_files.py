"""``ops.landing_files``: the files of each landing zone, with their status and counts."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

from psycopg import sql
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb

from fhir_assets.warehouse.ops import post_loader
from fhir_assets.warehouse.postgres.db.connections import Connection

FIRST_WAIT_SECONDS = 60
"""Seconds between the first failure of a file and the next attempt; doubled with each failure."""

LONGEST_WAIT_SECONDS = 3600

_IS_BAD = sql.SQL("""
    (
        status = 'failed'
        OR rejected > 0 AND EXISTS (
            SELECT FROM ops.dead_letters d
            WHERE d.source = ops.current_source()
                AND d.origin = 'landing:' || sha256 AND d.stage = 'fetch' AND d.status IN ('open', 'replaying')
        )
    )
""")
"""The condition for bad files: the file could not be read, or a part of the file is an unresolved dead letter."""


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


def record_listing(conn: Connection, zone: str, files: Iterable[tuple[ListedFile, bool | None]]) -> None:
    """Record the current listing of a zone: pairs of a file and whether the file is known to be complete.

    None in place of the latter marks a file that the zone ignores: it has the status ``ignored``. A file is ready if it
    is known to be complete or unchanged since the last listing. The row of a changed file is reset. The rows of files
    that were removed from the zone before they were loaded are deleted. A file with a fault has the status ``failed``
    with the fault as its error, and is not tried again.
    """
    with conn.cursor() as cursor:
        cursor.execute(
            """
            CREATE TEMPORARY TABLE listing (
                name text, size bigint, mark text, written timestamptz, complete boolean, fault text
            ) ON COMMIT DROP
            """
        )
        with cursor.copy("COPY listing FROM STDIN") as copy:
            for file, complete in files:
                copy.write_row((file.name, file.size, file.mark, file.written, complete, file.fault))
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
        cursor.execute(_UPSERT_LISTING, [zone])
        cursor.execute("DROP TABLE listing")


def record_posted(conn: Connection, zone: str, file: ListedFile) -> None:
    """Record a file that the HTTP API has written as ready. The commit wakes the post loader."""
    conn.execute(
        """
        INSERT INTO ops.landing_files AS f (zone, name, size, mark, written_at, status, posted)
        VALUES (%s, %s, %s, %s, %s, 'ready', true)
        ON CONFLICT (zone, name, source) DO UPDATE SET posted = true
        """,
        [zone, file.name, file.size, file.mark, file.written],
    )
    post_loader.notify(conn)


def find_posted(conn: Connection, zone: str, *, limit: int) -> list[ReadyFile]:
    """Return at most ``limit`` posted files to receive, oldest first, without those that failed before."""
    rows = conn.execute(
        """
        SELECT name, size, mark, written_at, batch, posted
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
        ORDER BY written_at, name
        LIMIT %s
        """,
        [zone, limit],
    )
    return [ReadyFile(*row) for row in rows]


def find_ready(
    conn: Connection, zone: str, *, now: datetime, limit: int, reserved_since: datetime | None = None
) -> list[ReadyFile]:
    """Return at most ``limit`` files to receive, oldest first. Failed files are included after their waiting time.

    With ``reserved_since``, files that were posted since then are left out (see ``post_loader``).
    """
    rows = conn.execute(
        """
        SELECT name, size, mark, written_at, batch, posted
        FROM ops.landing_files
        WHERE source = ops.current_source()
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
        ORDER BY written_at, name
        LIMIT %(limit)s
        """,
        {
            "zone": zone,
            "now": now,
            "limit": limit,
            "reserved_since": reserved_since,
            "first": FIRST_WAIT_SECONDS,
            "longest": LONGEST_WAIT_SECONDS,
        },
    )
    return [ReadyFile(*row) for row in rows]


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


def assign_batch(conn: Connection, zone: str, files: Sequence[ReadyFile], batch: str) -> list[ReadyFile]:
    """Assign files to a batch and return the files that were assigned.

    The files of a batch are received together, even if a crashed attempt is repeated. Files that another process has
    assigned in the meantime are not returned.
    """
    rows = conn.execute(
        """
        UPDATE ops.landing_files
        SET batch = %s
        WHERE source = ops.current_source()
            AND zone = %s
            AND name = ANY(%s)
            AND batch IS NULL
        RETURNING name
        """,
        [batch, zone, [file.name for file in files]],
    ).fetchall()
    assigned = {name for (name,) in rows}
    return [file for file in files if file.name in assigned]


def record_loaded(
    conn: Connection,
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


def record_failure(conn: Connection, zone: str, file: ReadyFile, *, run_id: str, error: str) -> None:
    """Record that a file could not be received and must be tried again. ``error`` must contain no patient data."""
    _record_attempt(conn, zone, file, {"status": "failed", "run_id": run_id, "error": error, "batch": None})


def list_files(conn: Connection, zone: str, *, status: str | None = None, limit: int = 100) -> list[dict[str, Any]]:
    """Return at most ``limit`` files of a zone, newest first. The status ``bad`` selects the bad files."""
    query = sql.SQL("""
        SELECT
            name, size, status, {is_bad} AS bad, rows, rejected, deleted, skipped, known_before, found_at,
            left(sha256, 12) AS content, error
        FROM ops.landing_files
        WHERE source = ops.current_source()
            AND zone = %(zone)s
            AND (%(status)s::text IS NULL OR status = %(status)s OR %(status)s = 'bad' AND {is_bad})
        ORDER BY found_at DESC, name
        LIMIT %(limit)s
    """).format(is_bad=_IS_BAD)
    with conn.cursor(row_factory=dict_row) as cursor:
        return cursor.execute(query, {"zone": zone, "status": status, "limit": limit}).fetchall()


@dataclass(frozen=True, slots=True)
class ZoneState:
    """The number of files of a zone by status, and the number of bad files.

    A file is bad if it could not be read or has unresolved dead letters. ``sample`` describes the first bad files by
    the beginning of their hash, their number of rejected resources, and their error.
    """

    by_status: dict[str, int]
    bad: int
    sample: list[tuple[str, int, str]]


def get_zone_state(conn: Connection, zone: str, *, sample: int) -> ZoneState:
    """Return the state of a zone at its last listing, with a sample of at most ``sample`` bad files."""
    by_status: dict[str, int] = dict(
        conn.execute(
            """
            SELECT status, count(*)
            FROM ops.landing_files
            WHERE source = ops.current_source() AND zone = %s
            GROUP BY 1
            """,
            [zone],
        ).fetchall()
    )
    query = sql.SQL("""
        SELECT coalesce(left(sha256, 12), ''), coalesce(rejected, 0), coalesce(error, 'dead letters')
        FROM ops.landing_files
        WHERE source = ops.current_source()
            AND zone = %s AND {is_bad}
        ORDER BY found_at, name
    """).format(is_bad=_IS_BAD)
    bad = conn.execute(query, [zone]).fetchall()
    return ZoneState(by_status, len(bad), bad[:sample])


def _record_attempt(conn: Connection, zone: str, file: ReadyFile, values: Mapping[str, object]) -> None:
    assignments = sql.SQL(", ").join(
        sql.SQL("{} = {}").format(sql.Identifier(name), sql.Placeholder(name)) for name in values
    )
    conn.execute(
        sql.SQL("""
            UPDATE ops.landing_files
            SET {}, attempts = attempts + 1, tried_at = clock_timestamp()
            WHERE source = ops.current_source()
                AND zone = %(zone)s AND name = %(name)s AND mark = %(mark)s AND size = %(size)s
        """).format(assignments),
        {**values, "zone": zone, "name": file.name, "mark": file.mark, "size": file.size},
    )


_UPSERT_LISTING = """
    INSERT INTO ops.landing_files AS f (zone, name, size, mark, written_at, status, error)
    SELECT DISTINCT ON (name)
        %s, name, size, mark, written,
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
