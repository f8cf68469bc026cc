"""Visits on their way into raw: one Patient an MRN, one Encounter a visit account number.

The ledger (warehouse/visits.py) knows by hashes what was said before, so that only news is received: a person that is
new or was changed, a visit that is new. It is written in the transaction that notes the file as received: after a
crash the file comes again, and finds the ledger as it was.

Of what files say of a person the newest written is right, in whatever order they come; in one file the last row.
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
"""Rule of the dead letter of a visit whose account number is known with other content."""

_AT_ONCE = 2000


def read_new_resources(
    conn: Session, items: Iterable[FileItem], origin: str, received_as: str, resource_types: Collection[str]
) -> Iterator[Record | RejectedInput]:
    """What a file of visits holds, as the resources that are news; nothing if it was received before. Writes the ledger
    through ``conn``, in the caller's transaction: of the types that the deployment loads, so that those it does not
    are news when it does. ``received_as`` is the origin of all that the caller receives, this file among it.
    """
    visits.lock_ledger(conn)
    if visits.find_files(conn, [origin]):
        return
    counts = VisitFileCounts()
    for found in _read(conn, items, origin, resource_types, counts):
        if isinstance(found, RejectedInput):
            counts.rejected += 1
            yield replace(found, origin=origin)
        else:
            counts.rows += found.resource_type in resource_types
            yield found
    visits.record_file(conn, origin, received_as, counts)


def _read(
    conn: Session, items: Iterable[FileItem], origin: str, resource_types: Collection[str], counts: VisitFileCounts
) -> Iterator[Record | RejectedInput]:
    waiting: list[Visit] = []
    for item in items:
        if isinstance(item, RejectedInput):
            yield item
            continue
        assert isinstance(item, Visit)
        waiting.append(item)
        if len(waiting) >= _AT_ONCE:
            yield from _entered(conn, waiting, origin, resource_types, counts)
            waiting = []
    if waiting:
        yield from _entered(conn, waiting, origin, resource_types, counts)


def _entered(
    conn: Session, batch: Sequence[Visit], origin: str, resource_types: Collection[str], counts: VisitFileCounts
) -> Iterator[Record | RejectedInput]:
    rows = [_hashed(visit, cipher_of(conn)) for visit in batch]
    known = visits.find_visits(conn, [row.visit.id for row in rows])
    said: dict[str, list[_Row]] = {}
    added: list[KnownVisit] = []
    for row in rows:
        if known.setdefault(row.visit.id, row.visit) != row.visit:
            counts.conflicts += 1
            yield _conflict(row)
            continue
        said.setdefault(row.person.id, []).append(row)
        if known[row.visit.id] is row.visit:
            counts.visits += 1
            added.append(row.visit)
            yield _encounter(row)
        else:
            counts.repeats += 1
    people = visits.find_persons(conn, list(said))
    for identity, of_person in said.items():
        for row, person in _news(people.get(identity), of_person, counts):
            people[identity] = person
            yield _patient(row, person)
        newest = max(people[identity].as_of, of_person[-1].person.as_of)
        people[identity] = replace(people[identity], as_of=newest)
    visits.record(
        conn,
        origin,
        list(people.values()) if "Patient" in resource_types else [],
        added if "Encounter" in resource_types else [],
    )


@dataclass(frozen=True, slots=True)
class _Row:
    """A visit with what the ledger would have of it; ``person`` as of its first version."""

    of: Visit
    person: Person
    visit: KnownVisit


def _hashed(visit: Visit, cipher: Cipher) -> _Row:
    row = visit.row
    person = "\0".join((row["first_name"], row["last_name"], row["birth_date"]))
    what = "\0".join((row["visit_date"], row.get("reason", "").strip()))
    patient_id = cipher.identity("Patient", row["mrn"])
    return _Row(
        visit,
        Person(patient_id, 1, cipher.fingerprint(person.encode()), visit.arrived),
        KnownVisit(
            cipher.identity("Encounter", row["visit_account_number"]),
            patient_id,
            cipher.fingerprint(what.encode()),
        ),
    )


def _news(before: Person | None, rows: Sequence[_Row], counts: VisitFileCounts) -> Iterator[tuple[_Row, Person]]:
    """The rows that say something new of a person, with the person as of then. The last is right: if it says what is
    known, so that the file is one that came before, the others say nothing.
    """
    last = rows[-1].person
    if before and (last.as_of < before.as_of or last.content == before.content):
        counts.outdated += sum(row.person.content != before.content for row in rows)
        return
    person = before
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


def _patient(row: _Row, person: Person) -> Record:
    resource = resources.build_visit_patient(
        row.of.row, person.id, version=person.version, updated=_instant(row.of.arrived)
    )
    return _record(row, resource, str(person.version))


def _encounter(row: _Row) -> Record:
    resource = resources.build_visit_encounter(
        row.of.row, row.visit.id, row.person.id, updated=_instant(row.of.arrived)
    )
    return _record(row, resource, "1")


def _record(row: _Row, resource: Mapping[str, Any], version: str) -> Record:
    arrived = row.of.arrived
    return Record(
        resource["resourceType"], resource["id"], version, arrived, arrived, resources.encode_resource(resource)
    )


def _instant(moment: datetime) -> str:
    return moment.isoformat(timespec="microseconds")


def _conflict(row: _Row) -> RejectedInput:
    return RejectedInput(
        "Encounter",
        row.visit.id,
        CONFLICT,
        row.of.location,
        "this visit account number is known with another person, date or reason, and a visit is never changed: "
        "give it its own number, or discard this",
        row.of.arrived,
        orjson.dumps(dict(row.of.row)),
    )
