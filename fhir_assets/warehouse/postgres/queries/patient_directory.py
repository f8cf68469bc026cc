"""Pages of all patients, or of the patients that match a search, in the order of their ids.

The id of every ``STRIDE``-th patient and the total number are cached for some seconds. A page is read from the last
cached id before it, so that Postgres skips at most STRIDE rows of an index: page 50,000 takes as long as page 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from threading import Lock, Thread
from time import monotonic

import psycopg
from psycopg import sql

from fhir_assets.privacy.consent import ConsentGate
from fhir_assets.privacy.encryption import Cipher
from fhir_assets.warehouse.ops.withheld_conditions import build_withheld_condition
from fhir_assets.warehouse.postgres import resources
from fhir_assets.warehouse.postgres.db.connections import Connection, OpenSession, Session, cipher_of
from fhir_assets.warehouse.postgres.resources import StoredResource

STRIDE = 500
FRESH_SECONDS = 30.0
"""The age in seconds at which the cached ids are read again, in the background."""

SSN_SYSTEM = "http://hl7.org/fhir/sid/us-ssn"

_TABLE_NOT_READY = (psycopg.errors.UndefinedTable, psycopg.errors.UndefinedColumn)
"""Errors of a database before its first load, or after an upgrade, while its tables lack a column."""


@dataclass(frozen=True, slots=True)
class PatientSearch:
    """A search for patients. Every field that is not None must match.

    Names match regardless of case. ``given`` matches the first given name, or all given names joined by spaces.
    """

    mrn: str | None = None
    given: str | None = None
    family: str | None = None
    ssn: str | None = None
    """A US social security number, with or without hyphens."""

    def __bool__(self) -> bool:
        return any(getattr(self, field.name) is not None for field in fields(self))


@dataclass(frozen=True, slots=True)
class PatientPage:
    """The ids of the patients on a page, and the total number of patients."""

    total: int
    ids: tuple[str, ...]

    @classmethod
    def of(cls, patient_id: str | None) -> "PatientPage":
        """Return a page of one patient, or of none."""
        return cls(0, ()) if patient_id is None else cls(1, (patient_id,))


@dataclass(frozen=True, slots=True)
class _CachedIds:
    read_at: float
    total: int
    ids: tuple[str, ...]


class PatientDirectory:
    """Pages of patients. A process needs one instance; ``connect`` opens the session that refreshes the cached ids."""

    def __init__(self, connect: OpenSession, *, fresh_seconds: float = FRESH_SECONDS) -> None:
        self._connect = connect
        self._fresh = fresh_seconds
        self._cached: _CachedIds | None = None
        self._lock = Lock()
        self._refreshing = False

    def page(self, conn: Connection, number: int, size: int, *, after: str | None = None) -> PatientPage:
        """Return page ``number`` (from 1) of all patients. With ``after``, return the page that follows this id.

        An iteration with ``after`` returns each patient once, even if patients are added or deleted during it.
        """
        cached = self._get_cached(conn)
        skip = (number - 1) * size
        if not cached.total:
            return PatientPage(0, ())
        if after is not None:
            return PatientPage(cached.total, _read_page(conn, sql.SQL("id > %s"), [after], size, 0))
        if skip >= cached.total:
            return PatientPage(cached.total, ())
        first_id = cached.ids[skip // STRIDE]
        return PatientPage(cached.total, _read_page(conn, sql.SQL("id >= %s"), [first_id], size, skip % STRIDE))

    def find(
        self, conn: Session, search: PatientSearch, number: int, size: int, *, after: str | None = None
    ) -> PatientPage:
        """Return page ``number`` (from 1) of the patients that match. With ``after``, return the page after this id.

        Encrypted columns are searched by their blind indexes.
        """
        for fold_case in (True, False):
            where, params = _build_condition(search, cipher_of(conn), fold_case=fold_case)
            try:
                with conn.transaction():
                    count = conn.execute(sql.SQL("SELECT count(*) FROM fhir.patient WHERE {}").format(where), params)
                    (total,) = count.fetchone() or (0,)
                    if after is not None:
                        where, params, number = where + sql.SQL(" AND id > %s"), [*params, after], 1
                    return PatientPage(
                        total, _read_page(conn, where, params, size, (number - 1) * size) if total else ()
                    )
            except _TABLE_NOT_READY:
                continue
        return PatientPage(0, ())

    def _get_cached(self, conn: Connection) -> _CachedIds:
        cached = self._cached
        if cached is None or not cached.total:
            self._cached = cached = _read_ids(conn)
        elif monotonic() - cached.read_at > self._fresh:
            self._refresh_in_background()
        return cached

    def _refresh_in_background(self) -> None:
        with self._lock:
            if self._refreshing:
                return
            self._refreshing = True
        Thread(target=self._refresh, name="patient-directory", daemon=True).start()

    def _refresh(self) -> None:
        try:
            with self._connect() as conn:
                self._cached = _read_ids(conn)
        finally:
            self._refreshing = False


def _read_page(
    conn: Connection, where: sql.Composable, params: Sequence[object], size: int, skip: int
) -> tuple[str, ...]:
    query = sql.SQL("""
        SELECT id
        FROM fhir.patient
        WHERE {where}
        ORDER BY id
        LIMIT %s OFFSET %s
    """).format(where=where)
    return tuple(row[0] for row in conn.execute(query, [*params, size, skip]).fetchall())


def _build_condition(search: PatientSearch, cipher: Cipher, *, fold_case: bool) -> tuple[sql.Composed, list[object]]:
    """Return the condition of a search and its parameters.

    ``fold_case`` also compares lower-case names, in columns that older tables lack.
    """
    terms: list[sql.Composable] = []
    params: list[object] = []
    for field in fields(search):
        value = getattr(search, field.name)
        if value is None or field.name == "ssn":
            continue
        comparisons = [(f"{field.name}_index" if cipher.encrypts else field.name, value)]
        if fold_case and field.name in ("given", "family"):
            comparisons.append((f"{field.name}_search", value.strip().lower()))
        terms.append(
            sql.SQL("({})").format(
                sql.SQL(" OR ").join(sql.SQL("{} = %s").format(sql.Identifier(name)) for name, _ in comparisons)
            )
        )
        params += [cipher.index(text) if cipher.encrypts else text for _, text in comparisons]
    if search.ssn is not None:
        # The index of this table serves every identifier; fhir.patient has none for the SSN alone.
        terms.append(
            sql.SQL("""
                id IN (
                    SELECT patient_key
                    FROM fhir.patient_identifier
                    WHERE _source = ops.current_source() AND system = %s AND {} = ANY(%s)
                )
            """).format(sql.Identifier("value_index" if cipher.encrypts else "value"))
        )
        digits = search.ssn.replace("-", "")
        forms = [digits, f"{digits[:3]}-{digits[3:5]}-{digits[5:]}"]
        params += [SSN_SYSTEM, [cipher.index(form) for form in forms] if cipher.encrypts else forms]
    return sql.SQL(" AND ").join(terms), params


def _read_ids(conn: Connection) -> _CachedIds:
    try:
        with conn.transaction():
            rows = conn.execute(
                """
                SELECT n, id
                FROM (
                    SELECT id, row_number() OVER (ORDER BY id) AS n, count(*) OVER () AS total
                    FROM fhir.patient
                ) numbered
                WHERE n %% %s = 1 OR n = total
                ORDER BY n
                """,
                [STRIDE],
            ).fetchall()
    except _TABLE_NOT_READY:
        rows = []
    total = rows[-1][0] if rows else 0
    return _CachedIds(monotonic(), total, tuple(patient_id for n, patient_id in rows if n % STRIDE == 1))


def read_compartments(
    conn: Session, resource_type: str, ids: Sequence[str], consent_gate: ConsentGate
) -> list[StoredResource]:
    """Return the resources of a type in the compartments of patients, in the order of ids.

    Resources that consent withholds are left out, even if the decision is not applied to the tables yet. Raises
    EncryptionError.
    """
    rows = conn.execute(
        sql.SQL("""
            SELECT {columns}
            FROM fhir.resource
            WHERE source = ops.current_source()
                AND resource_type = %s
                AND patients[1] = ANY(%s)
                AND resource IS NOT NULL
                AND {withheld} IS NOT TRUE
            ORDER BY id
        """).format(columns=resources.COLUMNS, withheld=build_withheld_condition(consent_gate, "resource")),
        [resource_type, list(ids)],
    ).fetchall()
    return [resources.decrypt_row(conn, row) for row in rows]
