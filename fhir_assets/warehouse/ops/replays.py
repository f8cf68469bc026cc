"""Requests, claims and outcomes of replays of dead letters.

This module changes the status of rows in ``ops.dead_letters``. The module ``dead_letters`` records and lists the rows,
and ``corrections`` holds the resources that replace the originals in a replay.

An open dead letter is first *requested* (status ``replaying``) and then *claimed* by a run. Afterwards it is either
resolved, when its resource is in the tables, or open again with one more attempt. A claim is valid as long as the
process of its run is alive. When the process has ended, another run can claim the dead letter. A request is removed
only when its replay has ended, so that the sensor finds interrupted replays.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import datetime

from psycopg import sql
from psycopg.types.json import Jsonb

from fhir_assets.warehouse.ops import corrections, dead_letters, liveness
from fhir_assets.warehouse.ops.dead_letter_resolution import SUPERSEDED
from fhir_assets.warehouse.ops.dead_letters import Selection
from fhir_assets.warehouse.postgres import version_order
from fhir_assets.warehouse.postgres.db.connections import Connection, Session

REPLAYABLE_STAGES = ("validate", "transform", "load")
"""The stages whose dead letters are replayed from their stored bytes.

Dead letters of stage ``fetch`` are resolved when their window is fetched again, or when they are corrected.
"""

_ROWS_PER_BATCH = 500


@dataclass(frozen=True, slots=True)
class ReplayRequest:
    """The number of dead letters of one type and window to replay, and the time of the newest request."""

    resource_type: str
    partition_key: str
    dead_letters: int
    requested_at: datetime


@dataclass(frozen=True, slots=True)
class ClaimedDeadLetter:
    """A dead letter that a run replays. ``body`` is the correction if there is one, else the resource as received.

    ``arrived`` and ``dated`` are those of the resource as received, for the order of its versions.
    """

    id: int
    partition_key: str
    rule: str
    occurrences: int
    body: bytes
    arrived: datetime | None = None
    dated: bool = True


@dataclass(frozen=True, slots=True)
class FailedReplay:
    """A replayed dead letter that failed again, with the new reason."""

    id: int
    rule: str
    path: str
    message: str
    issues: Sequence[Mapping[str, str]]
    ruleset: str


@dataclass(frozen=True, slots=True)
class ReplayOutcome:
    """How many dead letters a set of runs resolved, and how many failed again in these runs."""

    resolved: int
    failed: int


def find_replayable(conn: Connection, selection: Selection) -> list[ReplayRequest]:
    """Return the replayable dead letters of a selection, grouped by type and window and ordered by window.

    Dead letters claimed by a run whose process has ended are included: the next run over their windows claims them.
    """
    where, params = _build_replayable_condition(selection, _find_ended_claimers(conn))
    query = sql.SQL("""
        SELECT resource_type, partition_key, count(*), now()
        FROM ops.dead_letters
        WHERE {}
        GROUP BY 1, 2
        ORDER BY 2, 1
    """).format(where)
    return [ReplayRequest(*row) for row in conn.execute(query, params)]


def request_replay(
    conn: Connection,
    selection: Selection,
    *,
    claimed_by: str | None = None,
    within: Sequence[ReplayRequest] | None = None,
) -> int:
    """Request the replay of the replayable dead letters of a selection and return their number.

    The sensor starts a run for them, unless ``claimed_by`` is the id of the run that replays them. ``within`` restricts
    them to the types and windows of these requests.
    """
    where, params = _build_replayable_condition(selection)
    query = sql.SQL("""
        UPDATE ops.dead_letters
        SET status = 'replaying', replay_requested_at = now(), claimed_by = %(claimed_by)s
        WHERE {}
            AND (
                %(within_types)s::text[] IS NULL
                OR (resource_type, partition_key) IN (
                    SELECT * FROM unnest(%(within_types)s::text[], %(within_keys)s::text[])
                )
            )
    """).format(where)
    scope = {
        "within_types": None if within is None else [request.resource_type for request in within],
        "within_keys": None if within is None else [request.partition_key for request in within],
    }
    return conn.execute(query, {**params, **scope, "claimed_by": claimed_by}).rowcount


def find_requested(conn: Connection) -> list[ReplayRequest]:
    """Return the requested replays that no live run has claimed, ordered by window and type."""
    rows = conn.execute(
        """
        SELECT resource_type, partition_key, count(*), max(replay_requested_at)
        FROM ops.dead_letters
        WHERE source = ops.current_source()
            AND status = 'replaying'
            AND (claimed_by IS NULL OR claimed_by = ANY(%s))
        GROUP BY 1, 2
        ORDER BY 2, 1
        """,
        [_find_ended_claimers(conn)],
    )
    return [ReplayRequest(*row) for row in rows]


def cancel_requests(conn: Connection, resource_types: Sequence[str], partition_keys: Sequence[str]) -> int:
    """Reopen the dead letters of these types and windows that no live run has claimed, and return their number."""
    return conn.execute(
        """
        UPDATE ops.dead_letters
        SET status = 'open', replay_requested_at = NULL, claimed_by = NULL
        WHERE source = ops.current_source()
            AND status = 'replaying'
            AND (claimed_by IS NULL OR claimed_by = ANY(%s))
            AND resource_type = ANY(%s)
            AND partition_key = ANY(%s)
        """,
        [_find_ended_claimers(conn), list(resource_types), list(partition_keys)],
    ).rowcount


def release_claims(conn: Connection, run_id: str) -> int:
    """Reopen the dead letters that a run claimed and did not replay, and return their number."""
    return conn.execute(
        """
        UPDATE ops.dead_letters
        SET status = 'open', replay_requested_at = NULL, claimed_by = NULL
        WHERE status = 'replaying' AND claimed_by = %s
        """,
        [run_id],
    ).rowcount


def claim(
    conn: Connection,
    run_id: str,
    resource_type: str,
    stages: Sequence[str],
    committed_runs: Mapping[str, Sequence[str]],
    *,
    also_open: bool,
) -> bool:
    """Claim requested dead letters that no live run has claimed. Return True if the run now has claims.

    ``committed_runs`` maps the key of each partition to the runs whose replayed resources are already in the validated
    partition. The claims of these runs are kept, because their resources need not be validated again. With
    ``also_open``, open dead letters are claimed as well.
    """
    ended_claimers = _find_ended_claimers(conn)
    for key in sorted(committed_runs):
        conn.execute(
            """
            UPDATE ops.dead_letters
            SET
                status = 'replaying',
                claimed_by = %(run)s,
                replay_requested_at = coalesce(replay_requested_at, now())
            WHERE source = ops.current_source()
                AND resource_type = %(type)s
                AND stage = ANY(%(stages)s)
                AND partition_key = %(key)s
                AND (
                    (status = 'replaying' AND (claimed_by IS NULL OR claimed_by = ANY(%(free)s)))
                    OR (%(open)s AND status = 'open')
                )
            """,
            {
                "run": run_id,
                "type": resource_type,
                "stages": list(stages),
                "key": key,
                "free": [claimer for claimer in ended_claimers if claimer not in committed_runs[key]],
                "open": also_open,
            },
        )
    row = conn.execute(
        """
        SELECT EXISTS (
            SELECT FROM ops.dead_letters
            WHERE resource_type = %s AND stage = ANY(%s) AND partition_key = ANY(%s)
                AND status = 'replaying' AND claimed_by = %s
        )
        """,
        [resource_type, list(stages), list(committed_runs), run_id],
    ).fetchone()
    return bool(row and row[0])


def stream_claimed(
    conn: Session, run_id: str, resource_type: str, stages: Sequence[str], partition_keys: Sequence[str]
) -> Iterator[list[ClaimedDeadLetter]]:
    """Yield the dead letters that a run has claimed in some partitions, in batches, ordered by partition.

    The rows are streamed: ``conn`` is in a transaction until the iterator is exhausted or closed. Raises
    EncryptionError if a resource cannot be decrypted.
    """
    with closing(conn.cursor(name="claimed")) as cursor:
        cursor.execute(
            """
            SELECT
                d.id, d.partition_key, d.rule, d.occurrences, fingerprint, c.resource, d.resource, d.arrived, d.dated
            FROM ops.dead_letters d
            LEFT JOIN ops.corrections c USING (fingerprint, source)
            WHERE source = ops.current_source()
                AND d.resource_type = %s
                AND d.stage = ANY(%s)
                AND d.partition_key = ANY(%s)
                AND d.status = 'replaying'
                AND d.claimed_by = %s
            ORDER BY d.partition_key, d.id
            """,
            [resource_type, list(stages), list(partition_keys), run_id],
        )
        while rows := cursor.fetchmany(_ROWS_PER_BATCH):
            yield [
                ClaimedDeadLetter(identity, key, rule, occurrences, _read_newest(conn, *contents), arrived, dated)
                for identity, key, rule, occurrences, *contents, arrived, dated in rows
            ]


def _read_newest(conn: Session, fingerprint: bytes, corrected: bytes | None, original: bytes | None) -> bytes:
    """Return the correction of a dead letter, or its resource without one."""
    if corrected is not None:
        return corrections.decrypt_content(conn, conn.source, fingerprint, corrected)
    return dead_letters.decrypt_content(conn, conn.source, fingerprint, original) or b""


def record_failures(conn: Connection, run_id: str, failures: Sequence[FailedReplay]) -> None:
    """Reopen dead letters that failed again, with the new reason and one more attempt.

    Those that a person discarded in the meantime stay discarded.
    """
    if not failures:
        return
    with conn.cursor() as cursor:
        cursor.execute(
            """
            CREATE TEMPORARY TABLE IF NOT EXISTS failed_again (
                id bigint, rule text, path text, message text, issues jsonb, ruleset text
            ) ON COMMIT DROP
            """
        )
        with cursor.copy("COPY pg_temp.failed_again FROM STDIN") as copy:
            for failure in failures:
                issues = Jsonb([dict(issue) for issue in failure.issues])
                copy.write_row((failure.id, failure.rule, failure.path, failure.message, issues, failure.ruleset))
        cursor.execute(
            """
            UPDATE ops.dead_letters d
            SET
                status = 'open',
                replay_requested_at = NULL,
                claimed_by = NULL,
                run_id = %s,
                rule = f.rule,
                path = f.path,
                message = f.message,
                issues = f.issues,
                ruleset = f.ruleset,
                attempts = attempts + 1,
                last_failure = now(),
                resolved_at = NULL,
                resolved_run_id = NULL,
                resolution = NULL,
                recorded = nextval('ops.dead_letter_records')
            FROM pg_temp.failed_again f
            WHERE d.id = f.id AND d.status <> 'discarded'
            """,
            [run_id],
        )
        cursor.execute("TRUNCATE pg_temp.failed_again")


_RESOLVE = sql.SQL("""
    UPDATE ops.dead_letters d
    SET
        status = 'resolved',
        resolved_at = now(),
        resolved_run_id = %(run)s,
        replay_requested_at = NULL,
        claimed_by = NULL,
        resolution = CASE
            WHEN EXISTS (
                SELECT FROM ops.corrections c WHERE (c.source, c.fingerprint) = (d.source, d.fingerprint)
            ) THEN 'corrected'
            ELSE 'replayed'
        END
    WHERE {}
""")


def resolve_claimed(
    conn: Connection, run_id: str, resource_type: str, stages: Sequence[str], runs_by_key: Mapping[str, Sequence[str]]
) -> int:
    """Resolve the dead letters that the runs in ``runs_by_key`` have claimed in each partition. Return their number.

    Callers load the resources of these dead letters into the tables first.
    """
    statement = _RESOLVE.format(
        sql.SQL("""
            resource_type = %(type)s
            AND stage = ANY(%(stages)s)
            AND partition_key = %(key)s
            AND status = 'replaying'
            AND claimed_by = ANY(%(runs)s)
        """)
    )
    params = {"run": run_id, "type": resource_type, "stages": list(stages)}
    return sum(
        conn.execute(statement, {**params, "key": key, "runs": list(runs_by_key[key])}).rowcount
        for key in sorted(runs_by_key)
    )


def resolve_by_ids(conn: Connection, run_id: str, ids: Sequence[int]) -> None:
    """Resolve dead letters that the run has claimed. Callers load their resources into the tables first."""
    conn.execute(
        _RESOLVE.format(sql.SQL("id = ANY(%(ids)s) AND claimed_by = %(run)s")), {"run": run_id, "ids": list(ids)}
    )


_WITHHELD = sql.SQL("(SELECT *, NULL::timestamptz AS deleted_at FROM ops.withheld)")


def resolve_superseded(conn: Connection, run_id: str, resource_type: str, partition_keys: Sequence[str]) -> set[str]:
    """Resolve dead letters whose resource has a newer version in the tables or among the withheld resources.

    Return their partition keys. A dead letter is considered if its own partition, or the partition of the newer
    version, is in ``partition_keys``. Input that was rejected on arrival and has no ``lastUpdated`` is not: a row of a
    visit file has no newer version, because visits cannot be changed.
    """
    row = conn.execute(
        """
        SELECT EXISTS (
            SELECT FROM ops.dead_letters
            WHERE source = ops.current_source()
                AND resource_type = %s
                AND status IN ('open', 'replaying')
                AND resource_id IS NOT NULL
        )
        """,
        [resource_type],
    ).fetchone()
    if not (row and row[0]):
        return set()
    statement = sql.SQL("""
        UPDATE ops.dead_letters d
        SET
            status = 'resolved',
            resolved_at = now(),
            resolved_run_id = %(run)s,
            resolution = %(superseded)s,
            replay_requested_at = NULL,
            claimed_by = NULL
        FROM {relation} r
        WHERE d.source = ops.current_source()
            AND d.resource_type = %(type)s
            AND d.status IN ('open', 'replaying')
            AND d.stage = ANY(%(stages)s)
            AND (d.stage <> 'fetch' OR d.last_updated IS NOT NULL)
            AND r.source = d.source
            AND r.resource_type = %(type)s
            AND r.id = d.resource_id
            AND {is_newer}
            AND {partition_key} = ANY(%(keys)s)
        RETURNING d.partition_key
    """)
    params = {
        "run": run_id,
        "type": resource_type,
        "keys": list(partition_keys),
        "stages": ["fetch", *REPLAYABLE_STAGES],
        "superseded": SUPERSEDED,
    }
    is_newer = version_order.is_newer_than_failed("r", "d")
    return {
        key
        for relation in (sql.Identifier("fhir", "resource"), _WITHHELD)
        for column in (sql.SQL("r.partition_key"), sql.SQL("d.partition_key"))
        for (key,) in conn.execute(
            statement.format(relation=relation, partition_key=column, is_newer=is_newer), params
        ).fetchall()
    }


def resolve_received(conn: Connection, ids: Sequence[int], *, resolution: str) -> None:
    """Resolve dead letters of stage ``fetch`` that were received: ``corrected`` by a person, or ``replayed``.

    Corrected ones stay resolved when their window is fetched again. A discarded one is resolved by a correction only.
    """
    conn.execute(
        """
        UPDATE ops.dead_letters
        SET status = 'resolved', resolution = %(resolution)s, resolved_at = now()
        WHERE id = ANY(%(ids)s)
            AND (
                status IN ('open', 'replaying')
                OR status = 'discarded' AND %(resolution)s::text = 'corrected'
            )
        """,
        {"resolution": resolution, "ids": list(ids)},
    )


def discard(conn: Connection, selection: Selection, *, reason: str, by: str) -> int:
    """Discard the open dead letters of a selection and return their number. They stay discarded if they fail again."""
    where, params = replace(selection, status=None).where()
    query = sql.SQL("""
        UPDATE ops.dead_letters
        SET
            status = 'discarded',
            resolution = %(resolution)s,
            resolved_at = now(),
            resolved_run_id = NULL,
            replay_requested_at = NULL,
            claimed_by = NULL
        WHERE {} AND status = 'open'
    """).format(where)
    return conn.execute(query, {**params, "resolution": f"discarded by {by}: {reason}"}).rowcount


def count_outcome(conn: Connection, run_ids: Sequence[str]) -> ReplayOutcome:
    """Count the dead letters that some runs resolved, and those that failed again in these runs."""
    row = conn.execute(
        """
        SELECT
            count(*) FILTER (WHERE d.status = 'resolved' AND d.resolved_run_id = r.run_id),
            count(*) FILTER (WHERE d.status = 'open' AND d.run_id = r.run_id)
        FROM ops.ingestion_runs r
        JOIN ops.dead_letters d USING (resource_type, partition_key, source)
        WHERE r.run_id = ANY(%s) AND d.stage = ANY(%s)
        """,
        [list(run_ids), list(REPLAYABLE_STAGES)],
    ).fetchone()
    return ReplayOutcome(*(row or (0, 0)))


def find_outdated(conn: Connection, rulesets: Sequence[tuple[str, str, str]], *, limit: int) -> list[int]:
    """Return the ids of at most ``limit`` open dead letters whose ruleset is not the current one.

    ``rulesets`` are tuples of resource type, stage and current ruleset.
    """
    types, stages, current = zip(*rulesets, strict=True) if rulesets else ((), (), ())
    # Two ranges of the index on ruleset ("<" and ">"). For "<>" the planner would read every open dead letter.
    one_side = sql.SQL("""
        (
            SELECT id
            FROM ops.dead_letters d
            WHERE d.status = 'open'
                AND d.stage = r.stage
                AND d.resource_type = r.resource_type
                AND d.ruleset {} r.current
            LIMIT %(limit)s
        )
    """)
    query = sql.SQL("""
        SELECT outdated.id
        FROM unnest(%(types)s::text[], %(stages)s::text[], %(current)s::text[]) AS r (resource_type, stage, current),
            LATERAL ({less} UNION ALL {greater}) outdated
        LIMIT %(limit)s
    """).format(less=one_side.format(sql.SQL("<")), greater=one_side.format(sql.SQL(">")))
    rows = conn.execute(query, {"types": list(types), "stages": list(stages), "current": list(current), "limit": limit})
    return [identity for (identity,) in rows]


def record_origin(conn: Connection, run_id: str, resource_type: str, partition_keys: Sequence[str]) -> None:
    """Record in ``ops.ingestion_runs``, for each window of a replay, the last run in which its dead letters failed."""
    conn.execute(
        """
        UPDATE ops.ingestion_runs r
        SET replay_of_run_id = failed.run_id
        FROM (
            SELECT partition_key, max(run_id) AS run_id
            FROM ops.dead_letters
            WHERE resource_type = %(type)s
                AND partition_key = ANY(%(keys)s)
                AND stage = ANY(%(stages)s)
                AND status = 'replaying'
                AND claimed_by = %(run)s
                AND run_id <> %(run)s
            GROUP BY 1
        ) failed
        WHERE r.run_id = %(run)s
            AND r.resource_type = %(type)s
            AND r.partition_key = failed.partition_key
            AND r.replay_of_run_id IS NULL
        """,
        {"run": run_id, "type": resource_type, "keys": list(partition_keys), "stages": list(REPLAYABLE_STAGES)},
    )


def _build_replayable_condition(
    selection: Selection, ended_claimers: Sequence[str] = ()
) -> tuple[sql.Composed, dict[str, object]]:
    """Return the SQL condition for the replayable dead letters of a selection, and its parameters.

    A dead letter is replayable if it is open, if it is discarded and selected by id, or if one of ``ended_claimers``
    has claimed it.
    """
    statuses = ["open", "discarded"] if selection.ids is not None else ["open"]
    where, params = replace(selection, status=None).where()
    condition = sql.SQL("""
        {}
        AND stage = ANY(%(replayed)s)
        AND (status = ANY(%(statuses)s) OR status = 'replaying' AND claimed_by = ANY(%(ended_claimers)s))
    """).format(where)
    return condition, {
        **params,
        "statuses": statuses,
        "replayed": list(REPLAYABLE_STAGES),
        "ended_claimers": list(ended_claimers),
    }


def _find_ended_claimers(conn: Connection) -> list[str]:
    """Return the ids of the runs that have claimed dead letters and whose processes have ended."""
    rows = conn.execute(
        "SELECT DISTINCT claimed_by FROM ops.dead_letters WHERE status = 'replaying' AND claimed_by IS NOT NULL"
    ).fetchall()
    claimers = [claimer for (claimer,) in rows]
    return sorted(set(claimers) - liveness.find_alive(conn, claimers))
