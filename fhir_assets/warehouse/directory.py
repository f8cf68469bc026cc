"""The patients in order, by page or by what they are known by; page 50,000 costs what page 1 does.

Of all patients every ``STRIDE``-th id is remembered for some seconds. A page begins at the remembered id before it,
so that Postgres skips STRIDE rows of an index at most, and ``total`` is known without counting.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from threading import Lock, Thread
from time import monotonic

import psycopg
from psycopg import sql

from fhir_assets.warehouse import resources
from fhir_assets.warehouse.database import Connection, sealing_of
from fhir_assets.warehouse.resources import StoredResource

STRIDE = 500
FRESH_SECONDS = 30.0
"""How old the remembered ids may be before they are read again; those who ask meanwhile get the old ones."""

_MISSING = (psycopg.errors.UndefinedTable, psycopg.errors.UndefinedColumn)
"""Before the first load there is no table; before the load after an upgrade a column may be missing."""


@dataclass(frozen=True, slots=True)
class Search:
    """What a patient is known by; every field that is given must be equal, letter by letter."""

    mrn: str | None = None
    given: str | None = None
    family: str | None = None

    def __bool__(self) -> bool:
        return any(getattr(self, each.name) is not None for each in fields(self))


@dataclass(frozen=True, slots=True)
class Page:
    """The ids of a page, and how many patients there are in all."""

    total: int
    ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Marks:
    at: float
    total: int
    ids: tuple[str, ...]


class Directory:
    """Pages of patients. One for a process; ``connect`` gives the connection that its remembered ids are read with."""

    def __init__(self, connect: Callable[[], Connection], *, fresh_seconds: float = FRESH_SECONDS) -> None:
        self._connect = connect
        self._fresh = fresh_seconds
        self._marks: _Marks | None = None
        self._lock = Lock()
        self._reading = False

    def page(self, conn: Connection, number: int, size: int) -> Page:
        """The page ``number`` (from 1) of all patients, in the order of ids."""
        marks = self._current(conn)
        skip = (number - 1) * size
        if skip >= marks.total:
            return Page(marks.total, ())
        begin = marks.ids[skip // STRIDE]
        rows = conn.execute(
            "SELECT id FROM fhir.patient WHERE id >= %s ORDER BY id LIMIT %s OFFSET %s", [begin, size, skip % STRIDE]
        ).fetchall()
        return Page(marks.total, tuple(row[0] for row in rows))

    def find(self, conn: Connection, search: Search, number: int, size: int) -> Page:
        """The page ``number`` (from 1) of those known by ``search``: found by index, also where it is sealed."""
        sealing = sealing_of(conn)
        terms, params = [], []
        for each in fields(search):
            value = getattr(search, each.name)
            if value is not None:
                name, known = (f"{each.name}_index", sealing.index(value)) if sealing.on else (each.name, value)
                terms.append(sql.SQL("{} = %s").format(sql.Identifier(name)))
                params.append(known)
        where = sql.SQL(" AND ").join(terms)
        query = sql.SQL("SELECT id, count(*) OVER () FROM fhir.patient WHERE {} ORDER BY id LIMIT %s OFFSET %s")
        skip = (number - 1) * size
        try:
            rows = conn.execute(query.format(where), [*params, size, skip]).fetchall()
            if rows or not skip:
                return Page(rows[0][1] if rows else 0, tuple(row[0] for row in rows))
            count = conn.execute(sql.SQL("SELECT count(*) FROM fhir.patient WHERE {}").format(where), params).fetchone()
            return Page(count[0] if count else 0, ())
        except _MISSING:
            conn.rollback()
            return Page(0, ())

    def _current(self, conn: Connection) -> _Marks:
        marks = self._marks
        if marks is None or not marks.total:
            self._marks = marks = _read(conn)
        elif monotonic() - marks.at > self._fresh:
            self._read_aside()
        return marks

    def _read_aside(self) -> None:
        with self._lock:
            if self._reading:
                return
            self._reading = True
        Thread(target=self._read_again, name="directory", daemon=True).start()

    def _read_again(self) -> None:
        try:
            with self._connect() as conn:
                self._marks = _read(conn)
        finally:
            self._reading = False


def _read(conn: Connection) -> _Marks:
    try:
        rows = conn.execute(
            "SELECT n, id FROM (SELECT id, row_number() OVER (ORDER BY id) AS n, count(*) OVER () AS total"
            " FROM fhir.patient) numbered WHERE n %% %s = 1 OR n = total ORDER BY n",
            [STRIDE],
        ).fetchall()
    except _MISSING:
        conn.rollback()
        rows = []
    total = rows[-1][0] if rows else 0
    return _Marks(monotonic(), total, tuple(identity for n, identity in rows if n % STRIDE == 1))


def of_patients(conn: Connection, resource_type: str, ids: Sequence[str]) -> list[StoredResource]:
    """The resources of a type in the compartments of some patients, in the order of ids. Raises SealingError."""
    rows = conn.execute(
        sql.SQL(
            "SELECT {} FROM fhir.resource WHERE resource_type = %s AND patients[1] = ANY(%s)"
            " AND resource IS NOT NULL ORDER BY id"
        ).format(resources.COLUMNS),
        [resource_type, list(ids)],
    ).fetchall()
    sealing = sealing_of(conn)
    return [resources.opened(row, sealing) for row in rows]
