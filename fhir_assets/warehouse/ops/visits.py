"""The ledger of received visits: ``ops.visits``, ``ops.visit_persons``, ``ops.visit_files`` and ``ops.visit_posts``.

The ledger holds persons and visits by id and keyed hash, the counts of each file, and each list posted to the API.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime

from psycopg import sql
from psycopg.rows import class_row

from fhir_assets.warehouse.ops.landing_file_names import IS_NAMED, label_names
from fhir_assets.warehouse.postgres.db import advisory_locks
from fhir_assets.warehouse.postgres.db.connections import Connection, Session


@dataclass(frozen=True, slots=True)
class Person:
    """A person in the ledger: ``content`` is the keyed hash of the newest data, ``as_of`` the time of that data.

    ``name`` and ``birth`` are the keyed hashes of the name and the birth date, empty if they are not known.
    """

    id: str
    version: int
    content: bytes
    as_of: datetime
    name: bytes = b""
    birth: bytes = b""

    def contradicts(self, other: "Person") -> bool:
        """Return whether both the name and the birth date of another person with the same number differ."""
        known = self.name and self.birth and other.name and other.birth
        return bool(known) and self.name != other.name and self.birth != other.birth


@dataclass(frozen=True, slots=True)
class KnownVisit:
    """A visit in the ledger: ``content`` is the keyed hash of its data, ``person`` the id of the Patient."""

    id: str
    person: str
    content: bytes


@dataclass(slots=True)
class VisitFileCounts:
    """The counts of a file of visits.

    - ``patients``: new persons
    - ``updates``: known persons with new data
    - ``outdated``: persons for whom a newer file has other data
    - ``visits``: new visits
    - ``repeats``: known visits with the same data
    - ``conflicts``: known visits with other data, and record numbers with another name and another birth date
    - ``rows``: resources written to raw
    - ``rejected``: rows of the file that became dead letters
    """

    patients: int = 0
    updates: int = 0
    outdated: int = 0
    visits: int = 0
    repeats: int = 0
    conflicts: int = 0
    rows: int = 0
    rejected: int = 0


def lock_ledger(conn: Connection) -> None:
    """Lock the ledger until this transaction ends. Waits while another transaction holds the lock."""
    conn.execute("SELECT pg_advisory_xact_lock(%s)", [advisory_locks.VISIT_LEDGER])


def find_persons(conn: Connection, ids: Sequence[str]) -> dict[str, Person]:
    """Return the persons among ``ids`` that the ledger holds, by id.

    If another channel received the person later, ``as_of`` is the time of that input, and the hashes are empty, so that
    they differ from those of any data.
    """
    rows = conn.execute(
        """
        SELECT
            id, version, CASE WHEN at > as_of THEN '' ELSE content END, greatest(as_of, at),
            CASE WHEN at > as_of THEN '' ELSE name END, CASE WHEN at > as_of THEN '' ELSE birth END
        FROM ops.visit_persons
        LEFT JOIN ops.visit_persons_elsewhere USING (id, source)
        WHERE source = ops.current_source() AND id = ANY(%s)
        """,
        [list(ids)],
    )
    return {
        identity: Person(identity, version, bytes(content), as_of, bytes(name), bytes(birth))
        for identity, version, content, as_of, name, birth in rows
    }


def record_elsewhere(conn: Connection, ids: Iterable[str], at: datetime) -> None:
    """Record that these Patients were received at time ``at`` through a channel other than files of visits."""
    conn.execute(
        """
        INSERT INTO ops.visit_persons_elsewhere AS known (id, at)
        SELECT id, %s
        FROM unnest(%s::text[]) AS id
        ON CONFLICT (id, source) DO UPDATE SET at = greatest(known.at, excluded.at)
        """,
        [at, sorted(set(ids))],
    )


def find_visits(conn: Connection, ids: Sequence[str]) -> dict[str, KnownVisit]:
    """Return the visits among ``ids`` that the ledger holds, by id."""
    rows = conn.execute(
        "SELECT id, person, content FROM ops.visits WHERE source = ops.current_source() AND id = ANY(%s)", [list(ids)]
    )
    return {identity: KnownVisit(identity, person, bytes(content)) for identity, person, content in rows}


def record(conn: Connection, origin: str, persons: Sequence[Person], visits: Sequence[KnownVisit]) -> None:
    """Store new or changed persons, and new visits. Call it in the transaction that called ``lock_ledger``."""
    conn.execute(
        """
        INSERT INTO ops.visit_persons AS known (id, version, content, as_of, name, birth, origin)
        SELECT *, %s
        FROM unnest(%s::text[], %s::integer[], %s::bytea[], %s::timestamptz[], %s::bytea[], %s::bytea[])
        ON CONFLICT (id, source) DO UPDATE SET
            version = excluded.version,
            content = excluded.content,
            as_of = excluded.as_of,
            name = excluded.name,
            birth = excluded.birth,
            origin = excluded.origin
        """,
        [
            origin,
            [person.id for person in persons],
            [person.version for person in persons],
            [person.content for person in persons],
            [person.as_of for person in persons],
            [person.name for person in persons],
            [person.birth for person in persons],
        ],
    )
    conn.execute(
        """
        INSERT INTO ops.visits (id, person, content, origin)
        SELECT *, %s
        FROM unnest(%s::text[], %s::text[], %s::bytea[])
        """,
        [
            origin,
            [visit.id for visit in visits],
            [visit.person for visit in visits],
            [visit.content for visit in visits],
        ],
    )


def remove_deleted(conn: Connection, resource_type: str, ids: Iterable[str]) -> None:
    """Delete the persons or visits of deleted Patients or Encounters, so that their next row counts as new."""
    table = {"Patient": "visit_persons", "Encounter": "visits"}.get(resource_type)
    if table:
        conn.execute(sql.SQL("DELETE FROM {} WHERE id = ANY(%s)").format(sql.Identifier("ops", table)), [list(ids)])


def record_file(conn: Connection, origin: str, received_as: str, counts: VisitFileCounts) -> None:
    """Record the counts of the file ``origin``, which was received as part of the origin ``received_as``."""
    values = {"origin": origin, "received_as": received_as, **asdict(counts)}
    conn.execute(
        sql.SQL("INSERT INTO ops.visit_files ({}) VALUES ({})").format(
            sql.SQL(", ").join(map(sql.Identifier, values)), sql.SQL(", ").join(map(sql.Placeholder, values))
        ),
        values,
    )


def find_files(conn: Connection, origins: Sequence[str]) -> dict[str, tuple[str, VisitFileCounts]]:
    """Return ``(received_as, counts)`` of the received files among ``origins``, by origin. See ``record_file``."""
    columns = sql.SQL(", ").join(sql.Identifier(field.name) for field in fields(VisitFileCounts))
    query = sql.SQL(
        "SELECT origin, received_as, {} FROM ops.visit_files WHERE source = ops.current_source() AND origin = ANY(%s)"
    ).format(columns)
    rows = conn.execute(query, [list(origins)]).fetchall()
    return {origin: (received_as, VisitFileCounts(*counts)) for origin, received_as, *counts in rows}


def find_origins(conn: Connection, received_as: str) -> list[str]:
    """Return an origin, and those of the files that were received as part of it."""
    rows = conn.execute(
        "SELECT origin FROM ops.visit_files WHERE source = ops.current_source() AND received_as = %s", [received_as]
    )
    return [received_as, *(origin for (origin,) in rows)]


@dataclass(frozen=True, slots=True)
class VisitPost:
    """A list of visits that was posted to the API: ``rejected`` of its ``records`` were refused immediately."""

    task_id: str
    zone: str
    csv_filename: str
    records: int
    rejected: int
    posted_by: str


@dataclass(frozen=True, slots=True)
class VisitFileState:
    """The state of a file of visits.

    ``status`` is that of the landing zone, None before the file was listed there; ``waiting`` is the number of its
    windows that are not loaded yet.
    """

    status: str | None
    error: str | None
    known_before: bool
    dead_letters: int
    run_id: str | None
    waiting: int
    counts: VisitFileCounts
    origin: str | None = None
    """The origin of the file's dead letters; None before it was received."""


def record_post(conn: Connection, post: VisitPost) -> None:
    """Record a posted list."""
    names = [field.name for field in fields(VisitPost)]
    conn.execute(
        sql.SQL("INSERT INTO ops.visit_posts ({}) VALUES ({})").format(
            sql.SQL(", ").join(map(sql.Identifier, names)), sql.SQL(", ").join(map(sql.Placeholder, names))
        ),
        asdict(post),
    )


def get_post(conn: Connection, task_id: str) -> VisitPost | None:
    """Return the posted list of a task, None for an unknown id."""
    columns = sql.SQL(", ").join(sql.Identifier(field.name) for field in fields(VisitPost))
    with conn.cursor(row_factory=class_row(VisitPost)) as cursor:
        query = sql.SQL("SELECT {} FROM ops.visit_posts WHERE source = ops.current_source() AND task_id = %s").format(
            columns
        )
        return cursor.execute(query, [task_id]).fetchone()


def get_file_state(conn: Session, zone: str, name: str) -> VisitFileState:
    """Return the state of a file of a zone."""
    query = sql.SQL("""
        SELECT status, error, known_before, coalesce(rejected, 0), run_id, 'landing:' || sha256
        FROM ops.landing_files
        WHERE source = ops.current_source()
            AND zone = %(zone)s AND {is_named}
    """).format(is_named=IS_NAMED)
    row = conn.execute(query, {"zone": zone, **label_names(conn, zone, [name])}).fetchone()
    if row is None:
        return VisitFileState(None, None, False, 0, None, 0, VisitFileCounts())
    status, error, known_before, rejected, run_id, origin = row
    received_as, counts = find_files(conn, [origin or ""]).get(origin or "", (origin, VisitFileCounts()))
    (waiting,) = conn.execute(
        "SELECT count(*) FROM ops.received WHERE source = ops.current_source() AND origin = %s AND loaded_at IS NULL",
        [received_as],
    ).fetchone() or (0,)
    # A file with known_before has the content of an earlier file, whose counts are not repeated.
    return VisitFileState(
        status, error, known_before, rejected, run_id, waiting, VisitFileCounts() if known_before else counts, origin
    )
