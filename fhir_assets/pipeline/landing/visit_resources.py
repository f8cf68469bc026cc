"""Turns the rows of visit files into FHIR resources: a Patient for each MRN, an Encounter for each visit account
number.

The ledger (``warehouse/ops/visits.py``) contains hashes of all earlier rows, so that only new visits and new or changed
persons become resources. It is written in the transaction that records the file as received: after a crash the ledger
is unchanged and the file is received again.

If files contain different data of a person, the newest file wins, regardless of the order of arrival. Within a file the
last row wins. If both the name and the birth date of a row differ from those of the person with its record number, the
row is taken for another person's, and becomes a dead letter.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

import orjson

from fhir_assets.fhir.files.formats import FileItem
from fhir_assets.fhir.intake import resources
from fhir_assets.fhir.intake.visits_csv import Visit
from fhir_assets.fhir.record import Record, RejectedInput
from fhir_assets.privacy.encryption import Cipher
from fhir_assets.warehouse.ops import visits
from fhir_assets.warehouse.ops.visits import KnownVisit, Person, VisitFileCounts
from fhir_assets.warehouse.postgres.db.connections import Session, cipher_of

CONFLICT = "visit-conflict"
"""The rule of dead letters for visits whose account number is already used by a visit with other content."""

PERSON_CONFLICT = "person-conflict"
"""The rule of dead letters for rows whose record number is that of a person with another name and birth date."""

_VISITS_PER_BATCH = 2000


def read_new_resources(
    conn: Session, items: Iterable[FileItem], origin: str, received_as: str, resource_types: Collection[str]
) -> Iterator[Record | RejectedInput]:
    """Yield the new resources and rejected rows of a file of visits; nothing if the file was received before.

    The ledger is written in the caller's transaction, through ``conn``. It has entries only for the types that the
    deployment loads, so that resources of another type are new when the deployment loads that type later.
    ``received_as`` is the origin of the batch that contains the file.
    """
    visits.lock_ledger(conn)
    if visits.find_files(conn, [origin]):
        return
    counts = VisitFileCounts()
    for item in _read(conn, items, origin, resource_types, counts):
        if isinstance(item, RejectedInput):
            counts.rejected += 1
            yield replace(item, origin=origin)
        else:
            counts.rows += item.resource_type in resource_types
            yield item
    visits.record_file(conn, origin, received_as, counts)


def _read(
    conn: Session, items: Iterable[FileItem], origin: str, resource_types: Collection[str], counts: VisitFileCounts
) -> Iterator[Record | RejectedInput]:
    batch: list[Visit] = []
    for item in items:
        if isinstance(item, RejectedInput):
            yield item
            continue
        assert isinstance(item, Visit)
        batch.append(item)
        if len(batch) >= _VISITS_PER_BATCH:
            yield from _record_batch(conn, batch, origin, resource_types, counts)
            batch = []
    if batch:
        yield from _record_batch(conn, batch, origin, resource_types, counts)


def _record_batch(
    conn: Session, batch: Sequence[Visit], origin: str, resource_types: Collection[str], counts: VisitFileCounts
) -> Iterator[Record | RejectedInput]:
    rows = [_hash_row(visit, cipher_of(conn)) for visit in batch]
    people = visits.find_persons(conn, list({row.person.id for row in rows}))
    contradicted = _find_contradicted(rows, people)
    known = visits.find_visits(conn, [row.visit.id for row in rows])
    rows_by_person: dict[str, list[_Row]] = {}
    new_visits: list[KnownVisit] = []
    for row in rows:
        if row.person.id in contradicted or ((person := people.get(row.person.id)) and person.contradicts(row.person)):
            counts.conflicts += 1
            yield _build_person_conflict(row)
            continue
        if known.setdefault(row.visit.id, row.visit) != row.visit:
            counts.conflicts += 1
            yield _build_conflict(row)
            continue
        rows_by_person.setdefault(row.person.id, []).append(row)
        if known[row.visit.id] is row.visit:
            counts.visits += 1
            new_visits.append(row.visit)
            yield _build_encounter(row)
        else:
            counts.repeats += 1
    people = {identity: person for identity, person in people.items() if identity in rows_by_person}
    for identity, person_rows in rows_by_person.items():
        for row, person in _find_changes(people.get(identity), person_rows, counts):
            people[identity] = person
            yield _build_patient(row, person)
        person, last = people[identity], person_rows[-1].person
        if not person.name and person.content == last.content:
            person = replace(person, name=last.name, birth=last.birth)
        people[identity] = replace(person, as_of=max(person.as_of, last.as_of))
    visits.record(
        conn,
        origin,
        list(people.values()) if "Patient" in resource_types else [],
        new_visits if "Encounter" in resource_types else [],
    )


@dataclass(frozen=True, slots=True)
class _Row:
    """A row of a file, with the entries of the ledger for its person (in version 1) and its visit."""

    source: Visit
    person: Person
    visit: KnownVisit


def _find_contradicted(rows: Sequence[_Row], people: Mapping[str, Person]) -> set[str]:
    """Return the ids of unknown persons about whom the rows contradict each other.

    No row then shows to whom the record number belongs.
    """
    first: dict[str, Person] = {}
    contradicted = set[str]()
    for row in rows:
        if row.person.id not in people and first.setdefault(row.person.id, row.person).contradicts(row.person):
            contradicted.add(row.person.id)
    return contradicted


def _hash_row(visit: Visit, cipher: Cipher) -> _Row:
    row = visit.row
    person = "\0".join((row["first_name"], row["last_name"], row["birth_date"]))
    name = "\0".join((row["first_name"], row["last_name"])).casefold()
    content = "\0".join((row["visit_date"], row.get("reason", "").strip()))
    patient_id = cipher.identity("Patient", row["mrn"])
    return _Row(
        visit,
        Person(
            patient_id,
            1,
            cipher.fingerprint(person.encode()),
            visit.arrived,
            cipher.fingerprint(name.encode()),
            cipher.fingerprint(row["birth_date"].encode()),
        ),
        KnownVisit(
            cipher.identity("Encounter", row["visit_account_number"]),
            patient_id,
            cipher.fingerprint(content.encode()),
        ),
    )


def _find_changes(known: Person | None, rows: Sequence[_Row], counts: VisitFileCounts) -> Iterator[tuple[_Row, Person]]:
    """Yield the rows that change a person, each with the new version of the person.

    The last row wins: if its content is known or older than the known person, no row of the file is a change.
    """
    last = rows[-1].person
    if known and (last.as_of < known.as_of or last.content == known.content):
        counts.outdated += sum(row.person.content != known.content for row in rows)
        return
    person = known
    for row in rows:
        if person is None:
            counts.patients += 1
            person = row.person
        elif row.person.content != person.content:
            counts.updates += 1
            person = replace(row.person, version=person.version + 1)
        else:
            continue
        yield row, person


def _build_patient(row: _Row, person: Person) -> Record:
    resource = resources.build_visit_patient(
        row.source.row, person.id, version=person.version, updated=_format_instant(row.source.arrived)
    )
    return _build_record(row, resource, str(person.version))


def _build_encounter(row: _Row) -> Record:
    resource = resources.build_visit_encounter(
        row.source.row, row.visit.id, row.person.id, updated=_format_instant(row.source.arrived)
    )
    return _build_record(row, resource, "1")


def _build_record(row: _Row, resource: Mapping[str, Any], version: str) -> Record:
    arrived = row.source.arrived
    return Record(
        resource["resourceType"], resource["id"], version, arrived, arrived, resources.encode_resource(resource)
    )


def _format_instant(moment: datetime) -> str:
    return moment.isoformat(timespec="microseconds")


def _build_person_conflict(row: _Row) -> RejectedInput:
    return RejectedInput(
        "Encounter",
        row.visit.id,
        PERSON_CONFLICT,
        row.source.location,
        "this record number is used with another name and another birth date, so that the row may be about another "
        "person: correct the number. If it is the same person, send the new name and the new birth date in two files, "
        "one after the other",
        row.source.arrived,
        orjson.dumps(dict(row.source.row)),
    )


def _build_conflict(row: _Row) -> RejectedInput:
    return RejectedInput(
        "Encounter",
        row.visit.id,
        CONFLICT,
        row.source.location,
        "this visit account number is known with another person, date or reason, and visits cannot be changed: "
        "give the visit a number of its own, or discard this dead letter",
        row.source.arrived,
        orjson.dumps(dict(row.source.row)),
    )
