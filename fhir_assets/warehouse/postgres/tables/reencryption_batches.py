"""What is sealed in the database, by which key, and how it is sealed anew: in batches, each locked before it is read.

Rows that a load holds are passed over (SKIP LOCKED), and no batch waits for a lock: a rotation never makes a load
wait for more than one batch, and never takes part in a deadlock.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, LiteralString

from psycopg import sql

from fhir_assets.catalog import CATALOG
from fhir_assets.errors import EncryptionError
from fhir_assets.fhir.views import View
from fhir_assets.privacy.encryption import NO_ENCRYPTION, Cipher, as_json
from fhir_assets.warehouse.ops.dead_letters import DeadLetter
from fhir_assets.warehouse.postgres.db.connections import Connection, Session, cipher_of
from fhir_assets.warehouse.postgres.resources import decrypt_text
from fhir_assets.warehouse.postgres.tables.layout import KEY_COLUMN, KEY_ID_COLUMN, holds_phi

BATCH_ROWS = 1000
BATCH_BYTES = 4 << 20
RowKey = tuple[Any, ...]


_RESEALED = "(key_id IS NULL OR key_id = ANY(%(older)s))"
_ORIGINAL = "CASE WHEN substring(original FOR 3) = 'FS1' THEN encode(substring(original FROM 4 FOR 4), 'hex') END"


@dataclass(frozen=True, slots=True)
class EncryptedTable:
    """A table of ``ops`` with sealed ``contents``, jsonb or bytea, and ``key_id``; ``todo`` says which of its rows
    are not sealed by the newest key.
    """

    name: str
    table: str
    key: tuple[str, ...]
    contents: tuple[str, ...]
    json: bool = False
    todo: LiteralString = _RESEALED


ENCRYPTED_TABLES = (
    EncryptedTable("withheld", "withheld", ("resource_type", "id"), ("resource",), json=True),
    EncryptedTable("consents", "consent_records", ("consent_id",), ("resource",), json=True),
    EncryptedTable("dead_letters", "dead_letters", ("id",), ("resource",)),
    EncryptedTable(
        "corrections",
        "corrections",
        ("fingerprint",),
        ("resource", "original"),
        # The original of a correction is as its dead letter had it, maybe under another key.
        todo=f"({_RESEALED} OR original IS NOT NULL AND coalesce({_ORIGINAL} = ANY(%(older)s), true))",
    ),
    EncryptedTable("answers", "idempotency", ("key",), ("answer",)),
)


@dataclass(slots=True)
class BatchResult:
    """What came of a batch. ``passed_over`` are held by a load; ``refused`` says why what could not be sealed was not,
    and how often.
    """

    sealed: int
    from_clear: int
    passed_over: int
    refused: Counter[str]


# What is there


def count_rows_by_key(conn: Connection, views: Sequence[View]) -> dict[str, Counter[str | None]]:
    """By place, how many rows each key seals, by its id; None: those in the clear. ``rows`` are those of the views'
    tables that hold patient data.
    """
    found = {"resources": _counted(conn, sql.SQL("SELECT key_id FROM fhir.resource WHERE resource IS NOT NULL"))}
    found["rows"] = Counter[str | None]()
    for table, has_column in find_tables_with_phi(conn, views).items():
        column = sql.Identifier(KEY_ID_COLUMN) if has_column else sql.SQL("NULL::text")
        found["rows"] += _counted(conn, sql.SQL("SELECT {} FROM {}").format(column, sql.Identifier("fhir", table)))
    for place in ENCRYPTED_TABLES:
        found[place.name] = _counted(conn, sql.SQL("SELECT key_id FROM {}").format(_table(place)))
    found["corrections"] += _counted(
        conn,
        sql.SQL(
            "SELECT k FROM (SELECT {} AS k, key_id FROM ops.corrections WHERE original IS NOT NULL) o"
            " WHERE k IS DISTINCT FROM key_id"
        ).format(sql.SQL(_ORIGINAL)),
    )
    return found


def find_tables_with_phi(conn: Connection, views: Sequence[View]) -> dict[str, bool]:
    """The tables that hold patient data, also those that no view makes any more; whether each says which key sealed
    its rows.
    """
    rows = conn.execute(
        "SELECT relname, EXISTS (SELECT FROM pg_attribute WHERE attrelid = c.oid AND attname = %s AND NOT attisdropped)"
        " FROM pg_class c WHERE relnamespace = 'fhir'::regnamespace AND relkind = 'r' ORDER BY 1",
        [KEY_ID_COLUMN],
    )
    ours = {view.name for view in views if holds_phi(view)}
    return {name: has_column for name, has_column in rows if has_column or name in ours}


def find_resource_types(conn: Connection) -> list[str]:
    """The types that may be in ``fhir.resource``."""
    others = conn.execute("SELECT DISTINCT resource_type FROM fhir.resource_other ORDER BY 1")
    return [*(each.name for each in CATALOG), *(name for (name,) in others)]


def _counted(conn: Connection, keys: sql.Composable) -> Counter[str | None]:
    query = sql.SQL("SELECT key_id, count(*) FROM ({}) AS k (key_id) GROUP BY 1").format(keys)
    return Counter(dict(conn.execute(query).fetchall()))


# The next ones to seal


def find_resources(conn: Connection, resource_type: str, older: Sequence[str], after: RowKey | None) -> list[RowKey]:
    """The ids of some resources, after that one, that are in the clear or sealed by one of the ``older`` keys."""
    rows = conn.execute(
        "SELECT id, pg_column_size(resource) FROM fhir.resource WHERE resource_type = %(type)s"  # noqa: S608
        f" AND id > %(after)s AND resource IS NOT NULL AND {_RESEALED}"
        " ORDER BY id LIMIT %(limit)s",
        {"type": resource_type, "after": after[0] if after else "", "older": list(older), "limit": BATCH_ROWS},
    )
    return _some(rows)


def find_outdated_rows(conn: Connection, table: str, newest: str, after: RowKey | None) -> list[RowKey]:
    """The ids of some resources, after that one, that have rows in a table which another key sealed, or none."""
    query = sql.SQL(
        "SELECT DISTINCT {key} FROM {table} WHERE {key} > %(after)s"
        " AND {key_id} IS DISTINCT FROM %(newest)s ORDER BY 1 LIMIT %(limit)s"
    ).format(key=sql.Identifier(KEY_COLUMN), table=sql.Identifier("fhir", table), key_id=sql.Identifier(KEY_ID_COLUMN))
    limit = BATCH_ROWS // 10
    return list(conn.execute(query, {"after": after[0] if after else "", "newest": newest, "limit": limit}))


def find_leftover_rows(conn: Connection, table: str, older: Sequence[str], after: RowKey | None) -> list[RowKey]:
    """As ``next_with_rows``, of rows that one of the ``older`` keys sealed."""
    query = sql.SQL(
        "SELECT DISTINCT {key} FROM {table} WHERE {key} > %(after)s AND {key_id} = ANY(%(older)s)"
        " ORDER BY 1 LIMIT %(limit)s"
    ).format(key=sql.Identifier(KEY_COLUMN), table=sql.Identifier("fhir", table), key_id=sql.Identifier(KEY_ID_COLUMN))
    limit = BATCH_ROWS // 10
    return list(conn.execute(query, {"after": after[0] if after else "", "older": list(older), "limit": limit}))


def find_rows(conn: Connection, place: EncryptedTable, older: Sequence[str], after: RowKey | None) -> list[RowKey]:
    """The keys of some rows of a place, after that one, that are in the clear or sealed by ``older`` keys."""
    sizes = sql.SQL(" + ").join(
        [sql.SQL("coalesce(pg_column_size({}), 0)").format(sql.Identifier(each)) for each in place.contents]
    )
    query = sql.SQL("SELECT {key}, {sizes} FROM {table} WHERE {after} AND {todo} ORDER BY {key} LIMIT {limit}").format(
        key=_key(place),
        sizes=sizes,
        table=_table(place),
        after=_beyond(place, after),
        todo=sql.SQL(place.todo),
        limit=sql.Literal(BATCH_ROWS),
    )
    return _some(conn.execute(query, {"older": list(older)}))


def _some(rows: Iterable[tuple[Any, ...]]) -> list[RowKey]:
    """The keys of as many rows as a batch holds, at least one; the last value of each row is its size."""
    chosen: list[RowKey] = []
    total = 0
    for *key, size in rows:
        total += size
        if chosen and total > BATCH_BYTES:
            break
        chosen.append(tuple(key))
    return chosen


# One batch, in the caller's transaction


def lock_resources(
    conn: Connection, resource_type: str, keys: Sequence[RowKey]
) -> tuple[list[tuple[str, str | None, str]], int]:
    """Id, key and stored text of those resources that no load holds, locked until the transaction ends; and how many
    a load holds.
    """
    which = {"type": resource_type, "ids": [key for (key,) in keys]}
    there = "FROM fhir.resource WHERE resource_type = %(type)s AND id = ANY(%(ids)s) AND resource IS NOT NULL"
    rows = conn.execute(
        "SELECT id, key_id, CASE WHEN key_id IS NULL THEN resource::text ELSE resource #>> '{}' END"
        f" {there} ORDER BY id FOR UPDATE SKIP LOCKED",
        which,
    ).fetchall()
    if len(rows) == len(keys):
        return rows, 0
    found = conn.execute(f"SELECT count(*) {there}", which).fetchone()
    return rows, max(0, found[0] - len(rows)) if found else 0


def encrypt_resources(conn: Session, resource_type: str, resources: Iterable[tuple[str, bytes]]) -> int:
    """Seal resources, by their ids, with the newest key, and leave their rows as they are. Returns how many."""
    cipher = cipher_of(conn)
    with conn.cursor() as cursor:
        cursor.executemany(
            "UPDATE fhir.resource SET resource = %s::jsonb, key_id = %s WHERE resource_type = %s AND id = %s",
            [
                (as_json(cipher.compress_and_encrypt(body)).decode(), cipher.key_id, resource_type, key)
                for key, body in resources
            ],
        )
        return max(0, cursor.rowcount)


def reencrypt_tokens(conn: Session, table: str, older: Sequence[str], keys: Sequence[RowKey]) -> BatchResult:
    """Seal with the newest key, token by token, rows that cannot be made anew: their resource cannot be opened, is not
    there, or their view is gone. ``keys`` are of their resources.
    """
    cipher = cipher_of(conn)
    target = sql.Identifier("fhir", table)
    names = [
        sql.Identifier(name)
        for (name,) in conn.execute(
            "SELECT attname FROM pg_attribute WHERE attrelid = format('fhir.%%I', %s::text)::regclass AND attnum > 0"
            " AND NOT attisdropped AND atttypid = 'text'::regtype AND attname <> ALL(%s) ORDER BY attnum",
            [table, [KEY_COLUMN, KEY_ID_COLUMN]],
        )
    ]
    rows = conn.execute(
        sql.SQL(
            "SELECT ctid, {columns} FROM {table} WHERE {key} = ANY(%s) AND {key_id} = ANY(%s) FOR UPDATE SKIP LOCKED"
        ).format(
            columns=sql.SQL(", ").join(names),
            table=target,
            key=sql.Identifier(KEY_COLUMN),
            key_id=sql.Identifier(KEY_ID_COLUMN),
        ),
        [[key for (key,) in keys], list(older)],
    ).fetchall()
    batch = BatchResult(0, 0, 0 if rows else len(keys), Counter())
    updates = []
    for place, *values in rows:
        try:
            updates.append([*(cipher.reencrypt_token(each) if each else each for each in values), cipher.key_id, place])
            batch.sealed += 1
        except EncryptionError as error:
            batch.refused[str(error)] += 1
    update = sql.SQL("UPDATE {} SET {}, {} = %s WHERE ctid = %s").format(
        target,
        sql.SQL(", ").join([sql.SQL("{} = %s").format(name) for name in names]),
        sql.Identifier(KEY_ID_COLUMN),
    )
    with conn.cursor() as cursor:
        cursor.executemany(update, updates)
    return batch


def reencrypt_rows(conn: Session, place: EncryptedTable, older: Sequence[str], keys: Sequence[RowKey]) -> BatchResult:
    """Seal these rows of a place with the newest key, where they are still in the clear or sealed by ``older`` ones."""
    cipher = cipher_of(conn)
    contents: Sequence[sql.Composable] = [sql.Identifier(each) for each in place.contents]
    if place.json:
        text = sql.SQL("CASE WHEN key_id IS NULL THEN {0}::text ELSE {0} #>> '{{}}' END")
        contents = [text.format(each) for each in contents]
    query = sql.SQL(
        "SELECT key_id, {key}, {contents} FROM {table} WHERE ({key}) IN (VALUES {keys}) AND {todo}"
        " FOR UPDATE SKIP LOCKED"
    ).format(
        key=_key(place),
        contents=sql.SQL(", ").join(contents),
        table=_table(place),
        keys=sql.SQL(", ").join([sql.SQL("({})").format(_literals(key)) for key in keys]),
        todo=sql.SQL(place.todo),
    )
    rows = conn.execute(query, {"older": list(older)}).fetchall()
    batch = BatchResult(0, 0, max(0, len(keys) - len(rows)), Counter())
    updates = []
    from_clear = []
    width = len(place.key)
    for key_id, *row in rows:
        key, stored = row[:width], row[width:]
        try:
            updates.append([*(_resealed(each, key_id, place, cipher) for each in stored), cipher.key_id, *key])
        except EncryptionError as error:
            batch.refused[str(error)] += 1
            continue
        batch.sealed += 1
        if key_id is None:
            batch.from_clear += 1
            from_clear.append(key[0])
    fingerprints = _FINGERPRINTS[place.name](conn, from_clear) if place.name in _FINGERPRINTS and from_clear else []
    update = sql.SQL("UPDATE {} SET {}, key_id = %s WHERE ({}) = ({})").format(
        _table(place),
        sql.SQL(", ").join(
            [
                sql.SQL("{} = %s::jsonb" if place.json else "{} = %s").format(sql.Identifier(each))
                for each in place.contents
            ]
        ),
        _key(place),
        sql.SQL(", ").join([sql.Placeholder()] * width),
    )
    with conn.cursor() as cursor:
        cursor.executemany(update, updates)
        if fingerprints:
            _rename(conn, place, fingerprints)
    return batch


def _resealed(stored: Any, key_id: str | None, place: EncryptedTable, cipher: Cipher) -> Any:
    if stored is None:
        return None
    if not place.json:
        return cipher.reencrypt(bytes(stored))
    return as_json(cipher.compress_and_encrypt(decrypt_text(stored, key_id, cipher))).decode()


def _letters(conn: Session, ids: Sequence[int]) -> list[tuple[bytes, bytes]]:
    """Fingerprints of letters that were kept without keys: what they are, and what they would be with keys."""
    rows = conn.execute(
        "SELECT fingerprint, resource_type, resource_id, stage, rule, path, message, resource, partition_key"
        " FROM ops.dead_letters WHERE id = ANY(%s)",
        [list(ids)],
    )
    return [_fingerprints(conn, bytes(row[0]), DeadLetter(*row[1:])) for row in rows]


def _corrected(conn: Session, fingerprints: Sequence[bytes]) -> list[tuple[bytes, bytes]]:
    """As ``_letters``, of corrections whose letters are gone: the others went along with theirs."""
    rows = conn.execute(
        "SELECT fingerprint, resource_type, NULL, stage, '', '', '', original, partition_key FROM ops.corrections"
        " WHERE fingerprint = ANY(%s)",
        [list(fingerprints)],
    )
    found = ((bytes(row[0]), DeadLetter(*row[1:])) for row in rows)
    return [_fingerprints(conn, old, letter) for old, letter in found if old == letter.fingerprint(NO_ENCRYPTION)]


def _fingerprints(conn: Session, old: bytes, letter: DeadLetter) -> tuple[bytes, bytes]:
    return old, letter.fingerprint(cipher_of(conn))


_FINGERPRINTS: Mapping[str, Callable[[Session, Sequence[Any]], list[tuple[bytes, bytes]]]] = {
    "dead_letters": _letters,
    "corrections": _corrected,
}


def _rename(conn: Session, place: EncryptedTable, fingerprints: Sequence[tuple[bytes, bytes]]) -> None:
    """Give rows the fingerprints that what fails from now on has. Where the same has failed since, the older row gets
    one of its own: nothing of it is lost, and no unkeyed hash of patient data stays.
    """
    cipher = cipher_of(conn)
    tables = ("dead_letters", "corrections") if place.name == "dead_letters" else ("corrections",)
    for table in tables:
        known = {
            bytes(each)
            for (each,) in conn.execute(
                sql.SQL("SELECT fingerprint FROM {} WHERE fingerprint = ANY(%s)").format(sql.Identifier("ops", table)),
                [[new for _, new in fingerprints]],
            )
        }
        with conn.cursor() as cursor:
            cursor.executemany(
                sql.SQL("UPDATE {} SET fingerprint = %s WHERE fingerprint = %s").format(sql.Identifier("ops", table)),
                [(cipher.fingerprint(b"again\0" + old) if new in known else new, old) for old, new in fingerprints],
            )


def _table(place: EncryptedTable) -> sql.Identifier:
    return sql.Identifier("ops", place.table)


def _key(place: EncryptedTable) -> sql.Composed:
    return sql.SQL(", ").join(map(sql.Identifier, place.key))


def _beyond(place: EncryptedTable, after: RowKey | None) -> sql.Composable:
    if after is None:
        return sql.SQL("true")
    return sql.SQL("({}) > ({})").format(_key(place), _literals(after))


def _literals(key: RowKey) -> sql.Composed:
    return sql.SQL(", ").join(map(sql.Literal, key))
