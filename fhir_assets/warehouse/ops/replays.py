"""Replays of dead letters: asked for, claimed by one run at a time, and ended.

An open letter is *marked* (status ``replaying``), *claimed* by a run, and then either open again with one attempt more,
or resolved once its resource is in the tables. A run holds its letters as long as its process lives; those of a dead
run are free to be claimed again. So the marks are the sensor's cursor: they go when a replay has ended, not before.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from psycopg import sql
from psycopg.types.json import Jsonb

from fhir_assets.warehouse.ops import runs
from fhir_assets.warehouse.ops.dead_letters import Selection
from fhir_assets.warehouse.postgres.db.connections import Connection, Session, cipher_of

REPLAYED = ("validate", "transform", "load")
"""The stages whose letters are judged again from their bytes. Those of ``fetch`` come anew with their window, or when
they are corrected.
"""

_STREAMED = 500


@dataclass(frozen=True, slots=True)
class ReplayRequest:
    """Letters of one type and window that wait for a replay; ``asked_at`` is the newest mark."""

    resource_type: str
    partition_key: str
    dead_letters: int
    requested_at: datetime


@dataclass(frozen=True, slots=True)
class ClaimedDeadLetter:
    """A letter that a run replays: ``body`` is the correction where there is one, else the resource as received."""

    id: int
    partition_key: str
    rule: str
    occurrences: int
    body: bytes


@dataclass(frozen=True, slots=True)
class FailedReplay:
    """Why a letter failed again."""

    id: int
    rule: str
    path: str
    message: str
    issues: Sequence[Mapping[str, str]]
    ruleset: str


def _replayable(selection: Selection, left_by: Sequence[str] = ()) -> tuple[sql.Composed, dict[str, object]]:
    """Letters that can be marked: open ones, by id those discarded too, and what ``left_by``, runs that died, held."""
    statuses = ["open", "discarded"] if selection.ids is not None else ["open"]
    where, params = replace(selection, status=None).where()
    condition = sql.SQL(
        "{} AND stage = ANY(%(replayed)s)"
        " AND (status = ANY(%(statuses)s) OR status = 'replaying' AND claimed_by = ANY(%(left_by)s))"
    ).format(where)
    return condition, {**params, "statuses": statuses, "replayed": list(REPLAYED), "left_by": list(left_by)}


def find_replayable(conn: Connection, selection: Selection) -> list[ReplayRequest]:
    """The types and windows of the letters of a selection that can be replayed; those that a run held when it died
    are among them, and the next run over their windows takes them.
    """
    where, params = _replayable(selection, _dead_claimers(conn))
    rows = conn.execute(
        sql.SQL(
            "SELECT resource_type, partition_key, count(*), now() FROM ops.dead_letters WHERE {}"
            " GROUP BY 1, 2 ORDER BY 2, 1"
        ).format(where),
        params,
    )
    return [ReplayRequest(*row) for row in rows]


def request_replay(conn: Connection, selection: Selection, *, claimed_by: str | None = None) -> int:
    """Ask for the replay of a selection; the sensor sees to it, unless ``claimed_by`` names the run that does."""
    where, params = _replayable(selection)
    return conn.execute(
        sql.SQL(
            "UPDATE ops.dead_letters SET status = 'replaying', replay_requested_at = now(),"
            " claimed_by = %(claimed_by)s WHERE {}"
        ).format(where),
        {**params, "claimed_by": claimed_by},
    ).rowcount


def find_requested(conn: Connection) -> list[ReplayRequest]:
    """What waits for a replay that no living run does, by window and type."""
    rows = conn.execute(
        "SELECT resource_type, partition_key, count(*), max(replay_requested_at) FROM ops.dead_letters"
        " WHERE status = 'replaying' AND (claimed_by IS NULL OR claimed_by = ANY(%s)) GROUP BY 1, 2 ORDER BY 2, 1",
        [_dead_claimers(conn)],
    )
    return [ReplayRequest(*row) for row in rows]


def cancel_requests(conn: Connection, resource_types: Sequence[str], partition_keys: Sequence[str]) -> int:
    """Give up replays that no living run does: their letters are open again."""
    return conn.execute(
        "UPDATE ops.dead_letters SET status = 'open', replay_requested_at = NULL, claimed_by = NULL"
        " WHERE status = 'replaying' AND (claimed_by IS NULL OR claimed_by = ANY(%s))"
        " AND resource_type = ANY(%s) AND partition_key = ANY(%s)",
        [_dead_claimers(conn), list(resource_types), list(partition_keys)],
    ).rowcount


def release_claims(conn: Connection, run_id: str) -> int:
    """What a run claimed and did not come to is open again."""
    return conn.execute(
        "UPDATE ops.dead_letters SET status = 'open', replay_requested_at = NULL, claimed_by = NULL"
        " WHERE status = 'replaying' AND claimed_by = %s",
        [run_id],
    ).rowcount


def claim(
    conn: Connection,
    run_id: str,
    resource_type: str,
    stages: Sequence[str],
    healed_by: Mapping[str, Sequence[str]],
    *,
    also_open: bool,
) -> bool:
    """Take the marked letters of some partitions that no living run has, and with ``also_open`` the open ones.

    ``healed_by`` names, by partition key, the runs whose healed letters are in the validated partition already: what
    they hold is not judged again. Returns whether the run has any letters there now.
    """
    dead = _dead_claimers(conn)
    for key in sorted(healed_by):
        free = [claimer for claimer in dead if claimer not in healed_by[key]]
        conn.execute(
            "UPDATE ops.dead_letters SET status = 'replaying', claimed_by = %(run)s,"
            " replay_requested_at = coalesce(replay_requested_at, now())"
            " WHERE resource_type = %(type)s AND stage = ANY(%(stages)s) AND partition_key = %(key)s AND"
            " ((status = 'replaying' AND (claimed_by IS NULL OR claimed_by = ANY(%(free)s)))"
            "  OR (%(open)s AND status = 'open'))",
            {
                "run": run_id,
                "type": resource_type,
                "stages": list(stages),
                "key": key,
                "free": free,
                "open": also_open,
            },
        )
    found = conn.execute(
        "SELECT EXISTS (SELECT FROM ops.dead_letters WHERE resource_type = %s AND stage = ANY(%s)"
        " AND partition_key = ANY(%s) AND status = 'replaying' AND claimed_by = %s)",
        [resource_type, list(stages), list(healed_by), run_id],
    ).fetchone()
    return bool(found and found[0])


def stream_claimed(
    conn: Session, run_id: str, resource_type: str, stages: Sequence[str], partition_keys: Sequence[str]
) -> Iterator[list[ClaimedDeadLetter]]:
    """The letters that a run has claimed in some partitions, by partition, streamed on ``conn``, which is in a
    transaction meanwhile. Raises SealingError.
    """
    cipher = cipher_of(conn)
    with closing(conn.cursor(name="claimed")) as cursor:
        cursor.execute(
            "SELECT d.id, d.partition_key, d.rule, d.occurrences, coalesce(c.resource, d.resource)"
            " FROM ops.dead_letters d LEFT JOIN ops.corrections c USING (fingerprint)"
            " WHERE d.resource_type = %s AND d.stage = ANY(%s) AND d.partition_key = ANY(%s)"
            " AND d.status = 'replaying' AND d.claimed_by = %s ORDER BY d.partition_key, d.id",
            [resource_type, list(stages), list(partition_keys), run_id],
        )
        while rows := cursor.fetchmany(_STREAMED):
            yield [
                ClaimedDeadLetter(identity, key, rule, occurrences, cipher.decrypt_and_decompress(bytes(body or b"")))
                for identity, key, rule, occurrences, body in rows
            ]


def record_failures(conn: Connection, run_id: str, letters: Sequence[FailedReplay]) -> None:
    """These failed again: open, with one attempt more."""
    if not letters:
        return
    with conn.cursor() as cursor:
        cursor.execute(
            "CREATE TEMPORARY TABLE IF NOT EXISTS failed_again"
            " (id bigint, rule text, path text, message text, issues jsonb, ruleset text) ON COMMIT DROP"
        )
        with cursor.copy("COPY pg_temp.failed_again FROM STDIN") as copy:
            for each in letters:
                issues = Jsonb([dict(issue) for issue in each.issues])
                copy.write_row((each.id, each.rule, each.path, each.message, issues, each.ruleset))
        cursor.execute(
            "UPDATE ops.dead_letters d SET status = 'open', replay_requested_at = NULL, claimed_by = NULL, run_id = %s,"
            " rule = f.rule, path = f.path, message = f.message, issues = f.issues, ruleset = f.ruleset,"
            " attempts = attempts + 1, last_failure = now() FROM pg_temp.failed_again f WHERE d.id = f.id",
            [run_id],
        )
        cursor.execute("TRUNCATE pg_temp.failed_again")


def resolve_claimed(
    conn: Connection, run_id: str, resource_type: str, stages: Sequence[str], runs_by_key: Mapping[str, Sequence[str]]
) -> int:
    """What these runs still hold in these partitions is in the tables now: resolved. Returns how many letters."""
    total = 0
    for key in sorted(runs_by_key):
        total += conn.execute(
            "UPDATE ops.dead_letters d SET status = 'resolved', resolved_at = now(), resolved_run_id = %(run)s,"
            " replay_requested_at = NULL, claimed_by = NULL, resolution ="
            " CASE WHEN EXISTS (SELECT FROM ops.corrections c WHERE c.fingerprint = d.fingerprint)"
            " THEN 'corrected' ELSE 'replayed' END"
            " WHERE resource_type = %(type)s AND stage = ANY(%(stages)s) AND partition_key = %(key)s"
            " AND status = 'replaying' AND claimed_by = ANY(%(runs)s)",
            {
                "run": run_id,
                "type": resource_type,
                "stages": list(stages),
                "key": key,
                "runs": list(runs_by_key[key]),
            },
        ).rowcount
    return total


def resolve_superseded(conn: Connection, run_id: str, resource_type: str, partition_keys: Sequence[str]) -> set[str]:
    """Letters whose resource the tables have in a newer version are resolved: those of these windows, and those of
    whatever window whose newer version came with these. Returns the windows of the letters.
    """
    there = conn.execute(
        "SELECT EXISTS (SELECT FROM ops.dead_letters WHERE resource_type = %s AND status IN ('open', 'replaying')"
        " AND resource_id IS NOT NULL)",
        [resource_type],
    ).fetchone()
    if not (there and there[0]):
        return set()
    statement = sql.SQL(
        "UPDATE ops.dead_letters d SET status = 'resolved', resolved_at = now(), resolved_run_id = %(run)s,"
        " resolution = 'superseded by a newer version', replay_requested_at = NULL, claimed_by = NULL"
        " FROM fhir.resource r WHERE d.resource_type = %(type)s AND d.status IN ('open', 'replaying')"
        " AND d.stage = ANY(%(stages)s) AND r.resource_type = %(type)s AND r.id = d.resource_id"
        " AND r.as_of > d.last_updated AND {} = ANY(%(keys)s) RETURNING d.partition_key"
    )
    params = {"run": run_id, "type": resource_type, "keys": list(partition_keys), "stages": ["fetch", *REPLAYED]}
    return {
        key
        for column in (sql.SQL("r.partition_key"), sql.SQL("d.partition_key"))
        for (key,) in conn.execute(statement.format(column), params).fetchall()
    }


def resolve_by_ids(conn: Connection, run_id: str, ids: Sequence[int]) -> None:
    """These letters of the run are in the tables now: resolved."""
    conn.execute(
        "UPDATE ops.dead_letters d SET status = 'resolved', resolved_at = now(), resolved_run_id = %(run)s,"
        " replay_requested_at = NULL, claimed_by = NULL, resolution ="
        " CASE WHEN EXISTS (SELECT FROM ops.corrections c WHERE c.fingerprint = d.fingerprint)"
        " THEN 'corrected' ELSE 'replayed' END WHERE id = ANY(%(ids)s) AND claimed_by = %(run)s",
        {"run": run_id, "ids": list(ids)},
    )


def resolve_corrected(conn: Connection, letter_id: int) -> None:
    """A letter of stage ``fetch`` whose correction was received: resolved, also when its window is read again."""
    conn.execute(
        "UPDATE ops.dead_letters SET status = 'resolved', resolution = 'corrected', resolved_at = now() WHERE id = %s",
        [letter_id],
    )


@dataclass(frozen=True, slots=True)
class ReplayOutcome:
    """What came of the letters that some runs replayed."""

    resolved: int
    failed: int


def count_outcome(conn: Connection, run_ids: Sequence[str]) -> ReplayOutcome:
    """What came of the letters in the windows of some runs."""
    row = conn.execute(
        "SELECT count(*) FILTER (WHERE d.status = 'resolved' AND d.resolved_run_id = r.run_id),"
        " count(*) FILTER (WHERE d.status = 'open' AND d.run_id = r.run_id)"
        " FROM ops.ingestion_runs r JOIN ops.dead_letters d USING (resource_type, partition_key)"
        " WHERE r.run_id = ANY(%s) AND d.stage = ANY(%s)",
        [list(run_ids), list(REPLAYED)],
    ).fetchone()
    return ReplayOutcome(*(row or (0, 0)))


def discard(conn: Connection, selection: Selection, *, reason: str, by: str) -> int:
    """These are not going to be mended: they count no more, and stay discarded when they fail again."""
    where, params = replace(selection, status=None).where()
    return conn.execute(
        sql.SQL(
            "UPDATE ops.dead_letters SET status = 'discarded', resolution = %(why)s, resolved_at = now(),"
            " resolved_run_id = NULL, replay_requested_at = NULL, claimed_by = NULL WHERE {} AND status = 'open'"
        ).format(where),
        {**params, "why": f"discarded by {by}: {reason}"},
    ).rowcount


def find_outdated(conn: Connection, judges: Sequence[tuple[str, str, str]], *, limit: int) -> list[int]:
    """Ids of open letters that failed under other rules or views than the present ones: type, stage, ruleset."""
    types, stages, present = zip(*judges, strict=True) if judges else ((), (), ())
    one_side = (
        "(SELECT id FROM ops.dead_letters d WHERE d.status = 'open' AND d.stage = judge.stage"
        " AND d.resource_type = judge.resource_type AND d.ruleset {} judge.present LIMIT %(limit)s)"
    )
    rows = conn.execute(
        sql.SQL(
            "SELECT found.id FROM unnest(%(types)s::text[], %(stages)s::text[], %(present)s::text[])"
            " AS judge (resource_type, stage, present), LATERAL ({less} UNION ALL {more}) found LIMIT %(limit)s"
        ).format(less=sql.SQL(one_side).format(sql.SQL("<")), more=sql.SQL(one_side).format(sql.SQL(">"))),
        {"types": list(types), "stages": list(stages), "present": list(present), "limit": limit},
    )
    return [identity for (identity,) in rows]


def record_origin(conn: Connection, run_id: str, resource_type: str, partition_keys: Sequence[str]) -> None:
    """Note in ``ops.ingestion_runs`` whose failures the run replays: by window the run in which they failed last."""
    conn.execute(
        "UPDATE ops.ingestion_runs r SET replay_of_run_id = failed.run_id FROM"
        " (SELECT partition_key, max(run_id) AS run_id FROM ops.dead_letters WHERE resource_type = %(type)s"
        "  AND partition_key = ANY(%(keys)s) AND stage = ANY(%(stages)s) AND status = 'replaying'"
        "  AND claimed_by = %(run)s AND run_id <> %(run)s GROUP BY 1) failed"
        " WHERE r.run_id = %(run)s AND r.resource_type = %(type)s AND r.partition_key = failed.partition_key"
        " AND r.replay_of_run_id IS NULL",
        {"run": run_id, "type": resource_type, "keys": list(partition_keys), "stages": list(REPLAYED)},
    )


def _dead_claimers(conn: Connection) -> list[str]:
    found: list[Any] = conn.execute(
        "SELECT DISTINCT claimed_by FROM ops.dead_letters WHERE status = 'replaying' AND claimed_by IS NOT NULL"
    ).fetchall()
    claimers = [claimer for (claimer,) in found]
    return sorted(set(claimers) - runs.find_alive(conn, claimers))
