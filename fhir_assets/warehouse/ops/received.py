"""``ops.received``: inputs that were received through another channel than the source, and whether they are loaded.

An origin (``<channel>:<identity>``, for example ``landing:<sha256>``) identifies an input; it has a row for each window
and resource type.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from fhir_assets.warehouse.ops import post_loader
from fhir_assets.warehouse.postgres.db import advisory_locks
from fhir_assets.warehouse.postgres.db.connections import Connection

FIRST_WAIT_SECONDS = 60
"""Seconds between the first request of a run and the next, if the window is not loaded; doubled with each request."""

LONGEST_WAIT_SECONDS = 3600


@dataclass(frozen=True, slots=True)
class ReceivedWindow:
    """The parts that an origin added to a window of a type, by name, and the numbers of resources.

    ``rows`` were written to the parts, ``rejected`` became dead letters.
    """

    resource_type: str
    partition_key: str
    parts: tuple[str, ...]
    rows: int
    rejected: int


@dataclass(frozen=True, slots=True)
class PendingWindow:
    """A window of a type that is not loaded yet. ``requested_runs`` is the number of runs requested to load it."""

    resource_type: str
    partition_key: str
    requested_runs: int


@dataclass(frozen=True, slots=True)
class PostedWindow:
    """A window of a type with posted resources that are not loaded yet. ``rows`` counts these resources."""

    resource_type: str
    partition_key: str
    rows: int


def lock_origin(conn: Connection, origin: str) -> None:
    """Lock an origin until this connection closes. Waits while another connection holds the lock. Commits."""
    conn.execute("SELECT pg_advisory_lock(%s, hashtext(%s))", [advisory_locks.RECEIVED_ORIGIN, origin])
    conn.commit()


def list_by_origin(conn: Connection, origin: str) -> list[ReceivedWindow]:
    """Return the windows of an origin; the list is empty if the origin is unknown or contained no resources."""
    rows = conn.execute(
        """
        SELECT resource_type, partition_key, parts, rows, rejected
        FROM ops.received
        WHERE source = ops.current_source()
            AND origin = %s
        ORDER BY resource_type, partition_key
        """,
        [origin],
    )
    return [ReceivedWindow(name, key, tuple(parts), count, rejected) for name, key, parts, count, rejected in rows]


def record(
    conn: Connection,
    origin: str,
    windows: Sequence[ReceivedWindow],
    arrivals: Collection[datetime] = (),
    *,
    posted: bool = False,
) -> None:
    """Record that an origin was received completely. Windows without parts are marked as loaded.

    ``arrivals`` are the times of arrival of its resources, by which resources of the same delivery are recognized.
    ``posted`` states that it was posted over HTTP: the commit wakes the post loader.
    """
    channel = origin.partition(":")[0]
    with conn.cursor() as cursor:
        cursor.executemany(
            """
            INSERT INTO ops.received
                (origin, channel, resource_type, partition_key, parts, rows, rejected, arrivals, posted, loaded_at)
            VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, CASE WHEN %s THEN clock_timestamp() END)
            ON CONFLICT (origin, resource_type, partition_key, source) DO NOTHING
            """,
            [
                (
                    origin,
                    channel,
                    window.resource_type,
                    window.partition_key,
                    list(window.parts),
                    window.rows,
                    window.rejected,
                    sorted(arrivals),
                    posted,
                    not window.parts,
                )
                for window in windows
            ],
        )
    if posted:
        post_loader.notify(conn)


def find_pending(
    conn: Connection,
    *,
    origin: str | None = None,
    now: datetime | None = None,
    reserved_since: datetime | None = None,
) -> list[PendingWindow]:
    """Return the received windows that are not loaded, in order; only those of ``origin`` if it is given.

    With ``now``, windows are left out if the waiting time since their last requested run has not elapsed. With
    ``reserved_since``, windows are left out in which only posts wait that arrived since then (see ``post_loader``).
    """
    rows = conn.execute(
        """
        SELECT resource_type, partition_key, max(asked)
        FROM ops.received
        WHERE source = ops.current_source()
            AND loaded_at IS NULL
            AND (%(origin)s::text IS NULL OR origin = %(origin)s)
        GROUP BY 1, 2
        HAVING (
                %(now)s::timestamptz IS NULL
                OR bool_or(asked_at IS NULL)
                OR max(asked_at) < %(now)s
                    - least(%(first)s * power(2, least(max(asked), 20) - 1), %(longest)s) * interval '1 second'
            )
            AND (
                %(reserved_since)s::timestamptz IS NULL
                OR NOT bool_and(posted AND received_at >= %(reserved_since)s)
            )
        ORDER BY 2, 1
        """,
        {
            "origin": origin,
            "now": now,
            "reserved_since": reserved_since,
            "first": FIRST_WAIT_SECONDS,
            "longest": LONGEST_WAIT_SECONDS,
        },
    )
    return [PendingWindow(*row) for row in rows]


def find_posted(conn: Connection) -> list[PostedWindow]:
    """Return the windows in which posted resources wait to be loaded, in order."""
    rows = conn.execute(
        """
        SELECT resource_type, partition_key, sum(rows)::bigint
        FROM ops.received
        WHERE source = ops.current_source() AND posted AND loaded_at IS NULL
        GROUP BY 1, 2
        ORDER BY 2, 1
        """
    )
    return [PostedWindow(*row) for row in rows]


def find_unverified_posts(conn: Connection, since: datetime) -> list[tuple[str, str]]:
    """Return the windows (type, partition key) with posts that were loaded since then and have no verdict yet."""
    return conn.execute(
        """
        SELECT DISTINCT r.resource_type, r.partition_key
        FROM ops.received AS r
        JOIN ops.window_verdicts AS v USING (source, resource_type, partition_key)
        WHERE r.source = ops.current_source() AND r.posted AND r.loaded_at >= %s AND v.reconciled IS NULL
        ORDER BY 2, 1
        """,
        [since],
    ).fetchall()


def find_pending_windows(conn: Connection, resource_type: str, partition_keys: Sequence[str]) -> list[str]:
    """Return those of the windows of a type that have received resources that are not loaded yet."""
    rows = conn.execute(
        """
        SELECT DISTINCT partition_key
        FROM ops.received
        WHERE source = ops.current_source()
            AND loaded_at IS NULL AND resource_type = %s AND partition_key = ANY(%s)
        """,
        [resource_type, list(partition_keys)],
    )
    return [key for (key,) in rows]


def record_request(conn: Connection, windows: Sequence[PendingWindow], *, now: datetime) -> None:
    """Record that a run was requested to load these windows."""
    conn.execute(
        """
        UPDATE ops.received
        SET asked = asked + 1, asked_at = %s
        FROM unnest(%s::text[], %s::text[]) AS w (type, key)
        WHERE source = ops.current_source()
            AND loaded_at IS NULL
            AND resource_type = w.type
            AND partition_key = w.key
        """,
        [now, [w.resource_type for w in windows], [w.partition_key for w in windows]],
    )


def record_loaded(conn: Connection, run_id: str, resource_type: str, inputs: Mapping[str, Sequence[str]]) -> None:
    """Record that the raw parts in ``inputs``, by partition key, are loaded. Call it in the transaction of the load."""
    rows = conn.execute(
        """
        SELECT origin, partition_key, parts
        FROM ops.received
        WHERE source = ops.current_source()
            AND loaded_at IS NULL AND resource_type = %s AND partition_key = ANY(%s)
        """,
        [resource_type, list(inputs)],
    ).fetchall()
    loaded_parts = {key: frozenset(parts) for key, parts in inputs.items()}
    loaded = [(origin, key) for origin, key, parts in rows if loaded_parts[key].issuperset(parts)]
    if loaded:
        conn.execute(
            """
            UPDATE ops.received
            SET loaded_at = clock_timestamp(), loaded_run_id = %s
            FROM unnest(%s::text[], %s::text[]) AS d (loaded_origin, key)
            WHERE source = ops.current_source()
                AND origin = d.loaded_origin
                AND resource_type = %s
                AND partition_key = d.key
            """,
            [run_id, [origin for origin, _ in loaded], [key for _, key in loaded], resource_type],
        )
