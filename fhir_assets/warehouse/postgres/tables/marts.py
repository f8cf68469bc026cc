"""The marts: SQL views of ``sql/marts`` over the tables of ViewDefinitions, in schema ``marts``.

A mart exists as soon as its tables exist. It is dropped before a column that it may read is dropped, and created again
afterwards, so that it never prevents a change of a table. Views that users create, on a mart or in this schema, are not
changed: a mart whose name a relation of a user has is refused.

The first comment lines of a file describe the view; a line ``-- name: …`` describes a column.
"""

import hashlib
import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache

import psycopg
from psycopg import sql

from fhir_assets.warehouse.postgres.db import roles
from fhir_assets.warehouse.postgres.db.connections import Connection
from fhir_assets.warehouse.postgres.db.schema_state import sql_folder

SCHEMA = "marts"

_TABLE = re.compile(r"\bfhir\.([a-z][a-z0-9_]*)")
_COLUMN_COMMENT = re.compile(r"([a-z][a-z0-9_]*): (.+)")


@dataclass(frozen=True, slots=True)
class Mart:
    """A view: its query, the tables of schema ``fhir`` that it reads, and its comments."""

    name: str
    query: str
    tables: frozenset[str]
    description: str
    columns: tuple[tuple[str, str], ...]
    """The name and the description of each computed column."""

    @property
    def fingerprint(self) -> str:
        """A hash of the query and the comments."""
        text = repr((self.query, self.description, self.columns))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@cache
def read_marts() -> tuple[Mart, ...]:
    """Return the marts of ``sql/marts``, in the order of their names."""
    return tuple(parse_mart(path.stem, path.read_text()) for path in sorted((sql_folder() / "marts").glob("*.sql")))


def parse_mart(name: str, text: str) -> Mart:
    """Return the mart in the text of a file."""
    comments = [line.removeprefix("--").strip() for line in text.splitlines() if line.startswith("--")]
    query = "\n".join(line for line in text.splitlines() if not line.startswith("--")).strip().rstrip(";")
    columns = tuple((found[1], found[2]) for line in comments if (found := _COLUMN_COMMENT.fullmatch(line)))
    description = " ".join(line for line in comments if not _COLUMN_COMMENT.fullmatch(line))
    return Mart(name, query, frozenset(_TABLE.findall(query)), description, columns)


def drop_marts_of(conn: Connection, table: str, *, cascade: bool) -> None:
    """Drop the marts that read a table, before a column of the table is dropped.

    ``cascade`` also drops relations that depend on the marts; without it, psycopg's DependentObjectsStillExist is
    raised if there are any.
    """
    own = roles.list_own_marts(conn)
    for mart in read_marts():
        if table in mart.tables and mart.name in own:
            drop = "DROP VIEW IF EXISTS {} CASCADE" if cascade else "DROP VIEW IF EXISTS {}"
            conn.execute(sql.SQL(drop).format(sql.Identifier(SCHEMA, mart.name)))


def find_outdated(
    conn: Connection, changed_tables: Collection[str] = (), *, retry_refused: bool = False
) -> list[tuple[Mart, bool]]:
    """Return the marts to create, each with whether an earlier form of it exists.

    A mart is returned if its tables exist and if it is missing, has changed, or reads one of ``changed_tables``. If the
    current form of a mart could not be created, it is returned again only after a table has changed, if somebody has
    dropped its earlier form, or with ``retry_refused``.
    """
    rows = conn.execute("SELECT name, definition, refused IS NOT NULL FROM ops.marts").fetchall()
    stored = {name: (definition, refused) for name, definition, refused in rows}
    own = roles.list_own_marts(conn)
    tables = _list_tables(conn)
    outdated = []
    for mart in read_marts():
        definition, refused = stored.get(mart.name, ("", False))
        exists = mart.name in own
        is_current = definition == _stamp(mart, exists=exists) and (exists or refused)
        is_final = is_current and not (refused and retry_refused)
        if mart.tables <= tables and not (is_final and mart.tables.isdisjoint(changed_tables)):
            outdated.append((mart, exists))
    return outdated


def _stamp(mart: Mart, *, exists: bool) -> str:
    """Return what is recorded as the definition of a mart. ``roles.list_own_marts`` reads whether it exists."""
    return f"{mart.fingerprint}{'' if exists else '!'}"


def refresh(conn: Connection, changed_tables: Collection[str] = (), *, retry_refused: bool = False) -> None:
    """Create the marts that ``find_outdated`` returns. Callers hold the lock of the schema.

    ``find_refused`` returns those that could not be created: a table of the deployment's own ViewDefinition lacks a
    column, a view of a user depends on the earlier form of the mart, or a relation of a user has its name.
    """
    for mart, exists in find_outdated(conn, changed_tables, retry_refused=retry_refused):
        reason = None
        try:
            with conn.transaction():
                _create(conn, mart, exists=exists)
        except psycopg.errors.DependentObjectsStillExist as error:
            dependents = "; ".join((error.diag.message_detail or "").splitlines())
            reason = f"it is unchanged, because {dependents or 'another relation depends on it'}"
        except psycopg.errors.DuplicateTable:
            reason = (
                "a relation of this name exists that fhir_assets did not create: rename it, then run "
                "`fhir-assets migrate`"
            )
        except psycopg.ProgrammingError as error:
            reason = error.diag.message_primary or type(error).__name__
        conn.execute(
            """
            INSERT INTO ops.marts (name, definition, refused)
            VALUES (%s, %s, %s)
            ON CONFLICT (name) DO UPDATE SET
                definition = excluded.definition,
                refused = excluded.refused,
                applied_at = now()
            """,
            [mart.name, _stamp(mart, exists=exists or reason is None), reason],
        )


def find_refused(conn: Connection) -> dict[str, str]:
    """Return the marts whose current form could not be created, each with the reason."""
    rows = conn.execute(
        """
        SELECT name, refused
        FROM ops.marts
        WHERE refused IS NOT NULL
        ORDER BY name
        """
    ).fetchall()
    known = {mart.name for mart in read_marts()}
    return {name: reason for name, reason in rows if name in known}


def _create(conn: Connection, mart: Mart, *, exists: bool) -> None:
    view = sql.Identifier(SCHEMA, mart.name)
    if exists:
        conn.execute(sql.SQL("DROP VIEW {}").format(view))
    query = sql.SQL(mart.query)
    conn.execute(sql.SQL("CREATE VIEW {} AS {}").format(view, query))
    conn.execute(sql.SQL("COMMENT ON VIEW {} IS {}").format(view, sql.Literal(mart.description)))
    for name, description in mart.columns:
        column = sql.Identifier(SCHEMA, mart.name, name)
        conn.execute(sql.SQL("COMMENT ON COLUMN {} IS {}").format(column, sql.Literal(description)))
    roles.grant_mart_rights(conn, [mart.name])


def _list_tables(conn: Connection) -> frozenset[str]:
    rows = conn.execute(
        """
        SELECT relname
        FROM pg_class
        WHERE relnamespace = 'fhir'::regnamespace
            AND relkind IN ('r', 'p')
        """
    )
    return frozenset(name for (name,) in rows)
