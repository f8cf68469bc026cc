"""``ops.numbers``: integers that the API shows beside the ids of patients, encounters and runs.

Numbers are unique over all kinds. An id gets its number when it is asked for, and keeps it.
"""

from collections.abc import Sequence
from typing import Literal

from fhir_assets.warehouse.postgres.db.connections import Connection

Kind = Literal["Patient", "Encounter", "run"]


def ensure(conn: Connection, kind: Kind, ids: Sequence[str]) -> dict[str, int]:
    """Return the number of each id. Ids that have none get one."""
    numbers = _read(conn, kind, ids)
    missing = [identifier for identifier in ids if identifier not in numbers]
    if not missing:
        return numbers
    conn.execute(
        """
        INSERT INTO ops.numbers (kind, id)
        SELECT %s, id
        FROM unnest(%s::text[]) AS missing (id)
        ON CONFLICT (source, kind, id) DO NOTHING
        """,
        [kind, sorted(set(missing))],
    )
    return _read(conn, kind, ids)


def find_id(conn: Connection, kind: Kind, number: int) -> str | None:
    """Return the id that has a number, or None if the number is unknown or of another kind. At most 64 bits."""
    row = conn.execute(
        """
        SELECT id
        FROM ops.numbers
        WHERE number = %s AND kind = %s AND source = ops.current_source()
        """,
        [number, kind],
    ).fetchone()
    return None if row is None else str(row[0])


def _read(conn: Connection, kind: Kind, ids: Sequence[str]) -> dict[str, int]:
    rows = conn.execute(
        """
        SELECT id, number
        FROM ops.numbers
        WHERE source = ops.current_source() AND kind = %s AND id = ANY(%s)
        """,
        [kind, list(ids)],
    )
    return dict(rows.fetchall())
