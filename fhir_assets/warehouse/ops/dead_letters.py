"""``ops.dead_letters``: resources that failed a step, each with the reason and its bytes as received.

This module records, lists and counts dead letters. Their resolution by a load is in ``dead_letter_resolution``, replays
are in ``replays``, and corrections by hand are in ``corrections``.

Each time a dead letter is recorded, ``recorded`` is set to the next number of a sequence. The numbers show which of
the dead letters were recorded since a step began, independently of clocks and of the order of commits.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from datetime import datetime
from itertools import islice
from typing import Any, Literal

from psycopg import sql
from psycopg.rows import class_row
from psycopg.types.json import Jsonb

from fhir_assets.fhir.record import MalformedResource, parse_instant, read_header
from fhir_assets.privacy.encryption import Cipher
from fhir_assets.privacy.places import dead_letter_place
from fhir_assets.warehouse.ops import liveness
from fhir_assets.warehouse.postgres.db.connections import Connection, OpenSession, Session, cipher_of

Stage = Literal["fetch", "validate", "transform", "load", "export", "deliver"]
Status = Literal["open", "replaying", "resolved", "discarded"]

_DEAD_LETTERS_PER_STATEMENT = 5000
_ROWS_PER_FETCH = 500
_IS_ID = re.compile(r"[A-Za-z0-9._-]{1,64}").fullmatch
"""Matches a valid FHIR id. Any other text in the element ``id`` may be patient data and is not stored as an id."""


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A resource that failed a stage, with its bytes as received.

    ``path``, ``message`` and ``issues`` contain no patient data. ``rule`` and ``path`` belong to the first error.
    ``origin`` identifies the input (see ``received``), None if the resource was fetched from the configured source.
    ``ruleset`` is the fingerprint of the rules or views under which it failed.
    """

    resource_type: str
    resource_id: str | None
    stage: str
    rule: str
    path: str
    message: str
    resource: bytes | None
    partition_key: str
    issues: list[dict[str, str]] = field(default_factory=list)
    origin: str | None = None
    ruleset: str = ""
    arrived: datetime | None = None
    """The time of arrival of the resource, if known."""
    dated: bool = True
    """Whether the ``meta.lastUpdated`` of the resource counts: see ``fhir.record``."""

    def fingerprint(self, cipher: Cipher) -> bytes:
        """Return the keyed hash of stage, type, partition and content, by which a repeated failure is recognized."""
        content = self.resource
        if content is None:
            content = "\0".join((self.resource_id or "", self.rule, self.path, self.message)).encode(*_UTF8)
        scope = "\0".join((self.stage, self.resource_type, self.partition_key)).encode(*_UTF8)
        return cipher.fingerprint(scope + b"\0\0" + content)


_UTF8 = ("utf-8", "backslashreplace")


def record(conn: Session, run_id: str, failures: Iterable[DeadLetter]) -> None:
    """Record dead letters of a run.

    A dead letter that is known already gets one more attempt and is reopened, unless it was discarded, or a live run
    has claimed it for a replay and will resolve or reopen it. ``occurrences`` counts the resources with this content in
    the run.
    """
    rest = iter(failures)
    while chunk := list(islice(rest, _DEAD_LETTERS_PER_STATEMENT)):
        _record(conn, run_id, chunk)


def record_now(connect: OpenSession, run_id: str, failures: Sequence[DeadLetter]) -> None:
    """Record dead letters on a new connection, and commit: they survive a rollback of the caller's transaction."""
    with connect() as conn, conn.transaction():
        record(conn, run_id, failures)


@dataclass(frozen=True, slots=True)
class StoredDeadLetter:
    """A row of ``ops.dead_letters`` without the resource."""

    id: int
    resource_type: str
    resource_id: str | None
    stage: str
    rule: str
    path: str
    message: str
    partition_key: str
    run_id: str
    first_run_id: str
    status: str
    occurrences: int
    attempts: int
    first_failure: datetime
    last_failure: datetime
    resolved_at: datetime | None
    resolved_run_id: str | None
    resolution: str | None


@dataclass(frozen=True, slots=True)
class Selection:
    """A filter of dead letters: every field that is not None must match.

    ``run_id`` is the run of the first or of the last failure. ``origins`` are received inputs, and select their parts
    that could not be read, even if a later input had the same. ``since`` (inclusive) and ``until`` (exclusive) bound
    the time of the last failure.
    """

    ids: Sequence[int] | None = None
    run_id: str | None = None
    resource_type: str | None = None
    stage: str | None = None
    rule: str | None = None
    status: str | None = None
    partition_keys: Sequence[str] | None = None
    origins: Sequence[str] | None = None
    since: datetime | None = None
    until: datetime | None = None

    def where(self) -> tuple[sql.Composed, dict[str, object]]:
        """Return the SQL condition and its parameters."""
        equal = {name: getattr(self, name) for name in ("resource_type", "stage", "rule", "status")}
        params: dict[str, object] = {name: value for name, value in equal.items() if value is not None}
        terms: list[sql.Composable] = [
            sql.SQL("{} = {}").format(sql.Identifier(name), sql.Placeholder(name)) for name in params
        ]
        if self.ids is not None:
            terms.append(sql.SQL("id = ANY(%(ids)s)"))
            params["ids"] = list(self.ids)
        if self.run_id is not None:
            terms.append(sql.SQL("(run_id = %(run_id)s OR first_run_id = %(run_id)s)"))
            params["run_id"] = self.run_id
        if self.partition_keys is not None:
            terms.append(sql.SQL("partition_key = ANY(%(partition_keys)s)"))
            params["partition_keys"] = list(self.partition_keys)
        if self.origins is not None:
            terms.append(sql.SQL("stage = 'fetch' AND (origin = ANY(%(origins)s) OR earlier_origins && %(origins)s)"))
            params["origins"] = list(self.origins)
        if self.since is not None:
            terms.append(sql.SQL("last_failure >= %(since)s"))
            params["since"] = self.since
        if self.until is not None:
            terms.append(sql.SQL("last_failure < %(until)s"))
            params["until"] = self.until
        return sql.SQL(" AND ").join(terms or [sql.SQL("true")]), params


_AFTER_PREVIOUS_PAGE = "(last_failure, id) < (SELECT last_failure, id FROM ops.dead_letters WHERE id = %(before)s)"
_PAGE = sql.SQL("""
    SELECT {columns}
    FROM ops.dead_letters
    WHERE {where} AND {after_previous_page}
    ORDER BY last_failure DESC, id DESC
    LIMIT %(limit)s
""")
# One page from each of two indexes: with OR, Postgres would sort all dead letters of the run.
_PAGE_OF_RUN = sql.SQL("""
    SELECT *
    FROM (
        (
            SELECT {columns}
            FROM ops.dead_letters
            WHERE run_id = %(run_id)s AND {where} AND {after_previous_page}
            ORDER BY last_failure DESC, id DESC
            LIMIT %(limit)s
        )
        UNION
        (
            SELECT {columns}
            FROM ops.dead_letters
            WHERE first_run_id = %(run_id)s AND {where} AND {after_previous_page}
            ORDER BY last_failure DESC, id DESC
            LIMIT %(limit)s
        )
    ) AS pages
    ORDER BY last_failure DESC, id DESC
    LIMIT %(limit)s
""")


def find(
    conn: Connection, selection: Selection, *, before: int | None = None, limit: int = 100
) -> list[StoredDeadLetter]:
    """Return a page of a selection, ordered by last failure, newest first.

    ``before`` is the last id of the previous page.
    """
    run_selected = selection.run_id is not None
    where = replace(selection, run_id=None).where()[0]
    query = (_PAGE_OF_RUN if run_selected else _PAGE).format(
        columns=sql.SQL(", ").join([sql.Identifier(field.name) for field in fields(StoredDeadLetter)]),
        where=where,
        after_previous_page=sql.SQL("true" if before is None else _AFTER_PREVIOUS_PAGE),
    )
    params = {**selection.where()[1], "before": before, "limit": limit}
    with conn.cursor(row_factory=class_row(StoredDeadLetter)) as cursor:
        return cursor.execute(query, params).fetchall()


def get(conn: Connection, dead_letter_id: int) -> tuple[StoredDeadLetter, list[dict[str, str]]] | None:
    """Return a dead letter and all of its issues, None for an unknown id."""
    columns = sql.SQL(", ").join([sql.Identifier(field.name) for field in fields(StoredDeadLetter)])
    query = sql.SQL("SELECT {}, issues FROM ops.dead_letters WHERE id = %s").format(columns)
    row = conn.execute(query, [dead_letter_id]).fetchone()
    return None if row is None else (StoredDeadLetter(*row[:-1]), row[-1])


def read_resource(conn: Session, dead_letter_id: int) -> bytes | None:
    """Return the resource of a dead letter as received, None if it has none.

    Raises KeyError for an unknown id, EncryptionError.
    """
    query = "SELECT source, fingerprint, resource FROM ops.dead_letters WHERE id = %s"
    row = conn.execute(query, [dead_letter_id]).fetchone()
    if row is None:
        raise KeyError(dead_letter_id)
    return decrypt_content(conn, *row)


def decrypt_content(conn: Session, source: str, fingerprint: bytes, resource: bytes | None) -> bytes | None:
    """Return the decrypted resource of a row of ``ops.dead_letters``, None if it has none. Raises EncryptionError."""
    if resource is None:
        return None
    return cipher_of(conn).decrypt_and_decompress(bytes(resource), dead_letter_place(source, bytes(fingerprint)))


def stream(conn: Session, selection: Selection) -> Iterator[tuple[StoredDeadLetter, bytes | None]]:
    """Yield the dead letters of a selection with their resources, in the order of ids. Raises EncryptionError."""
    where, params = selection.where()
    columns = sql.SQL(", ").join([sql.Identifier(field.name) for field in fields(StoredDeadLetter)])
    query = sql.SQL("""
        SELECT {}, source, fingerprint, resource
        FROM ops.dead_letters
        WHERE {}
        ORDER BY id
    """).format(columns, where)
    with conn.transaction(), conn.cursor(name="dead_letters") as cursor:
        cursor.itersize = _ROWS_PER_FETCH
        for row in cursor.execute(query, params):
            yield StoredDeadLetter(*row[:-3]), decrypt_content(conn, *row[-3:])


def count_by_reason(conn: Connection, selection: Selection) -> list[dict[str, Any]]:
    """Return the numbers of dead letters (key ``dead_letters``) and of their occurrences by stage, rule and path.

    The largest number of occurrences comes first; ``occurrences`` counts equal resources of a run separately.
    """
    where, params = selection.where()
    rows = conn.execute(
        sql.SQL(
            """
            SELECT stage, rule, path, count(*), sum(occurrences)::bigint
            FROM ops.dead_letters
            WHERE {}
            GROUP BY 1, 2, 3
            ORDER BY 5 DESC, 1, 2, 3
            """
        ).format(where),
        params,
    )
    return [
        {"stage": stage, "rule": rule, "path": path, "dead_letters": count, "occurrences": occurrences}
        for stage, rule, path, count, occurrences in rows
    ]


def count_unresolved(conn: Connection, resource_type: str, stage: Stage) -> int:
    """Return the number of resources of a type that are dead letters of a stage and neither resolved nor discarded."""
    row = conn.execute(
        """
        SELECT coalesce(sum(occurrences), 0)::bigint
        FROM ops.dead_letters
        WHERE source = ops.current_source()
            AND resource_type = %s
            AND stage = %s
            AND status IN ('open', 'replaying')
        """,
        [resource_type, stage],
    ).fetchone()
    assert row is not None
    return int(row[0])


def _record(conn: Session, run_id: str, failures: Sequence[DeadLetter]) -> None:
    cipher = cipher_of(conn)
    unique: dict[bytes, list[Any]] = {}
    for dead_letter in failures:
        fingerprint = dead_letter.fingerprint(cipher)
        if fingerprint in unique:
            unique[fingerprint][-1] += 1
            continue
        unique[fingerprint] = [
            fingerprint,
            _storable(dead_letter.resource_type),
            dead_letter.resource_id if dead_letter.resource_id and _IS_ID(dead_letter.resource_id) else None,
            dead_letter.stage,
            _storable(dead_letter.rule),
            _storable(dead_letter.path),
            _storable(dead_letter.message),
            Jsonb([{name: _storable(text) for name, text in issue.items()} for issue in dead_letter.issues]),
            None
            if dead_letter.resource is None
            else cipher.compress_and_encrypt(dead_letter.resource, dead_letter_place(conn.source, fingerprint)),
            _storable(dead_letter.partition_key),
            dead_letter.origin,
            _last_updated(dead_letter.resource) if dead_letter.dated else None,
            dead_letter.arrived,
            dead_letter.dated,
            dead_letter.ruleset,
            1,
        ]
    with conn.transaction() if conn.autocommit else nullcontext(), conn.cursor() as cursor:
        cursor.execute(_STAGE)
        with cursor.copy("COPY pg_temp.stage_dead_letters FROM STDIN (FORMAT binary)") as copy:
            copy.set_types(_STAGE_TYPES)
            # Every run inserts in the same order, so that two runs cannot deadlock.
            for fingerprint in sorted(unique):
                copy.write_row(unique[fingerprint])
        parameters = {"run": run_id, "key": cipher.key_id, "live_claimers": _find_live_claimers(conn)}
        cursor.execute(_UPSERT, parameters)
        cursor.execute("TRUNCATE pg_temp.stage_dead_letters")


_STAGE = """
    CREATE TEMPORARY TABLE IF NOT EXISTS stage_dead_letters (
        fingerprint bytea, resource_type text, resource_id text, stage text, rule text, path text, message text,
        issues jsonb, resource bytea, partition_key text, origin text, last_updated timestamptz,
        arrived timestamptz, dated boolean, ruleset text, occurrences bigint
    ) ON COMMIT DROP
"""
_STAGE_TYPES = [
    "bytea",
    *["text"] * 6,
    "jsonb",
    "bytea",
    "text",
    "text",
    "timestamptz",
    "timestamptz",
    "bool",
    "text",
    "int8",
]
_UPSERT = sql.SQL("""
    INSERT INTO ops.dead_letters AS known (
        fingerprint, resource_type, resource_id, stage, rule, path, message, issues, resource, partition_key,
        origin, last_updated, arrived, dated, ruleset, occurrences, run_id, first_run_id, key_id, recorded
    )
    SELECT *, %(run)s, %(run)s, %(key)s, nextval('ops.dead_letter_records') FROM pg_temp.stage_dead_letters
    ON CONFLICT (fingerprint, source) DO UPDATE SET
        resource_id = excluded.resource_id,
        rule = excluded.rule,
        path = excluded.path,
        message = excluded.message,
        issues = excluded.issues,
        resource = excluded.resource,
        key_id = excluded.key_id,
        origin = excluded.origin,
        earlier_origins = CASE
            WHEN known.origin <> excluded.origin THEN
                (
                    known.origin
                    || array_remove(array_remove(known.earlier_origins, known.origin), excluded.origin)
                )[1:100]
            ELSE known.earlier_origins
        END,
        last_updated = excluded.last_updated,
        arrived = excluded.arrived,
        dated = excluded.dated,
        ruleset = excluded.ruleset,
        run_id = excluded.run_id,
        status = CASE WHEN {stays} OR {is_claimed} THEN known.status ELSE 'open' END,
        occurrences = excluded.occurrences + CASE WHEN known.run_id = excluded.run_id THEN known.occurrences ELSE 0 END,
        attempts = known.attempts + (known.run_id <> excluded.run_id)::integer,
        last_failure = now(),
        resolved_at = CASE WHEN {stays} THEN known.resolved_at END,
        resolved_run_id = CASE WHEN {stays} THEN known.resolved_run_id END,
        resolution = CASE WHEN {stays} THEN known.resolution END,
        claimed_by = CASE WHEN {is_claimed} THEN known.claimed_by END,
        replay_requested_at = CASE WHEN {is_claimed} THEN known.replay_requested_at END,
        recorded = nextval('ops.dead_letter_records')
""").format(
    # A corrected dead letter of stage fetch stays resolved, although it fails again whenever its window is fetched.
    stays=sql.SQL("known.status = 'discarded' OR known.stage = 'fetch' AND known.resolution = 'corrected'"),
    is_claimed=sql.SQL("known.status = 'replaying' AND known.claimed_by = ANY(%(live_claimers)s)"),
)


def _find_live_claimers(conn: Connection) -> list[str]:
    """Return the ids of the runs that are alive and have claimed dead letters."""
    rows = conn.execute(
        "SELECT DISTINCT claimed_by FROM ops.dead_letters WHERE status = 'replaying' AND claimed_by IS NOT NULL"
    ).fetchall()
    return sorted(liveness.find_alive(conn, [claimer for (claimer,) in rows])) if rows else []


def _last_updated(resource: bytes | None) -> datetime | None:
    if resource is None:
        return None
    try:
        meta = read_header(resource).meta
    except MalformedResource:
        return None
    return parse_instant(meta.last_updated) if meta else None


def _storable(text: str) -> str:
    """Replace characters that Postgres cannot store: NUL, and halves of surrogate pairs."""
    if text.isascii() and "\0" not in text:
        return text
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}").encode(*_UTF8).decode()
