"""Canaries: resources whose names, identifiers, dates, addresses, telecoms and free texts are unique markers.

A marker found outside of encrypted data identifies the element that leaked and where.
"""

import base64
import json
import random
import re
import string
from collections.abc import Iterator
from datetime import date, datetime, timedelta
from typing import Any

from fhir_assets_tests.support.content import instant

FIRST_DAY = date(1902, 2, 1)
"""No other date of the tests is in these years. January 1 is not used, because columns reduced to the year contain it.
"""

Json = dict[str, Any]


class Canaries:
    """Creates unique markers and finds them in bytes: as plain text in any case, hexadecimal or base64."""

    def __init__(self) -> None:
        # Letters need no escape in JSON, URLs, XML and Python. The stem is random, so that tests can share a machine.
        self.stem = "Qx" + "".join(random.choices(string.ascii_lowercase, k=10))
        self._texts: list[str] = []
        self._dates: dict[str, str] = {}
        self._day = FIRST_DAY
        stem = self.stem.encode()
        plain = rb"(?i:%b)(\d{5})?" % stem
        packed = b"|".join([stem.hex().encode(), *map(re.escape, _base64_of(stem))])
        self._text = re.compile(plain + b"|" + packed)

    def text(self, element: str) -> str:
        """Return a new marker for the text of an element."""
        self._texts.append(element)
        return f"{self.stem}{len(self._texts) - 1:05}"

    def day(self, element: str) -> str:
        """Return a new date for an element."""
        while (day := self._day + timedelta(days=1)).replace(month=1, day=1) == day:
            self._day = day
        self._day = day
        assert day.year < 1920
        self._dates[day.isoformat()] = element
        return day.isoformat()

    def found_in(self, content: bytes) -> set[str]:
        """Return the elements whose markers are in the content."""
        elements = set()
        for match in self._text.finditer(content):
            number = match[1]
            known = number is not None and int(number) < len(self._texts)
            elements.add(self._texts[int(number)] if known else f"something, as {match[0].decode()}")
        for pattern in _DATES:
            for match in pattern.finditer(content):
                written = "{y}-{m:02}-{d:02}".format(**{name: int(part) for name, part in match.groupdict().items()})
                if element := self._dates.get(written):
                    elements.add(element)
        return elements


_DATES = [
    re.compile(pattern)
    for pattern in (
        rb"(?P<y>19[01]\d)[-/.](?P<m>\d\d)[-/.](?P<d>\d\d)",
        rb"(?P<y>19[01]\d), (?P<m>\d{1,2}), (?P<d>\d{1,2})",
        rb"(?P<d>\d\d)[-/.](?P<m>\d\d)[-/.](?P<y>19[01]\d)",
        rb"(?P<m>\d\d)[-/.](?P<d>\d\d)[-/.](?P<y>19[01]\d)",
    )
]


def _base64_of(stem: bytes) -> Iterator[bytes]:
    """Yield the invariant part of the base64 of a text with the stem, for each position of the stem modulo three."""
    for before in range(3):
        encoded = base64.b64encode(b"\0" * before + stem)
        yield encoded[-(-before * 8 // 6) : (before + len(stem)) * 8 // 6]


class Population:
    """Valid resources with markers. Their ids contain no marker."""

    def __init__(self, canaries: Canaries, moment: datetime) -> None:
        self.canaries = canaries
        self._moment = moment

    def resource(self, kind: str, identity: str, *, version: str = "1", **elements: Any) -> bytes:
        """Return a resource with its ``meta`` as JSON."""
        meta = {"versionId": version, "lastUpdated": instant(self._moment)}
        body: Json = {"resourceType": kind, "id": identity, "meta": meta, **elements}
        return json.dumps(body).encode()

    def everything(self, identity: str) -> list[bytes]:
        """Return a patient and one resource of each other type that refers to it."""
        return [
            self.patient(identity),
            self.practitioner(f"{identity}-doctor"),
            self.encounter(f"{identity}-visit", identity),
            self.observation(f"{identity}-value", identity),
            self.document(f"{identity}-letter", identity),
            self.report(f"{identity}-report", identity),
            self.coverage(f"{identity}-cover", identity),
        ]

    def patient(self, identity: str, **more: Any) -> bytes:
        at = "Patient"
        elements = {
            "text": self.narrative(at),
            "identifier": [self.identifier(at, "MR"), self.identifier(at, "SS", "http://hl7.org/fhir/sid/us-ssn")],
            "active": True,
            "name": [self.name(at), {**self.name(at), "use": "maiden"}],
            "telecom": [self.telecom(at, "phone"), self.telecom(at, "email")],
            "gender": "female",
            "birthDate": self.canaries.day(f"{at}.birthDate"),
            "deceasedDateTime": f"{self.canaries.day(f'{at}.deceased')}T10:00:00Z",
            "address": [self.address(at)],
            "contact": [
                {
                    "name": self.name(f"{at}.contact"),
                    "telecom": [self.telecom(f"{at}.contact", "phone")],
                    "address": self.address(f"{at}.contact"),
                }
            ],
        }
        return self.resource("Patient", identity, **{**elements, **more})

    def practitioner(self, identity: str) -> bytes:
        at = "Practitioner"
        elements: Json = {
            "identifier": [self.identifier(at, "PRN")],
            "name": [self.name(at)],
            "telecom": [self.telecom(at, "phone")],
            "address": [self.address(at)],
            "birthDate": self.canaries.day(f"{at}.birthDate"),
        }
        return self.resource("Practitioner", identity, **elements)

    def encounter(self, identity: str, patient: str, **more: Any) -> bytes:
        at = "Encounter"
        elements = {
            "text": self.narrative(at),
            "identifier": [self.identifier(at, "VN")],
            "status": "finished",
            "class": {"system": "http://terminology.hl7.org/CodeSystem/v3-ActCode", "code": "AMB"},
            "subject": self.reference(at, f"Patient/{patient}"),
            "participant": [{"individual": self.reference(at, f"Practitioner/{patient}-doctor")}],
            "reasonCode": [{"text": self.canaries.text(f"{at}.reasonCode.text")}],
            "period": {"start": "2024-01-02T10:00:00Z"},
        }
        return self.resource("Encounter", identity, **{**elements, **more})

    def observation(self, identity: str, patient: str, **more: Any) -> bytes:
        at = "Observation"
        elements = {
            "text": self.narrative(at),
            "identifier": [self.identifier(at, "FILL")],
            "status": "final",
            "code": {"coding": [{"system": "http://loinc.org", "code": "29463-7"}]},
            "subject": self.reference(at, f"Patient/{patient}"),
            "valueString": self.canaries.text(f"{at}.value"),
            "note": [{"authorString": self.canaries.text(f"{at}.note.author"), "text": self.words(f"{at}.note.text")}],
            "component": [
                {"code": {"text": "part"}, "valueString": self.canaries.text(f"{at}.component.value")},
            ],
        }
        return self.resource("Observation", identity, **{**elements, **more})

    def document(self, identity: str, patient: str) -> bytes:
        at = "DocumentReference"
        attachment = {
            "contentType": "text/plain",
            "data": base64.b64encode(self.words(f"{at}.content.data").encode()).decode(),
            "title": self.canaries.text(f"{at}.content.title"),
            "url": f"http://files.example.org/{self.canaries.text(f'{at}.content.url')}",
        }
        return self.resource(
            "DocumentReference",
            identity,
            masterIdentifier=self.identifier(at, "FILL"),
            status="current",
            subject=self.reference(at, f"Patient/{patient}"),
            description=self.words(f"{at}.description"),
            content=[{"attachment": attachment}],
        )

    def report(self, identity: str, patient: str) -> bytes:
        at = "DiagnosticReport"
        return self.resource(
            "DiagnosticReport",
            identity,
            status="final",
            code={"coding": [{"system": "http://loinc.org", "code": "58410-2"}]},
            subject=self.reference(at, f"Patient/{patient}"),
            conclusion=self.words(f"{at}.conclusion"),
        )

    def coverage(self, identity: str, patient: str) -> bytes:
        at = "Coverage"
        return self.resource(
            "Coverage",
            identity,
            identifier=[self.identifier(at, "MB")],
            status="active",
            beneficiary=self.reference(at, f"Patient/{patient}"),
            subscriberId=self.canaries.text(f"{at}.subscriberId"),
            dependent=self.canaries.text(f"{at}.dependent"),
            payor=[self.reference(at, f"Patient/{patient}")],
        )

    def invalid(self, patient: str) -> list[bytes]:
        """Return resources that validation refuses, each with a marker in the invalid element."""
        mark = self.canaries.text
        return [
            self.patient("bad-code", gender=mark("Patient.gender")),
            self.patient("bad-date", birthDate=f"{self.canaries.day('Patient.birthDate')} or {mark('a date')}"),
            self.patient("bad-name", name=mark("Patient.name as text")),
            self.patient("bad-narrative", text={"status": "generated", "div": f"<p>{mark('a narrative')}"}),
            self.patient("bad-link", managingOrganization={"reference": mark("a reference")}),
            self.patient("unknown", **{f"{mark('the name of an element')} of 1903": mark("an unknown element")}),
            self.patient(f"{mark('an id')} is no id"),
            self.observation("bad-status", patient, status=mark("Observation.status")),
            self.observation("bad-number", patient, valueInteger=mark("Observation.valueInteger")),
            self.encounter("bad-class", patient, **{"class": mark("Encounter.class")}),
        ]

    def unreadable(self) -> list[bytes]:
        """Return lines that are not a resource, or whose ``meta`` cannot be read."""
        mark = self.canaries.text
        complete = self.patient("cut-off")
        return [
            self.patient("bad-time", meta={"lastUpdated": mark("meta.lastUpdated")}),
            self.patient("bad-version", meta={"versionId": [mark("meta.versionId")]}),
            complete[: len(complete) // 2],
            mark("a line").encode(),
            json.dumps({"resourceType": mark("a resourceType"), "id": "typeless"}).encode(),
        ]

    # elements

    def name(self, at: str) -> Json:
        mark = self.canaries.text
        return {
            "use": "official",
            "text": self.words(f"{at}.name.text"),
            "family": mark(f"{at}.name.family"),
            "given": [mark(f"{at}.name.given"), mark(f"{at}.name.given")],
            "prefix": [mark(f"{at}.name.prefix")],
            "suffix": [mark(f"{at}.name.suffix")],
        }

    def address(self, at: str) -> Json:
        """Return an address. State and country are not identifiers (45 CFR 164.514(b)(2)(i)(B)) and are left out."""
        parts = {part: self.canaries.text(f"{at}.address.{part}") for part in ("text", "city", "district")}
        postal_code = self.canaries.text(f"{at}.address.postalCode")
        return {**parts, "line": [self.canaries.text(f"{at}.address.line")], "postalCode": postal_code}

    def telecom(self, at: str, system: str) -> Json:
        return {"system": system, "value": self.canaries.text(f"{at}.telecom.{system}")}

    def identifier(self, at: str, kind: str, system: str = "http://hospital.example.org/ids") -> Json:
        coding = {"system": "http://terminology.hl7.org/CodeSystem/v2-0203", "code": kind}
        return {
            "type": {"coding": [coding]},
            "system": system,
            "value": self.canaries.text(f"{at}.identifier of type {kind}"),
        }

    def reference(self, at: str, to: str) -> Json:
        return {"reference": to, "display": self.canaries.text(f"{at}, display of {to.split('/')[0]}")}

    def narrative(self, at: str) -> Json:
        text = self.words(f"{at}.text")
        return {"status": "generated", "div": f'<div xmlns="http://www.w3.org/1999/xhtml">{text}</div>'}

    def words(self, element: str) -> str:
        """Return a marker between characters that JSON and XML escape."""
        return f"Zoë's file, {self.canaries.text(element)}; 50 % of £7"
