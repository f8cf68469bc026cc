"""The patient, and the properties that all resources of a patient share."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import TypeVar

from fhir_assets.sandbox.synthetic.clock import DAY, DAYS, date_time, instant
from fhir_assets.sandbox.synthetic.codes import HL7, VisitKind, hl7

Resources = Iterator[tuple[str, str]]
"""Pairs of a resource type and the JSON of a resource."""

T = TypeVar("T")

PLACES = (
    ("Boston", "MA", "02108"), ("Worcester", "MA", "01602"), ("Hartford", "CT", "06103"),
    ("Providence", "RI", "02903"), ("Albany", "NY", "12207"), ("Buffalo", "NY", "14202"),
    ("Newark", "NJ", "07102"), ("Philadelphia", "PA", "19103"), ("Portland", "ME", "04101"),
    ("Burlington", "VT", "05401"),
)  # fmt: skip
STREETS = (
    "Maple Street", "Oak Avenue", "Cedar Lane", "Washington Street", "Lake Road", "Elm Street", "Park Avenue",
    "Highland Avenue", "Union Street", "Mill Road",
)  # fmt: skip
FEMALE = (
    "Mary", "Patricia", "Jennifer", "Linda", "Elizabeth", "Susan", "Jessica", "Karen", "Sofía", "Nancy", "Zoë",
    "Margaret", "Ashley", "Emily", "Donna", "Michelle", "Carol", "Amanda", "Inés", "Chloë",
)  # fmt: skip
MALE = (
    "James", "Robert", "John", "Michael", "David", "William", "Richard", "José", "Joseph", "Thomas", "Charles",
    "Daniel", "Matthew", "Anthony", "Mark", "Donald", "Steven", "Andrés", "Joshua", "Kenneth",
)  # fmt: skip
FAMILY = (
    "Smith", "Johnson", "Williams", "Brown", "Jones", "García", "Miller", "Davis", "Rodríguez", "Martínez",
    "Hernández", "López", "Wilson", "Anderson", "Thomas", "Taylor", "Moore", "Jackson", "Martin", "Lee",
    "O’Brien", "Thompson", "White", "Harris", "Sánchez", "Clark", "Ramírez", "Lewis", "Robinson", "Nguyen",
)  # fmt: skip
_RACES = (("2106-3", "White"), ("2054-5", "Black or African American"), ("2028-9", "Asian"))
_NEVER_MARRIED = ("S", "Never Married")
_MARITAL = (("M", "Married"), _NEVER_MARRIED, ("D", "Divorced"), ("W", "Widowed"))
_LANGUAGES = (("en-US", "English (United States)"), ("es", "Spanish"), ("zh", "Chinese"))


def pick(random: Random, options: Sequence[T]) -> T:
    """Return one of the options, faster than ``random.choice``."""
    return options[int(random.random() * len(options))]


@dataclass(slots=True)
class Person:
    """The properties of a patient from which the patient's resources are generated.

    ``updated`` and ``last`` are in milliseconds since 1970, ``born`` is in days since 1970, ``height`` is the adult
    height in centimetres.
    """

    id: str
    population: str
    number: int
    random: Random
    first: str
    family: str
    female: bool
    born: int
    height: float
    bmi: float
    updated: int
    last: int
    subject: str = ""
    serial: int = 0

    def new_id(self, prefix: str) -> str:
        """Return a new id for a resource of this patient."""
        self.serial += 1
        return f"{self.id}-{prefix}{self.serial}"

    def head(self, resource_type: str, resource_id: str, updated: int) -> str:
        """Return the beginning of a resource's JSON, with a ``lastUpdated`` at least a second after ``updated``."""
        self.serial += 1
        when = instant(min(updated + self.serial * 977, self.last))
        return (
            f'{{"resourceType":"{resource_type}","id":"{resource_id}","meta":{{"versionId":"1","lastUpdated":"{when}"}}'
        )

    def age(self, seconds: int) -> int:
        """Return the age in whole years at a time in seconds."""
        return int((seconds // DAY - self.born) / 365.25)


@dataclass(slots=True)
class Visit:
    """The data of an encounter. ``start`` and ``end`` are in seconds since 1970, ``updated`` is in milliseconds.

    ``kind_index`` is the index of ``kind`` in ``codes.VISITS``.
    """

    id: str
    kind: VisitKind
    kind_index: int
    start: int
    end: int
    updated: int
    practitioner: str
    organization: str
    location: str

    @property
    def encounter(self) -> str:
        """The JSON of a reference to the encounter."""
        return f'{{"reference":"Encounter/{self.id}"}}'


def make_person(population: str, number: int, first_ms: int, last_ms: int) -> Person:
    """Return the patient with this number, which does not depend on other patients."""
    random = Random(f"{population}:{number}")
    female = random.random() < 0.51
    born = first_ms // (1000 * DAY) - 30 - int(random.random() ** 0.8 * 90 * 365)
    person = Person(
        id=f"{population}-{number:07}",
        population=population,
        number=number,
        random=random,
        first=pick(random, FEMALE if female else MALE),
        family=pick(random, FAMILY),
        female=female,
        born=born,
        height=150 + random.random() * 25 + (0 if female else 12),
        bmi=18 + random.random() * 15,
        updated=first_ms + int(random.random() * (last_ms - first_ms)),
        last=last_ms - 1,
    )
    person.subject = f'{{"reference":"Patient/{person.id}","display":"{person.first} {person.family}"}}'
    return person


def generate_patient(person: Person, last_seen: int) -> Resources:
    """Yield the Patient resource. Some old patients died after ``last_seen`` (seconds since 1970)."""
    random, n = person.random, person.number
    race_code, race = pick(random, _RACES)
    hispanic = random.random() < 0.18
    city, state, zip_code = pick(random, PLACES)
    house = 1 + int(random.random() * 999)
    marital_code, marital = pick(random, _MARITAL) if person.age(last_seen) >= 18 else _NEVER_MARRIED
    language, language_name = pick(random, _LANGUAGES)
    gender = "female" if person.female else "male"
    birth_date = DAYS[person.born]
    digits = 900_000_000 + (n * 7_919_993) % 99_999_989
    ssn = f"{digits // 1_000_000:03}-{digits // 10_000 % 100:02}-{digits % 10_000:04}"
    mrn = f"MRN-{person.id[3:]}"
    text = f"{person.first} {person.family}, {gender}, born {birth_date}"
    deceased = '"deceasedBoolean":false'
    if person.age(last_seen) > 75 and random.random() < 0.2:
        died = last_seen + int(random.random() * (person.last // 1000 - last_seen))
        person.updated = max(person.updated, died * 1000 + 999)
        deceased = f'"deceasedDateTime":"{date_time(died)}"'
    maiden = ""
    if person.female and marital_code != "S":
        maiden = f',{{"use":"maiden","family":"{pick(random, FAMILY)}","given":["{person.first}"]}}'
    yield (
        "Patient",
        person.head("Patient", person.id, person.updated)
        + f',"text":{{"status":"generated","div":"<div xmlns=\\"http://www.w3.org/1999/xhtml\\">{text}</div>"}}'
        f',"extension":[{{"url":"http://hl7.org/fhir/us/core/StructureDefinition/us-core-race","extension":['
        f'{{"url":"ombCategory","valueCoding":{{"system":"urn:oid:2.16.840.1.113883.6.238","code":"{race_code}",'
        f'"display":"{race}"}}}},{{"url":"text","valueString":"{race}"}}]}},'
        f'{{"url":"http://hl7.org/fhir/us/core/StructureDefinition/us-core-ethnicity","extension":['
        f'{{"url":"text","valueString":"{"Hispanic or Latino" if hispanic else "Not Hispanic or Latino"}"}}]}},'
        f'{{"url":"http://hl7.org/fhir/us/core/StructureDefinition/us-core-birthsex",'
        f'"valueCode":"{"F" if person.female else "M"}"}}]'
        f',"identifier":[{{"use":"usual","type":{_MR},"system":"urn:oid:2.16.840.1.113883.19.5","value":"{mrn}",'
        f'"assigner":{{"reference":"Organization/{person.population}-org-0"}}}},'
        f'{{"use":"official","type":{_SS},"system":"http://hl7.org/fhir/sid/us-ssn","value":"{ssn}"}},'
        f'{{"type":{_DL},"system":"urn:oid:2.16.840.1.113883.4.3.25","value":"S{99_000_000 + n}"}}]'
        f',"active":true,"name":[{{"use":"official","family":"{person.family}","given":["{person.first}",'
        f'"{pick(random, FEMALE if person.female else MALE)}"],'
        f'"prefix":["{"Ms." if person.female else "Mr."}"]}}{maiden}]'
        f',"telecom":[{{"system":"phone","value":"555-{200 + n % 700:03}-{n % 10_000:04}","use":"home"}},'
        f'{{"system":"email","value":"patient{n}@example.org"}}]'
        f',"gender":"{gender}","birthDate":"{birth_date}",{deceased}'
        f',"address":[{{"use":"home","line":["{house} {pick(random, STREETS)}"],"city":"{city}","state":"{state}",'
        f'"postalCode":"{zip_code}","country":"US","period":{{"start":"{DAYS[person.born + 300]}"}}}}]'
        f',"maritalStatus":{{"coding":[{{"system":"{HL7}v3-MaritalStatus","code":"{marital_code}","display":"{marital}"}}]}}'
        f',"multipleBirthBoolean":false'
        f',"contact":[{{"relationship":[{_NEXT_OF_KIN}],"name":{{"family":"{person.family}",'
        f'"given":["{pick(random, MALE)}"]}},"telecom":[{{"system":"phone","value":"555-201-{n % 10_000:04}"}}]}}]'
        f',"communication":[{{"language":{{"coding":[{{"system":"urn:ietf:bcp:47","code":"{language}",'
        f'"display":"{language_name}"}}]}},"preferred":true}}]'
        f',"generalPractitioner":[{{"reference":"Practitioner/{person.population}-prac-{n % 48}"}}]'
        f',"managingOrganization":{{"reference":"Organization/{person.population}-org-{n % 6}"}}}}',
    )


_MR = hl7("v2-0203", "MR", "Medical Record Number")
_SS = hl7("v2-0203", "SS", "Social Security Number")
_DL = hl7("v2-0203", "DL", "Driver's license number")
_NEXT_OF_KIN = hl7("v2-0131", "N", "Next-of-Kin")
