"""What ``ops.landing_files`` says of a landing zone: its files by name, and the number of files by status."""

from dataclasses import dataclass
from typing import Any

from psycopg import sql
from psycopg.rows import dict_row

from fhir_assets.warehouse.ops.landing_file_names import read_name_or_label
from fhir_assets.warehouse.postgres.db.connections import Connection, Session

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


def list_files(
    conn: Session, zone: str, *, status: str | None = None, label: str = "", limit: int = 100
) -> list[dict[str, Any]]:
    """Return at most ``limit`` files of a zone, newest first. The status ``bad`` selects the bad files.

    ``label`` selects the files whose stored name begins with it. A name that cannot be decrypted is its label.
    """
    query = sql.SQL("""
        SELECT
            name, encrypted_name, size, status, {is_bad} AS bad, rows, rejected, deleted, skipped, known_before,
            found_at, left(sha256, 12) AS content, error
        FROM ops.landing_files
        WHERE source = ops.current_source()
            AND zone = %(zone)s
            AND (%(status)s::text IS NULL OR status = %(status)s OR %(status)s = 'bad' AND {is_bad})
            AND starts_with(name, %(label)s)
        ORDER BY found_at DESC, name
        LIMIT %(limit)s
    """).format(is_bad=_IS_BAD)
    params = {"zone": zone, "status": status, "label": label, "limit": limit}
    with conn.cursor(row_factory=dict_row) as cursor:
        files = cursor.execute(query, params).fetchall()
    for file in files:
        stored, encrypted = file["name"], file.pop("encrypted_name")
        file["name"] = read_name_or_label(conn, zone, stored, encrypted)
    return files


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
