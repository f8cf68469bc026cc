"""The patients in order, by page or by what they are known by; page 50,000 costs what page 1 does.

Of all patients every ``STRIDE``-th id is remembered for some seconds. A page begins at the remembered id before it,
so that Postgres skips STRIDE rows of an index at most, and ``total`` is known without counting.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from threading import Lock, Thread
from time import monotonic

import psycopg
from psycopg import sql

from fhir_assets.privacy.encryption import Cipher
from fhir_assets.warehouse.postgres import resources
from fhir_assets.warehouse.postgres.db.connections import Connection, OpenSession, Session, cipher_of
from fhir_assets.warehouse.postgres.resources import StoredResource

STRIDE = 500
FRESH_SECONDS = 30.0
"""How old the remembered ids may be before they are read again; those who ask meanwhile get the old ones."""

_MISSING = (psycopg.errors.UndefinedTable, psycopg.errors.UndefinedColumn)
"""Before the first load there is no table; before the load after an upgrade a column may be missing."""


@dataclass(frozen=True, slots=True)
class PatientSearch:
    """What a patient is known by; every field that is given must be equal. A name is so in capitals and small letters
    alike, and the first given name, or all of them together.
    """

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


class PatientDirectory:
    """Pages of patients. One for a process; ``connect`` gives the connection that its remembered ids are read with."""

    def __init__(self, connect: OpenSession, *, fresh_seconds: float = FRESH_SECONDS) -> None:
        self._connect = connect
        self._fresh = fresh_seconds
        self._marks: _Marks | None = None
        self._lock = Lock()
        self._reading = False

    def page(self, conn: Connection, number: int, size: int, *, after: str | None = None) -> Page:
        """The page ``number`` (from 1) of all patients, in the order of ids; or the one that begins after an id: a
        walk from id to id meets everybody once, whoever comes or goes meanwhile.
        """
        marks = self._current(conn)
        skip = (number - 1) * size
        if not marks.total:
            return Page(0, ())
        if after is not None:
            return Page(marks.total, _following(conn, sql.SQL("id > %s"), [after], size, 0))
        if skip >= marks.total:
            return Page(marks.total, ())
        begin = marks.ids[skip // STRIDE]
        return Page(marks.total, _following(conn, sql.SQL("id >= %s"), [begin], size, skip % STRIDE))

    def find(self, conn: Session, search: PatientSearch, number: int, size: int, *, after: str | None = None) -> Page:
        """The page ``number`` (from 1), or the one after an id, of those known by ``search``: found by index, also
        where it is sealed.
        """
        for folded in (True, False):
            where, params = _condition(search, cipher_of(conn), folded=folded)
            try:
                with conn.transaction():
                    count = conn.execute(sql.SQL("SELECT count(*) FROM fhir.patient WHERE {}").format(where), params)
                    (total,) = count.fetchone() or (0,)
                    if after is not None:
                        where, params, number = where + sql.SQL(" AND id > %s"), [*params, after], 1
                    return Page(total, _following(conn, where, params, size, (number - 1) * size) if total else ())
            except _MISSING:
                continue
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


def _following(
    conn: Connection, where: sql.Composable, params: Sequence[object], size: int, skip: int
) -> tuple[str, ...]:
    query = sql.SQL("SELECT id FROM fhir.patient WHERE {} ORDER BY id LIMIT %s OFFSET %s").format(where)
    return tuple(row[0] for row in conn.execute(query, [*params, size, skip]).fetchall())


def _condition(search: PatientSearch, cipher: Cipher, *, folded: bool) -> tuple[sql.Composed, list[object]]:
    """The condition of a search. ``folded``: names in small letters too, which older tables lack."""
    terms: list[sql.Composable] = []
    params: list[object] = []
    for each in fields(search):
        value = getattr(search, each.name)
        if value is None:
            continue
        ways = [(f"{each.name}_index" if cipher.on else each.name, value)]
        if folded and each.name in ("given", "family"):
            ways.append((f"{each.name}_search", value.strip().lower()))
        terms.append(
            sql.SQL("({})").format(
                sql.SQL(" OR ").join(sql.SQL("{} = %s").format(sql.Identifier(name)) for name, _ in ways)
            )
        )
        params += [cipher.index(known) if cipher.on else known for _, known in ways]
    return sql.SQL(" AND ").join(terms), params


def _read(conn: Connection) -> _Marks:
    try:
        with conn.transaction():
            rows = conn.execute(
                "SELECT n, id FROM (SELECT id, row_number() OVER (ORDER BY id) AS n, count(*) OVER () AS total"
                " FROM fhir.patient) numbered WHERE n %% %s = 1 OR n = total ORDER BY n",
                [STRIDE],
            ).fetchall()
    except _MISSING:
        rows = []
    total = rows[-1][0] if rows else 0
    return _Marks(monotonic(), total, tuple(identity for n, identity in rows if n % STRIDE == 1))


def read_compartments(conn: Session, resource_type: str, ids: Sequence[str]) -> list[StoredResource]:
    """The resources of a type in the compartments of some patients, in the order of ids. Raises SealingError."""
    rows = conn.execute(
        sql.SQL(
            "SELECT {} FROM fhir.resource WHERE resource_type = %s AND patients[1] = ANY(%s)"
            " AND resource IS NOT NULL ORDER BY id"
        ).format(resources.COLUMNS),
        [resource_type, list(ids)],
    ).fetchall()
    cipher = cipher_of(conn)
    return [resources.opened(row, cipher) for row in rows]
