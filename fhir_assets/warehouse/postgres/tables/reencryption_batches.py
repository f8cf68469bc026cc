"""Finds batches of rows that are not encrypted with the newest key, and encrypts them again.

This module is the database side of ``fhir-assets keys rotate``. ``pipeline.reencrypt`` orders the batches and writes
the rows of the views again, ``ops.key_rotations`` records the progress, and ``storage.reencrypt`` encrypts the parts of
the store again.

Rows that another transaction has locked are skipped (SKIP LOCKED), and each batch locks its rows before it reads them.
A rotation therefore delays a load by one batch at most, and never causes a deadlock.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from psycopg import sql

from fhir_assets.catalog import CATALOG
from fhir_assets.errors import EncryptionError
from fhir_assets.fhir.views import View
from fhir_assets.privacy.encryption import Cipher, as_json
from fhir_assets.privacy.places import (
    Place,
    resource_place,
    value_place,
)
from fhir_assets.warehouse.postgres.db.connections import Connection, Session, cipher_of
from fhir_assets.warehouse.postgres.resources import decrypt_text
from fhir_assets.warehouse.postgres.tables.encrypted_tables import (
    ENCRYPTED_TABLES,
    KEY_ID_OF_ORIGINAL,
    OUTDATED,
    EncryptedTable,
)
from fhir_assets.warehouse.postgres.tables.layout import KEY_COLUMN, KEY_ID_COLUMN, SOURCE_COLUMN, holds_phi
from fhir_assets.warehouse.postgres.tables.reencrypted_fingerprints import compute_fingerprints, replace_fingerprints

BATCH_ROWS = 1000
BATCH_BYTES = 4 << 20
_RESOURCES_PER_BATCH = BATCH_ROWS // 10

RowKey = tuple[Any, ...]
"""The values of the key columns of a row."""


@dataclass(slots=True)
class BatchResult:
    """The result of one batch.

    ``encrypted`` is the number of rows that now have the newest key; ``from_clear`` of them were not encrypted before.
    ``skipped`` rows were locked by another transaction. ``refused`` counts the rows that could not be encrypted, by
    reason.
    """

    encrypted: int
    from_clear: int
    skipped: int
    refused: Counter[str]


def count_rows_by_key(conn: Connection, views: Sequence[View]) -> dict[str, Counter[str | None]]:
    """Return the number of rows by location and id of the key that encrypts them, None for unencrypted rows.

    The locations are ``resources``, ``rows`` (the tables with patient data of all views), and the names of
    ``ENCRYPTED_TABLES``.
    """
    counts = {"resources": _count_by_key(conn, sql.SQL("SELECT key_id FROM fhir.resource WHERE resource IS NOT NULL"))}
    counts["rows"] = Counter[str | None]()
    for name, has_key_id in find_tables_with_phi(conn, views).items():
        column = sql.Identifier(KEY_ID_COLUMN) if has_key_id else sql.SQL("NULL::text")
        key_ids = sql.SQL("SELECT {column} FROM {table}").format(column=column, table=sql.Identifier("fhir", name))
        counts["rows"] += _count_by_key(conn, key_ids)
    for table in ENCRYPTED_TABLES:
        counts[table.name] = _count_by_key(conn, sql.SQL("SELECT key_id FROM {table}").format(table=table.identifier))
    originals = sql.SQL("""
        SELECT original_key_id
        FROM (
            SELECT {key_id_of_original} AS original_key_id, key_id
            FROM ops.corrections
            WHERE original IS NOT NULL
        ) corrections
        WHERE original_key_id IS DISTINCT FROM key_id
    """).format(key_id_of_original=sql.SQL(KEY_ID_OF_ORIGINAL))
    counts["corrections"] += _count_by_key(conn, originals)
    return counts


def find_tables_with_phi(conn: Connection, views: Sequence[View]) -> dict[str, bool]:
    """Return the tables with patient data, including those of removed views.

    The value is True if the table has the column KEY_ID_COLUMN.
    """
    rows = conn.execute(
        """
        SELECT
            relname,
            EXISTS (SELECT FROM pg_attribute WHERE attrelid = c.oid AND attname = %s AND NOT attisdropped)
        FROM pg_class c
        WHERE relnamespace = 'fhir'::regnamespace
            AND relkind = 'r'
        ORDER BY 1
        """,
        [KEY_ID_COLUMN],
    )
    with_phi = {view.name for view in views if holds_phi(view)}
    return {name: has_key_id for name, has_key_id in rows if has_key_id or name in with_phi}


def find_resource_types(conn: Connection) -> list[str]:
    """Return the resource types of the catalog and all other types that are stored in ``fhir.resource``."""
    others = conn.execute("SELECT DISTINCT resource_type FROM fhir_partitions.resource_other ORDER BY 1")
    return [*(catalog_type.name for catalog_type in CATALOG), *(name for (name,) in others)]


def _count_by_key(conn: Connection, key_ids: sql.Composable) -> Counter[str | None]:
    query = sql.SQL("SELECT key_id, count(*) FROM ({key_ids}) AS k (key_id) GROUP BY 1").format(key_ids=key_ids)
    return Counter(dict(conn.execute(query).fetchall()))


# The keys of the next batch


def find_resources(conn: Connection, resource_type: str, older: Sequence[str], after: RowKey | None) -> list[RowKey]:
    """Return the next ids after ``after`` of resources that are not encrypted or that an ``older`` key encrypts."""
    query = sql.SQL("""
        SELECT id, pg_column_size(resource)
        FROM fhir.resource
        WHERE source = ops.current_source()
            AND resource_type = %(type)s
            AND id > %(after)s
            AND resource IS NOT NULL
            AND {outdated}
        ORDER BY id
        LIMIT %(limit)s
    """).format(outdated=sql.SQL(OUTDATED))
    params = {"type": resource_type, "after": after[0] if after else "", "older": list(older), "limit": BATCH_ROWS}
    return _limit_size(conn.execute(query, params))


def find_outdated_rows(conn: Connection, table: str, newest: str, after: RowKey | None) -> list[RowKey]:
    """Return the next ids after ``after`` of resources whose rows in a table are not encrypted with ``newest``."""
    query = sql.SQL("""
        SELECT DISTINCT {key}
        FROM {table}
        WHERE _source = ops.current_source()
            AND {key} > %(after)s
            AND {key_id} IS DISTINCT FROM %(newest)s
        ORDER BY 1
        LIMIT %(limit)s
    """).format(
        key=sql.Identifier(_read_key_column(conn, table)),
        table=sql.Identifier("fhir", table),
        key_id=sql.Identifier(KEY_ID_COLUMN),
    )
    params = {"after": after[0] if after else "", "newest": newest, "limit": _RESOURCES_PER_BATCH}
    return list(conn.execute(query, params))


def find_leftover_rows(conn: Connection, table: str, older: Sequence[str], after: RowKey | None) -> list[RowKey]:
    """Return the next ids after ``after`` of resources whose rows in a table are encrypted with an ``older`` key."""
    query = sql.SQL("""
        SELECT DISTINCT {key}
        FROM {table}
        WHERE _source = ops.current_source()
            AND {key} > %(after)s
            AND {key_id} = ANY(%(older)s)
        ORDER BY 1
        LIMIT %(limit)s
    """).format(
        key=sql.Identifier(_read_key_column(conn, table)),
        table=sql.Identifier("fhir", table),
        key_id=sql.Identifier(KEY_ID_COLUMN),
    )
    params = {"after": after[0] if after else "", "older": list(older), "limit": _RESOURCES_PER_BATCH}
    return list(conn.execute(query, params))


def _read_key_column(conn: Connection, table: str) -> str:
    """Return the column of a view's table that has the id of the row's resource."""
    row = conn.execute("SELECT key_column FROM ops.view_tables WHERE name = %s", [table]).fetchone()
    return str(row[0]) if row else KEY_COLUMN


def find_rows(conn: Connection, table: EncryptedTable, older: Sequence[str], after: RowKey | None) -> list[RowKey]:
    """Return the next keys after ``after`` of rows that are not encrypted or that an ``older`` key encrypts."""
    size = sql.SQL(" + ").join(
        [sql.SQL("coalesce(pg_column_size({}), 0)").format(sql.Identifier(column)) for column in table.contents]
    )
    is_after: sql.Composable = sql.SQL("true")
    if after is not None:
        is_after = sql.SQL("({key}) > ({after})").format(key=table.key_columns, after=_join_literals(after))
    query = sql.SQL("""
        SELECT {key}, {size}
        FROM {table}
        WHERE {is_after}
            AND {outdated}
        ORDER BY {key}
        LIMIT {limit}
    """).format(
        key=table.key_columns,
        size=size,
        table=table.identifier,
        is_after=is_after,
        outdated=sql.SQL(table.outdated),
        limit=sql.Literal(BATCH_ROWS),
    )
    return _limit_size(conn.execute(query, {"older": list(older)}))


def _limit_size(rows: Iterable[tuple[Any, ...]]) -> list[RowKey]:
    """Return the keys of the first rows whose total size is at most BATCH_BYTES, but at least one key.

    The last value of each row is its size in bytes, the others are its key.
    """
    keys: list[RowKey] = []
    total = 0
    for *key, size in rows:
        total += size
        if keys and total > BATCH_BYTES:
            break
        keys.append(tuple(key))
    return keys


# One batch, in the caller's transaction


def lock_resources(
    conn: Connection, resource_type: str, keys: Sequence[RowKey]
) -> tuple[list[tuple[str, str | None, str]], int]:
    """Lock resources until the transaction ends, and skip resources that another transaction has locked.

    Returns the id, the key id and the stored text of each locked resource, and the number of skipped resources.
    """
    params = {"type": resource_type, "ids": [resource_id for (resource_id,) in keys]}
    rows = conn.execute(
        """
        SELECT id, key_id, CASE WHEN key_id IS NULL THEN resource::text ELSE resource #>> '{}' END
        FROM fhir.resource
        WHERE source = ops.current_source()
            AND resource_type = %(type)s
            AND id = ANY(%(ids)s)
            AND resource IS NOT NULL
        ORDER BY id
        FOR UPDATE SKIP LOCKED
        """,
        params,
    ).fetchall()
    if len(rows) == len(keys):
        return rows, 0
    count = conn.execute(
        """
        SELECT count(*)
        FROM fhir.resource
        WHERE source = ops.current_source()
            AND resource_type = %(type)s
            AND id = ANY(%(ids)s)
            AND resource IS NOT NULL
        """,
        params,
    ).fetchone()
    return rows, max(0, count[0] - len(rows)) if count else 0


def encrypt_resources(conn: Session, resource_type: str, resources: Iterable[tuple[str, bytes]]) -> int:
    """Encrypt resources, given as pairs of id and JSON, with the newest key. Their rows in views are not changed.

    Returns the number of updated resources.
    """
    cipher = cipher_of(conn)
    with conn.cursor() as cursor:
        cursor.executemany(
            """
            UPDATE fhir.resource
            SET resource = %s::jsonb, key_id = %s
            WHERE source = ops.current_source() AND resource_type = %s AND id = %s
            """,
            [
                (
                    as_json(
                        cipher.compress_and_encrypt(body, resource_place(conn.source, resource_type, resource_id))
                    ).decode(),
                    cipher.key_id,
                    resource_type,
                    resource_id,
                )
                for resource_id, body in resources
            ],
        )
        return max(0, cursor.rowcount)


def reencrypt_tokens(conn: Session, table: str, older: Sequence[str], keys: Sequence[RowKey]) -> BatchResult:
    """Encrypt the tokens in the rows of a view's table again, for the resources with the ids ``keys``.

    Use it for rows that cannot be rebuilt, because their resource cannot be decrypted or is not stored, or because the
    view was removed.
    """
    cipher = cipher_of(conn)
    target = sql.Identifier("fhir", table)
    key = _read_key_column(conn, table)
    names = [
        name
        for (name,) in conn.execute(
            """
            SELECT attname
            FROM pg_attribute
            WHERE attrelid = format('fhir.%%I', %s::text)::regclass
                AND attnum > 0
                AND NOT attisdropped
                AND atttypid = 'text'::regtype
                AND attname <> ALL(%s)
            ORDER BY attnum
            """,
            [table, [key, KEY_ID_COLUMN, SOURCE_COLUMN]],
        )
    ]
    select = sql.SQL("""
        SELECT ctid, {key}, {columns}
        FROM {table}
        WHERE _source = ops.current_source()
            AND {key} = ANY(%s)
            AND {key_id} = ANY(%s)
        FOR UPDATE SKIP LOCKED
    """).format(
        columns=sql.SQL(", ").join(map(sql.Identifier, names)),
        table=target,
        key=sql.Identifier(key),
        key_id=sql.Identifier(KEY_ID_COLUMN),
    )
    rows = conn.execute(select, [[resource_id for (resource_id,) in keys], list(older)]).fetchall()
    result = BatchResult(0, 0, 0 if rows else len(keys), Counter())
    updates = []
    for ctid, resource_id, *values in rows:
        try:
            tokens = [
                cipher.reencrypt_token(value, value_place(table, name, conn.source, resource_id)) if value else value
                for name, value in zip(names, values, strict=True)
            ]
            updates.append([*tokens, cipher.key_id, ctid])
            result.encrypted += 1
        except EncryptionError as error:
            result.refused[str(error)] += 1
    update = sql.SQL("UPDATE {table} SET {assignments}, {key_id} = %s WHERE ctid = %s").format(
        table=target,
        assignments=sql.SQL(", ").join([sql.SQL("{} = %s").format(sql.Identifier(name)) for name in names]),
        key_id=sql.Identifier(KEY_ID_COLUMN),
    )
    with conn.cursor() as cursor:
        cursor.executemany(update, updates)
    return result


def reencrypt_rows(conn: Session, table: EncryptedTable, older: Sequence[str], keys: Sequence[RowKey]) -> BatchResult:
    """Encrypt the rows with the given keys again. Skip rows that were encrypted with the newest key in the meantime.

    The fingerprints of rows that were not encrypted are replaced by keyed fingerprints.
    """
    cipher = cipher_of(conn)
    contents: Sequence[sql.Composable] = [sql.Identifier(column) for column in table.contents]
    if table.json:
        text = sql.SQL("CASE WHEN key_id IS NULL THEN {0}::text ELSE {0} #>> '{{}}' END")
        contents = [text.format(column) for column in contents]
    select = sql.SQL("""
        SELECT key_id, {key}, {named_by}, {contents}
        FROM {table}
        WHERE ({key}) IN (VALUES {keys})
            AND {outdated}
        FOR UPDATE SKIP LOCKED
    """).format(
        key=table.key_columns,
        named_by=sql.SQL(", ").join(map(sql.Identifier, table.named_by)),
        contents=sql.SQL(", ").join(contents),
        table=table.identifier,
        keys=sql.SQL(", ").join([sql.SQL("({})").format(_join_literals(key)) for key in keys]),
        outdated=sql.SQL(table.outdated),
    )
    rows = conn.execute(select, {"older": list(older)}).fetchall()
    result = BatchResult(0, 0, max(0, len(keys) - len(rows)), Counter())
    updates = []
    keys_from_clear = []
    width, names = len(table.key), len(table.named_by)
    for key_id, *row in rows:
        key, named_by, stored = row[:width], row[width : width + names], row[width + names :]
        try:
            values = [
                _reencrypt_value(value, key_id, table, cipher, place)
                for value, place in zip(stored, table.places(*named_by), strict=True)
            ]
        except EncryptionError as error:
            result.refused[str(error)] += 1
            continue
        updates.append([*values, cipher.key_id, *key])
        result.encrypted += 1
        if key_id is None:
            result.from_clear += 1
            keys_from_clear.append(key[0])
    fingerprints = compute_fingerprints(conn, table.table, keys_from_clear) if keys_from_clear else []
    assignment = sql.SQL("{} = %s::jsonb" if table.json else "{} = %s")
    update = sql.SQL("UPDATE {table} SET {assignments}, key_id = %s WHERE ({key}) = ({values})").format(
        table=table.identifier,
        assignments=sql.SQL(", ").join([assignment.format(sql.Identifier(column)) for column in table.contents]),
        key=table.key_columns,
        values=sql.SQL(", ").join([sql.Placeholder()] * width),
    )
    with conn.cursor() as cursor:
        cursor.executemany(update, updates)
        if fingerprints:
            replace_fingerprints(conn, table.table, fingerprints)
    return result


def _reencrypt_value(stored: Any, key_id: str | None, table: EncryptedTable, cipher: Cipher, place: Place) -> Any:
    if stored is None:
        return None
    if not table.json:
        return cipher.reencrypt(bytes(stored), place)
    return as_json(cipher.compress_and_encrypt(decrypt_text(stored, key_id, cipher, place), place)).decode()


def _join_literals(key: RowKey) -> sql.Composed:
    return sql.SQL(", ").join(map(sql.Literal, key))
