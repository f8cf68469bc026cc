"""Dead letters that are rows of visit files: found, and locked while they are received again.

Callers take the lock of the ledger (``visits.lock_ledger``) first, as those who record such dead letters do: the two
then cannot wait for each other.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime

from psycopg import sql

from fhir_assets.warehouse.ops.dead_letters import Selection, decrypt_content
from fhir_assets.warehouse.postgres.db.connections import Connection, Session


@dataclass(frozen=True, slots=True)
class RejectedRow:
    """A row that became a dead letter. ``arrived`` is the time at which its file was written, ``body`` the input."""

    id: int
    rule: str
    path: str
    arrived: datetime
    body: bytes = field(repr=False)


def find_open(conn: Connection, selection: Selection, rules: Collection[str]) -> list[int]:
    """Return the ids of the open rows of a selection; those whose last failure is the oldest come first.

    ``rules`` are the rules of dead letters that are rows.
    """
    where, params = replace(selection, status="open").where()
    query = sql.SQL("""
        SELECT id
        FROM ops.dead_letters
        WHERE {}
            AND source = ops.current_source()
            AND stage = 'fetch'
            AND resource_type = 'Encounter'
            AND rule = ANY(%(row_rules)s)
        ORDER BY last_failure, id
    """).format(where)
    return [number for (number,) in conn.execute(query, {**params, "row_rules": sorted(rules)})]


def lock(conn: Session, ids: Sequence[int], statuses: Collection[str]) -> list[RejectedRow]:
    """Lock those of the rows that have one of the statuses, until this transaction ends, and return them.

    They are returned in the order of their arrival. The arrival of a dead letter of an earlier release is that of its
    file; if the file is not known either, the time of the first failure.

    The rows are locked in the order in which ``dead_letters.record`` locks them, so that the two cannot deadlock.
    Raises EncryptionError.
    """
    rows = conn.execute(
        """
        SELECT
            d.id,
            d.rule,
            d.path,
            coalesce(
                d.arrived,
                (SELECT min(f.written_at) FROM ops.landing_files f WHERE 'landing:' || f.sha256 = d.origin),
                d.first_failure
            ),
            d.source,
            d.fingerprint,
            d.resource
        FROM ops.dead_letters d
        WHERE d.source = ops.current_source() AND d.id = ANY(%s) AND d.status = ANY(%s)
        ORDER BY d.fingerprint
        FOR UPDATE OF d
        """,
        [list(ids), sorted(statuses)],
    ).fetchall()
    locked = [
        RejectedRow(number, rule, path, arrived, decrypt_content(conn, *content) or b"")
        for number, rule, path, arrived, *content in rows
    ]
    return sorted(locked, key=lambda row: (row.arrived, row.id))
