"""The state of a source in the database: removes it, or adapts it to other settings.

The functions change checkpoints, loaded parts, exports, dead letters and received inputs. They run in the caller's
transaction.
"""

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime

from psycopg import sql

from fhir_assets.warehouse.ops.received import ReceivedWindow
from fhir_assets.warehouse.postgres.db.connections import Connection

_STATE = (
    *("loaded_parts", "checkpoints", "deletion_checkpoints", "deletion_parts", "missing_references"),
    *("window_verdicts", "held_windows"),
)
"""The tables of ``ops`` that record what was loaded from a source."""

_CONTENT = ("withheld", "consent_records", "consents", "consent_changes")
"""The tables of ``ops`` that contain data of a source's resources. Loads fill them."""


def find_running(conn: Connection) -> list[str]:
    """Return the ids of the runs that are recorded as running."""
    rows = conn.execute("SELECT DISTINCT run_id FROM ops.ingestion_runs WHERE status = 'RUNNING'")
    return [run_id for (run_id,) in rows]


def list_origins(conn: Connection) -> frozenset[str]:
    """Return the origins of received inputs whose content comes from the source.

    These are missing references, which are read from the source by id, and corrections of fetched resources.
    """
    rows = conn.execute(
        r"""
        SELECT DISTINCT r.origin
        FROM ops.received r
        WHERE r.source = ops.current_source()
            AND (
                r.channel = 'missing'
                OR r.channel = 'correction' AND EXISTS (
                    SELECT FROM ops.dead_letters d
                    WHERE d.id = substring(r.origin FROM '^correction:(\d+)-')::bigint AND d.origin IS NULL
                )
            )
        """
    )
    return frozenset(origin for (origin,) in rows)


def remove_state(conn: Connection, origins: Collection[str]) -> None:
    """Remove checkpoints, loaded parts, deletions, exports, withheld resources and consents of the source.

    Its windows are then loaded from the start. Received inputs of the given ``origins`` are removed. Open dead letters
    that came from the source or from these origins are discarded, and the corrections of fetched resources are removed.
    """
    for table in (*_STATE, *_CONTENT):
        conn.execute(sql.SQL("DELETE FROM {} WHERE source = ops.current_source()").format(sql.Identifier("ops", table)))
    remove_exports(conn)
    conn.execute("DELETE FROM ops.received WHERE source = ops.current_source() AND origin = ANY(%s)", [list(origins)])
    conn.execute(
        """
        DELETE FROM ops.corrections
        WHERE source = ops.current_source()
            AND fingerprint IN (
                SELECT fingerprint
                FROM ops.dead_letters
                WHERE source = ops.current_source() AND origin IS NULL
            )
        """
    )
    conn.execute(
        """
        UPDATE ops.dead_letters
        SET
            status = 'discarded',
            resolution = 'the source was started anew',
            resolved_at = now(),
            claimed_by = NULL,
            replay_requested_at = NULL
        WHERE source = ops.current_source()
            AND status IN ('open', 'replaying')
            AND (origin IS NULL OR origin = ANY(%s))
        """,
        [list(origins)],
    )


def remove_exports(conn: Connection) -> None:
    """Cancel the bulk exports of the source and remove the records of their files, so that no run continues them."""
    conn.execute(
        """
        DELETE FROM ops.bulk_parts
        WHERE export_id IN (SELECT id FROM ops.bulk_exports WHERE source = ops.current_source())
        """
    )
    conn.execute(
        """
        UPDATE ops.bulk_exports
        SET
            status = 'cancelled',
            error = 'the settings of the source changed',
            finished_at = coalesce(finished_at, now())
        WHERE source = ops.current_source()
            AND status IN ('waiting', 'downloading', 'done')
        """
    )


def remove_rows(conn: Connection) -> int:
    """Remove every resource of the source from the tables. Returns the number of resources."""
    views = conn.execute(
        """
        SELECT name
        FROM ops.view_tables
        WHERE to_regclass(format('fhir.%I', name)) IS NOT NULL
        ORDER BY name
        """
    ).fetchall()
    for (name,) in views:
        conn.execute(
            sql.SQL("DELETE FROM {} WHERE _source = ops.current_source()").format(sql.Identifier("fhir", name))
        )
    return conn.execute("DELETE FROM fhir.resource WHERE source = ops.current_source()").rowcount


def remove_loaded_parts(conn: Connection) -> None:
    """Mark every part as not loaded."""
    conn.execute("DELETE FROM ops.loaded_parts WHERE source = ops.current_source()")


def remove_checkpoints(conn: Connection) -> None:
    """Remove the checkpoints, so that the next load begins at the oldest resource of the source."""
    conn.execute("DELETE FROM ops.checkpoints WHERE source = ops.current_source()")


def raise_checkpoints(conn: Connection, start: datetime) -> None:
    """Move checkpoints that are before the start of the first window to that start."""
    conn.execute(
        """
        UPDATE ops.checkpoints
        SET loaded_until = %(start)s
        WHERE source = ops.current_source() AND loaded_until < %(start)s
        """,
        {"start": start},
    )


def list_dead_letter_keys(conn: Connection) -> list[str]:
    """Return the partition keys of the open dead letters."""
    rows = conn.execute(
        """
        SELECT DISTINCT partition_key
        FROM ops.dead_letters
        WHERE source = ops.current_source()
            AND status IN ('open', 'replaying') AND partition_key <> ''
        """
    )
    return [key for (key,) in rows]


def move_dead_letters(conn: Connection, keys: Mapping[str, str]) -> None:
    """Change the partition keys of open dead letters. ``keys`` maps old keys to new ones."""
    conn.execute(
        """
        UPDATE ops.dead_letters
        SET partition_key = new_key
        FROM unnest(%s::text[], %s::text[]) AS k (old_key, new_key)
        WHERE source = ops.current_source()
            AND status IN ('open', 'replaying')
            AND partition_key = old_key
        """,
        [list(keys), list(keys.values())],
    )


def move_received(conn: Connection, windows: Mapping[str, Sequence[ReceivedWindow]], old_keys: Sequence[str]) -> None:
    """Replace the received inputs in the partitions ``old_keys`` by ``windows``, by origin. They are loaded again."""
    conn.execute(
        "DELETE FROM ops.received WHERE source = ops.current_source() AND origin = ANY(%s) AND partition_key = ANY(%s)",
        [list(windows), list(old_keys)],
    )
    with conn.cursor() as cursor:
        cursor.executemany(
            """
            INSERT INTO ops.received AS known
                (origin, channel, resource_type, partition_key, parts, rows, rejected, loaded_at)
            VALUES (%s, %s, %s, %s, %s, %s, %s, CASE WHEN %s THEN clock_timestamp() END)
            ON CONFLICT (origin, resource_type, partition_key, source) DO UPDATE SET
                parts = known.parts || excluded.parts,
                rows = known.rows + excluded.rows,
                rejected = known.rejected + excluded.rejected,
                loaded_at = excluded.loaded_at
            """,
            [
                (
                    origin,
                    origin.partition(":")[0],
                    w.resource_type,
                    w.partition_key,
                    list(w.parts),
                    w.rows,
                    w.rejected,
                    not w.parts,
                )
                for origin, entries in windows.items()
                for w in entries
            ],
        )


def request_received(conn: Connection) -> int:
    """Mark every received input as not loaded, so that its parts are loaded again. Returns the number of windows."""
    return conn.execute(
        """
        UPDATE ops.received
        SET loaded_at = NULL, loaded_run_id = NULL, asked = 0, asked_at = NULL
        WHERE source = ops.current_source()
            AND cardinality(parts) > 0
        """
    ).rowcount
