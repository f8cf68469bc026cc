"""``ops.ingestion_runs``: state and counts of each run, one row for each resource type and partition.

This module writes the rows. Lists of runs for the command line and the API are in ``run_history``; ``liveness`` finds
dead runs.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from psycopg import sql
from psycopg.rows import dict_row

from fhir_assets.catalog import LOAD_ORDER
from fhir_assets.warehouse.ops import liveness
from fhir_assets.warehouse.postgres.db.connections import Connection

COUNTS = ("server_total", "fetched", "older", "valid", "dead", "withheld", "superseded", "loaded")
"""The counts of a run for one resource type and window.

``fetched`` resources came from the source, without those that the store already had. ``older`` ones were updated before
FHIR_LAST_UPDATED_GTE and not kept; ``dead`` ones became dead letters, in any step; ``withheld`` ones are kept out of
the tables by consent; of ``superseded`` ones the tables have the same version or a newer one; ``loaded`` ones are
distinct versions that are in the tables. In a run that validates and loads everything that it fetches: fetched = older
+ dead + withheld + superseded + loaded. ``valid`` resources were passed to the load: those that are superseded, loaded,
or dead letters of the load.
"""

_SUMMED = COUNTS[1:]

RESULTS = ("valid", "loaded", "superseded", "dead", "withheld")
"""The members of COUNTS that describe the outcome of the resources of a window."""


def start(
    conn: Connection,
    run_id: str,
    resource_types: Sequence[str],
    partition_keys: Sequence[str],
    *,
    triggered_by: str,
    at: datetime,
    replay_of: str | None = None,
) -> None:
    """Insert a row with status RUNNING for each combination of the types and partitions of a run."""
    conn.execute(
        """
        INSERT INTO ops.ingestion_runs (
            run_id, resource_type, partition_key, status, triggered_by, started_at, replay_of_run_id, checkpoint_before
        )
        SELECT %(run)s, named.resource_type, partition_key, 'RUNNING', %(by)s, %(at)s, %(replay_of)s, c.loaded_until
        FROM unnest(%(types)s::text[]) AS named (resource_type)
        CROSS JOIN unnest(%(keys)s::text[]) partition_key
        LEFT JOIN ops.checkpoints c ON c.source = ops.current_source() AND c.resource_type = named.resource_type
        ORDER BY named.resource_type, partition_key
        ON CONFLICT (run_id, resource_type, partition_key, source)
            DO UPDATE SET status = 'RUNNING', finished_at = NULL, error = NULL
        """,
        {
            "run": run_id,
            "by": triggered_by,
            "at": at,
            "replay_of": replay_of,
            "types": list(resource_types),
            "keys": list(partition_keys),
        },
    )


def record_counts(
    conn: Connection, run_id: str, resource_type: str, counts: Mapping[str, Mapping[str, int | None]]
) -> None:
    """Set counts by partition key and name. Counts that are missing or None keep their values.

    ``dead`` is added to the dead letters that earlier steps of the run have counted.

    Raises ValueError if a name is not in COUNTS.
    """
    keys = sorted(counts)
    values_by_name = {name: [counts[key].get(name) for key in keys] for name in COUNTS}
    if unknown := {name for values in counts.values() for name in values} - set(COUNTS):
        raise ValueError(f"no such counts: {', '.join(sorted(unknown))}")
    conn.execute(
        """
        UPDATE ops.ingestion_runs r
        SET
            server_total = coalesce(n.server_total, r.server_total),
            fetched = coalesce(n.fetched, r.fetched),
            valid = coalesce(n.valid, r.valid),
            older = coalesce(n.older, r.older),
            dead = coalesce(r.dead + n.dead, n.dead, r.dead),
            withheld = coalesce(n.withheld, r.withheld),
            superseded = coalesce(n.superseded, r.superseded),
            loaded = coalesce(n.loaded, r.loaded)
        FROM unnest(
            %(keys)s::text[],
            %(server_total)s::bigint[],
            %(fetched)s::bigint[],
            %(valid)s::bigint[],
            %(older)s::bigint[],
            %(dead)s::bigint[],
            %(withheld)s::bigint[],
            %(superseded)s::bigint[],
            %(loaded)s::bigint[]
        ) AS n (partition_key, server_total, fetched, valid, older, dead, withheld, superseded, loaded)
        WHERE r.run_id = %(run)s AND r.resource_type = %(type)s AND r.partition_key = n.partition_key
        """,
        {"run": run_id, "type": resource_type, "keys": keys, **values_by_name},
    )


def add_counts(conn: Connection, run_id: str, resource_type: str, counts: Mapping[str, Mapping[str, int]]) -> None:
    """Add to the counts ``fetched``, ``valid``, ``withheld``, ``superseded``, ``loaded`` and ``dead`` of windows."""
    names = ("fetched", "valid", "withheld", "superseded", "loaded", "dead")
    keys = sorted(counts)
    conn.execute(
        """
        UPDATE ops.ingestion_runs r
        SET
            fetched = coalesce(r.fetched, 0) + n.fetched,
            valid = coalesce(r.valid, 0) + n.valid,
            withheld = coalesce(r.withheld, 0) + n.withheld,
            superseded = coalesce(r.superseded, 0) + n.superseded,
            loaded = coalesce(r.loaded, 0) + n.loaded,
            dead = coalesce(r.dead, 0) + n.dead
        FROM unnest(
            %(keys)s::text[],
            %(fetched)s::bigint[],
            %(valid)s::bigint[],
            %(withheld)s::bigint[],
            %(superseded)s::bigint[],
            %(loaded)s::bigint[],
            %(dead)s::bigint[]
        ) AS n (partition_key, fetched, valid, withheld, superseded, loaded, dead)
        WHERE r.run_id = %(run)s AND r.resource_type = %(type)s AND r.partition_key = n.partition_key
        """,
        {
            "run": run_id,
            "type": resource_type,
            "keys": keys,
            **{name: [counts[key].get(name, 0) for key in keys] for name in names},
        },
    )


def record_older(conn: Connection, run_id: str, resource_type: str, partition_key: str, older: int) -> None:
    """Add resources that belong to no window, because they are older than the first one, to the row of a window."""
    conn.execute(
        """
        UPDATE ops.ingestion_runs
        SET older = %(older)s, fetched = coalesce(fetched, 0) + %(older)s
        WHERE run_id = %(run)s AND resource_type = %(type)s AND partition_key = %(key)s
        """,
        {"older": older, "run": run_id, "type": resource_type, "key": partition_key},
    )


def reduce_loaded(conn: Connection, run_id: str, resource_type: str, partition_keys: Sequence[str]) -> None:
    """Reduce the ``loaded`` resources of a run's windows to distinct versions in the tables; others are superseded.

    Call it after all windows are loaded: a version may have been superseded by a version in another window.
    """
    conn.execute(
        """
        WITH stored AS (
            SELECT partition_key, count(*) AS versions
            FROM fhir.resource
            WHERE source = ops.current_source()
                AND resource_type = %(type)s
                AND partition_key = ANY(%(keys)s)
                AND run_id = %(run)s
                AND deleted_at IS NULL
            GROUP BY partition_key
        )
        UPDATE ops.ingestion_runs r
        SET
            superseded = r.loaded - least(r.loaded, coalesce(s.versions, 0)),
            loaded = least(r.loaded, coalesce(s.versions, 0))
        FROM ops.ingestion_runs r2
        LEFT JOIN stored s ON s.partition_key = r2.partition_key
        WHERE r2.run_id = %(run)s
            AND r2.resource_type = %(type)s
            AND r2.partition_key = ANY(%(keys)s)
            AND r2.loaded > 0
            AND (r.run_id, r.resource_type, r.partition_key) = (r2.run_id, r2.resource_type, r2.partition_key)
        """,
        {"run": run_id, "type": resource_type, "keys": list(partition_keys)},
    )


def find_counts(
    conn: Connection, run_id: str, resource_type: str, partition_keys: Sequence[str]
) -> dict[str, dict[str, int]]:
    """Return the outcome of a run for each window by partition key: the members of RESULTS by name."""
    rows = conn.execute(
        """
        SELECT partition_key, coalesce(valid, 0), coalesce(loaded, 0), coalesce(superseded, 0), coalesce(dead, 0),
            coalesce(withheld, 0)
        FROM ops.ingestion_runs
        WHERE run_id = %(run)s
            AND resource_type = %(type)s
            AND partition_key = ANY(%(keys)s)
        """,
        {"run": run_id, "type": resource_type, "keys": list(partition_keys)},
    )
    return {key: dict(zip(RESULTS, counts, strict=True)) for key, *counts in rows}


def find_loaded_windows(
    conn: Connection, run_id: str, resource_type: str, partition_keys: Sequence[str]
) -> list[str] | None:
    """Return the windows in which a run has a count of RESULTS above 0; None if it did not load the type."""
    counts = find_counts(conn, run_id, resource_type, partition_keys)
    return sorted(key for key, results in counts.items() if any(results.values())) if counts else None


def find_written_windows(conn: Connection, run_id: str, resource_type: str, layer: str) -> list[str]:
    """Return the windows of a type that a run has written to a layer, ``raw`` or ``validated``."""
    rows = conn.execute(
        """
        SELECT partition_key
        FROM ops.ingestion_runs
        WHERE run_id = %(run)s
            AND resource_type = %(type)s
            AND CASE %(layer)s WHEN 'raw' THEN server_total IS NOT NULL OR fetched > coalesce(older, 0)
                ELSE valid IS NOT NULL END
        ORDER BY partition_key
        """,
        {"run": run_id, "type": resource_type, "layer": layer},
    )
    return [key for (key,) in rows]


def finish(
    conn: Connection, run_id: str, resource_types: Sequence[str], partition_keys: Sequence[str], *, seconds: float = 0
) -> None:
    """Set the status of RUNNING rows to SUCCESS, and add ``seconds`` to their working time."""
    _end(conn, run_id, resource_types, partition_keys, "SUCCESS", None, seconds)


def fail(
    conn: Connection,
    run_id: str,
    resource_types: Sequence[str],
    partition_keys: Sequence[str],
    *,
    error: str,
    seconds: float = 0,
) -> None:
    """Set the status of RUNNING rows to FAILED, and add ``seconds`` to their working time.

    ``error`` must contain no patient data.
    """
    _end(conn, run_id, resource_types, partition_keys, "FAILED", _storable(error), seconds)


def fail_ended(
    conn: Connection, run_id: str, resource_types: Sequence[str], partition_keys: Sequence[str], *, error: str
) -> None:
    """Set the status of rows to FAILED whose step has succeeded, because its result was not recorded in Dagster."""
    conn.execute(
        """
        UPDATE ops.ingestion_runs
        SET status = 'FAILED', error = %s, finished_at = clock_timestamp()
        WHERE run_id = %s AND resource_type = ANY(%s) AND partition_key = ANY(%s) AND status IN ('RUNNING', 'SUCCESS')
        """,
        [_storable(error), run_id, list(resource_types), list(partition_keys)],
    )


def _end(
    conn: Connection,
    run_id: str,
    types: Sequence[str],
    keys: Sequence[str],
    status: str,
    error: str | None,
    seconds: float,
) -> None:
    conn.execute(
        """
        UPDATE ops.ingestion_runs r
        SET
            status = %s,
            error = %s,
            finished_at = clock_timestamp(),
            seconds = seconds + %s,
            checkpoint_after = (
                SELECT loaded_until
                FROM ops.checkpoints c
                WHERE (c.source, c.resource_type) = (r.source, r.resource_type)
            )
        WHERE run_id = %s AND resource_type = ANY(%s) AND partition_key = ANY(%s) AND status = 'RUNNING'
        """,
        [status, error, seconds, run_id, list(types), list(keys)],
    )


def abandon(conn: Connection, run_id: str, *, error: str) -> int:
    """Set the status of a dead run's RUNNING rows to FAILED, and return their number."""
    return conn.execute(
        """
        UPDATE ops.ingestion_runs
        SET status = 'FAILED', finished_at = clock_timestamp(), error = %s
        WHERE run_id = %s AND status = 'RUNNING'
        """,
        [_storable(error), run_id],
    ).rowcount


def abandon_dead(conn: Connection) -> int:
    """Set the status of RUNNING rows of all dead runs to FAILED, and return their number."""
    return sum(abandon(conn, run_id, error=liveness.DEAD) for run_id in liveness.find_dead(conn))


def find_by_prefix(conn: Connection, prefix: str) -> list[str]:
    """Return the ids of at most two runs that begin with ``prefix``.

    Runs that received files of the landing zone are found, too, if no run that loads resources is. They have no row in
    ``ops.ingestion_runs``, and their dead letters are the parts of the files that could not be read.
    """
    rows = (
        conn.execute(
            "SELECT DISTINCT run_id FROM ops.ingestion_runs WHERE starts_with(run_id, %s) LIMIT 2", [prefix]
        ).fetchall()
        or conn.execute(
            """
        SELECT run_id
        FROM ops.landing_files
        WHERE source = ops.current_source() AND starts_with(run_id, %(prefix)s)
        UNION
        SELECT run_id
        FROM ops.dead_letters
        WHERE source = ops.current_source() AND run_id = %(prefix)s
        LIMIT 2
        """,
            {"prefix": prefix},
        ).fetchall()
    )
    return [run_id for (run_id,) in rows]


def find_types(conn: Connection) -> list[str]:
    """Return the resource types that runs have loaded from the source."""
    rows = conn.execute(
        """
        SELECT DISTINCT resource_type
        FROM ops.ingestion_runs
        WHERE source = ops.current_source()
        ORDER BY 1
        """
    )
    return [resource_type for (resource_type,) in rows]


def find_failure(conn: Connection, run_id: str, resource_type: str) -> str | None:
    """Return the reason for which a finished step of a run failed for one resource type; None if none did."""
    row = conn.execute(
        """
        SELECT error
        FROM ops.ingestion_runs
        WHERE run_id = %s AND resource_type = %s AND status = 'FAILED' AND error IS NOT NULL
        LIMIT 1
        """,
        [run_id, resource_type],
    ).fetchone()
    return row[0] if row else None


def get_errors(conn: Connection, run_id: str) -> dict[str, list[str]]:
    """Return the resource types of a run that failed, in load order, by error."""
    rows = conn.execute(
        """
        SELECT DISTINCT coalesce(error, 'no reason was recorded'), resource_type
        FROM ops.ingestion_runs
        WHERE run_id = %s AND status = 'FAILED'
        """,
        [run_id],
    ).fetchall()
    errors: dict[str, list[str]] = {}
    for error, resource_type in sorted(rows, key=lambda row: _order(row[1])):
        errors.setdefault(error, []).append(resource_type)
    return errors


_SUM_BY_TYPE = sql.SQL("""
    SELECT
        resource_type AS type,
        sum(fetched)::bigint AS fetched,
        sum(older)::bigint AS older,
        sum(valid)::bigint AS valid,
        sum(dead)::bigint AS dead,
        sum(withheld)::bigint AS withheld,
        sum(superseded)::bigint AS superseded,
        sum(loaded)::bigint AS loaded,
        sum(seconds) AS seconds
    FROM ({runs}) AS r
    GROUP BY 1
""")
_GIVEN_RUNS = sql.SQL("SELECT * FROM ops.run_types WHERE run_id = ANY(%s)")


def summarize(conn: Connection, run_ids: Sequence[str]) -> list[dict[str, object]]:
    """Return the sums of the runs' counts and working time by resource type, in load order.

    The keys are ``type``, the counts, ``seconds`` and ``resources_per_second`` (loaded resources). The last row has the
    type ``total`` and holds the sums of the other rows. Types whose counts are all 0 or null are left out.
    """
    cursor = conn.cursor(row_factory=dict_row).execute(_SUM_BY_TYPE.format(runs=_GIVEN_RUNS), [list(run_ids)])
    rows = _add_total(cursor.fetchall())
    for row in rows:
        seconds = row["seconds"]
        row["resources_per_second"] = round(row["loaded"] / seconds) if row["loaded"] and seconds else None
    return rows


def _add_total(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = [row for row in rows if any(row[name] for name in _SUMMED)]
    if not rows:
        return []
    rows.sort(key=lambda row: _order(row["type"]))
    total: dict[str, Any] = {"type": "total"}
    for name in (*_SUMMED, "seconds"):
        values = [row[name] for row in rows if row[name] is not None]
        total[name] = sum(values) if values else None
    return [*rows, total]


def _order(resource_type: str) -> tuple[int, str]:
    return LOAD_ORDER.get(resource_type, len(LOAD_ORDER)), resource_type


def _storable(text: str) -> str:
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}")
