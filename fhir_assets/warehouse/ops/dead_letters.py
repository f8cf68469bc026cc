"""Dead letters: what could not go on, each with its reason and its bytes, to be listed, settled and replayed."""

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
from fhir_assets.warehouse.postgres.db.connections import Connection, OpenSession, Session, cipher_of

Stage = Literal["fetch", "validate", "transform", "load", "export", "deliver"]
Status = Literal["open", "replaying", "resolved", "discarded"]

_CHUNK = 5000
_STREAMED = 500
_IS_ID = re.compile(r"[A-Za-z0-9._-]{1,64}").fullmatch
"""What else stands in the place of an id may be anything, a patient's name too, and stays in the resource alone."""


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A resource (its bytes as received, whatever they are) that a stage refused.

    ``path``, ``message`` and ``issues`` hold no patient data; ``rule`` and ``path`` are of the issue that leads.
    ``origin`` says by what it was received, None if it was fetched from the configured source.
    ``ruleset`` names the rules or views that refused it: others may not.
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

    def fingerprint(self, cipher: Cipher) -> bytes:
        """The same for the same content that fails in the same stage, type and partition; keyed by ``sealing``."""
        content = self.resource
        if content is None:
            content = "\0".join((self.resource_id or "", self.rule, self.path, self.message)).encode(*_UTF8)
        scope = "\0".join((self.stage, self.resource_type, self.partition_key)).encode(*_UTF8)
        return cipher.fingerprint(scope + b"\0\0" + content)


_UTF8 = ("utf-8", "backslashreplace")


def record(conn: Session, run_id: str, letters: Iterable[DeadLetter]) -> None:
    """Keep the letters. One that is known already has failed once more (``attempts``), and is open again unless it
    was discarded; ``occurrences`` is how often its content came in this run.
    """
    rest = iter(letters)
    while chunk := list(islice(rest, _CHUNK)):
        _record(conn, run_id, chunk)


def record_now(connect: OpenSession, run_id: str, letters: Sequence[DeadLetter]) -> None:
    """As ``record``, committed at once on a connection of its own, whatever becomes of the caller's work."""
    with connect() as conn, conn.transaction():
        record(conn, run_id, letters)


def resolve_not_repeated(
    conn: Connection, run_id: str, resource_type: str, stage: str, partition_keys: Sequence[str]
) -> int:
    """Letters of partitions that this run passed through whole and that did not fail again are resolved. Returns
    how many.

    Reading the source again says nothing about what was received by another door: its letters of stage ``fetch`` stay.
    """
    return conn.execute(
        "UPDATE ops.dead_letters d SET status = 'resolved', resolved_at = now(), resolved_run_id = %(run)s,"
        " resolution = CASE WHEN EXISTS (SELECT FROM ops.corrections c WHERE c.fingerprint = d.fingerprint)"
        " THEN 'corrected' ELSE 'did not fail again' END, claimed_by = NULL, replay_requested_at = NULL"
        " WHERE resource_type = %(type)s AND stage = %(stage)s AND partition_key = ANY(%(keys)s)"
        " AND status IN ('open', 'replaying') AND run_id <> %(run)s AND (stage <> 'fetch' OR origin IS NULL)",
        {"run": run_id, "type": resource_type, "stage": stage, "keys": list(partition_keys)},
    ).rowcount


@dataclass(frozen=True, slots=True)
class StoredDeadLetter:
    """A letter as it is listed: all but the resource."""

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
    """Which letters: every field that is given must match. ``run_id`` is the run in which they failed first or last;
    ``since`` and ``until`` bound the last failure.
    """

    ids: Sequence[int] | None = None
    run_id: str | None = None
    resource_type: str | None = None
    stage: str | None = None
    rule: str | None = None
    status: str | None = None
    partition_keys: Sequence[str] | None = None
    since: datetime | None = None
    until: datetime | None = None

    def where(self) -> tuple[sql.Composed, dict[str, object]]:
        """The condition, and its parameters."""
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
        if self.since is not None:
            terms.append(sql.SQL("last_failure >= %(since)s"))
            params["since"] = self.since
        if self.until is not None:
            terms.append(sql.SQL("last_failure < %(until)s"))
            params["until"] = self.until
        return sql.SQL(" AND ").join(terms or [sql.SQL("true")]), params


def find(
    conn: Connection, selection: Selection, *, before: int | None = None, limit: int = 100
) -> list[StoredDeadLetter]:
    """The letters of a selection, those that failed last first; ``before`` is the last id of the page before."""
    if selection.run_id is not None:
        # Of two indexes one page each: an OR would have Postgres sort all letters of the run.
        either = replace(selection, run_id=None).where()[0]
        places = [
            sql.SQL("{} = %(run_id)s AND {}").format(sql.Identifier(name), either)
            for name in ("run_id", "first_run_id")
        ]
    else:
        places = [selection.where()[0]]
    columns = sql.SQL(", ").join([sql.Identifier(each.name) for each in fields(StoredDeadLetter)])
    page = sql.SQL(
        "AND (last_failure, id) < (SELECT last_failure, id FROM ops.dead_letters WHERE id = %(before)s)"
        if before is not None
        else ""
    )
    order = sql.SQL("ORDER BY last_failure DESC, id DESC LIMIT %(limit)s")
    parts = [
        sql.SQL("(SELECT {} FROM ops.dead_letters WHERE {} {} {})").format(columns, where, page, order)
        for where in places
    ]
    query = sql.SQL("SELECT * FROM ({}) found {}").format(sql.SQL(" UNION ").join(parts), order)
    params = {**selection.where()[1], "before": before, "limit": limit}
    with conn.cursor(row_factory=class_row(StoredDeadLetter)) as cursor:
        return cursor.execute(query, params).fetchall()


def get(conn: Connection, letter_id: int) -> tuple[StoredDeadLetter, list[dict[str, str]]] | None:
    """A letter with all of its issues; None for an unknown id."""
    columns = sql.SQL(", ").join([sql.Identifier(each.name) for each in fields(StoredDeadLetter)])
    query = sql.SQL("SELECT {}, issues FROM ops.dead_letters WHERE id = %s").format(columns)
    row = conn.execute(query, [letter_id]).fetchone()
    return None if row is None else (StoredDeadLetter(*row[:-1]), row[-1])


def read_resource(conn: Session, letter_id: int) -> bytes | None:
    """The bytes of a letter's resource; None if it has none. Raises KeyError for an unknown id, SealingError."""
    row = conn.execute("SELECT resource FROM ops.dead_letters WHERE id = %s", [letter_id]).fetchone()
    if row is None:
        raise KeyError(letter_id)
    return None if row[0] is None else cipher_of(conn).decrypt_and_decompress(bytes(row[0]))


def stream(conn: Session, selection: Selection) -> Iterator[tuple[StoredDeadLetter, bytes | None]]:
    """The letters of a selection with their resources, the oldest first, streamed. Raises SealingError."""
    where, params = selection.where()
    columns = sql.SQL(", ").join([sql.Identifier(each.name) for each in fields(StoredDeadLetter)])
    query = sql.SQL("SELECT {}, resource FROM ops.dead_letters WHERE {} ORDER BY id").format(columns, where)
    cipher = cipher_of(conn)
    with conn.transaction(), conn.cursor(name="dead_letters") as cursor:
        cursor.itersize = _STREAMED
        for row in cursor.execute(query, params):
            yield (
                StoredDeadLetter(*row[:-1]),
                None if row[-1] is None else cipher.decrypt_and_decompress(bytes(row[-1])),
            )


def count_by_reason(conn: Connection, selection: Selection) -> list[dict[str, Any]]:
    """How many letters there are by stage, rule and path, the most first: ``occurrences`` counts equal lines."""
    where, params = selection.where()
    rows = conn.execute(
        sql.SQL(
            "SELECT stage, rule, path, count(*), sum(occurrences)::bigint FROM ops.dead_letters"
            " WHERE {} GROUP BY 1, 2, 3 ORDER BY 5 DESC, 1, 2, 3"
        ).format(where),
        params,
    )
    return [
        {"stage": stage, "rule": rule, "path": path, "letters": letters, "occurrences": occurrences}
        for stage, rule, path, letters, occurrences in rows
    ]


def _record(conn: Session, run_id: str, letters: Sequence[DeadLetter]) -> None:
    cipher = cipher_of(conn)
    unique: dict[bytes, list[Any]] = {}
    for letter in letters:
        fingerprint = letter.fingerprint(cipher)
        if fingerprint in unique:
            unique[fingerprint][-1] += 1
            continue
        unique[fingerprint] = [
            fingerprint,
            _storable(letter.resource_type),
            letter.resource_id if letter.resource_id and _IS_ID(letter.resource_id) else None,
            letter.stage,
            _storable(letter.rule),
            _storable(letter.path),
            _storable(letter.message),
            Jsonb([{name: _storable(text) for name, text in issue.items()} for issue in letter.issues]),
            None if letter.resource is None else cipher.compress_and_encrypt(letter.resource),
            _storable(letter.partition_key),
            letter.origin,
            _last_updated(letter.resource),
            letter.ruleset,
            1,
        ]
    with conn.transaction() if conn.autocommit else nullcontext(), conn.cursor() as cursor:
        cursor.execute(_STAGE)
        with cursor.copy("COPY pg_temp.stage_dead_letters FROM STDIN (FORMAT binary)") as copy:
            copy.set_types(_STAGE_TYPES)
            # In one order everywhere, so that two runs do not wait for each other crosswise.
            for fingerprint in sorted(unique):
                copy.write_row(unique[fingerprint])
        cursor.execute(_UPSERT, [run_id, run_id, cipher.key_id])
        cursor.execute("TRUNCATE pg_temp.stage_dead_letters")


_STAGE = """
    CREATE TEMPORARY TABLE IF NOT EXISTS stage_dead_letters (
        fingerprint bytea, resource_type text, resource_id text, stage text, rule text, path text, message text,
        issues jsonb, resource bytea, partition_key text, origin text, last_updated timestamptz, ruleset text,
        occurrences bigint
    ) ON COMMIT DROP
"""
_STAGE_TYPES = ["bytea", *["text"] * 6, "jsonb", "bytea", "text", "text", "timestamptz", "text", "int8"]
_UPSERT = sql.SQL("""
    INSERT INTO ops.dead_letters AS known (
        fingerprint, resource_type, resource_id, stage, rule, path, message, issues, resource, partition_key,
        origin, last_updated, ruleset, occurrences, run_id, first_run_id, key_id
    )
    SELECT *, %s, %s, %s FROM pg_temp.stage_dead_letters
    ON CONFLICT (fingerprint) DO UPDATE SET
        resource_id = excluded.resource_id,
        rule = excluded.rule,
        path = excluded.path,
        message = excluded.message,
        issues = excluded.issues,
        resource = excluded.resource,
        key_id = excluded.key_id,
        origin = excluded.origin,
        ruleset = excluded.ruleset,
        run_id = excluded.run_id,
        status = CASE WHEN {stays} THEN known.status ELSE 'open' END,
        occurrences = excluded.occurrences + CASE WHEN known.run_id = excluded.run_id THEN known.occurrences ELSE 0 END,
        attempts = known.attempts + (known.run_id <> excluded.run_id)::integer,
        last_failure = now(),
        resolved_at = CASE WHEN {stays} THEN known.resolved_at END,
        resolved_run_id = CASE WHEN {stays} THEN known.resolved_run_id END,
        resolution = CASE WHEN {stays} THEN known.resolution END,
        claimed_by = NULL,
        replay_requested_at = NULL
""").format(
    # What was corrected at the door has come in corrected: that it is refused again when its window is read is known.
    stays=sql.SQL("known.status = 'discarded' OR known.stage = 'fetch' AND known.resolution = 'corrected'")
)


def _last_updated(resource: bytes | None) -> datetime | None:
    if resource is None:
        return None
    try:
        meta = read_header(resource).meta
    except MalformedResource:
        return None
    return parse_instant(meta.lastUpdated) if meta else None


def _storable(text: str) -> str:
    """Text without what Postgres does not store: NUL, and halves of surrogate pairs."""
    if text.isascii() and "\0" not in text:
        return text
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}").encode(*_UTF8).decode()
