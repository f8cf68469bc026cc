"""The resources that all patients share: organizations, locations, practitioners, their roles, and medications."""

from dataclasses import dataclass
from random import Random

from fhir_assets.sandbox.synthetic.clock import instant
from fhir_assets.sandbox.synthetic.codes import MEDICATIONS, SNOMED, concept, hl7
from fhir_assets.sandbox.synthetic.people import FAMILY, FEMALE, MALE, PLACES, STREETS, Resources, pick

PROVIDERS, PAYERS, PRACTITIONERS = 6, 3, 48
_PAYER_NAMES = ("Medicare", "Beacon Health Plan", "Harbor Mutual Insurance")
_SPECIALTIES = (
    concept(SNOMED, "394814009", "General practice"),
    concept(SNOMED, "394579002", "Cardiology"),
    concept(SNOMED, "394802001", "General medicine"),
    concept(SNOMED, "394593009", "Medical oncology"),
)
_TABLET = concept(SNOMED, "385055001", "Tablet")
_INHALER = concept(SNOMED, "420641004", "Solution for inhalation")


@dataclass(slots=True)
class _HeadWriter:
    """Writes the beginnings of the shared resources, with random update times."""

    random: Random
    first_ms: int
    last_ms: int

    def head(self, resource_type: str, resource_id: str) -> str:
        when = instant(self.first_ms + int(self.random.random() * (self.last_ms - self.first_ms)))
        return (
            f'{{"resourceType":"{resource_type}","id":"{resource_id}","meta":{{"versionId":"1","lastUpdated":"{when}"}}'
        )


def generate_facility(population: str, first_ms: int, last_ms: int) -> Resources:
    """Yield the shared resources of a population."""
    writer = _HeadWriter(Random(f"{population}:facility"), first_ms, last_ms)
    yield from _organizations(population, writer)
    yield from _practitioners(population, writer)
    for n, drug in enumerate(MEDICATIONS):
        yield (
            "Medication",
            writer.head("Medication", f"{population}-med-{n}")
            + f',"code":{drug.code},"status":"active","form":{_TABLET if drug.unit == "tablet" else _INHALER}'
            f',"batch":{{"lotNumber":"L{n:04}","expirationDate":"2029-0{1 + n % 9}"}}}}',
        )


def _organizations(population: str, writer: _HeadWriter) -> Resources:
    for n in range(PROVIDERS + PAYERS):
        city, state, zip_code = PLACES[n % len(PLACES)]
        payer = n >= PROVIDERS
        name = _PAYER_NAMES[n - PROVIDERS] if payer else f"{city} General Hospital"
        kind = hl7("organization-type", *(("pay", "Payer") if payer else ("prov", "Healthcare Provider")))
        address = (
            f'{{"line":["{n + 1}00 {STREETS[n]}"],"city":"{city}","state":"{state}",'
            f'"postalCode":"{zip_code}","country":"US"}}'
        )
        yield (
            "Organization",
            writer.head("Organization", f"{population}-org-{n}")
            + f',"identifier":[{{"system":"http://hl7.org/fhir/sid/us-npi","value":"1{n:09}"}}],"active":true'
            f',"type":[{kind}],"name":"{name}","telecom":[{{"system":"phone","value":"555-100-{n:04}"}}],"address":[{address}]}}',
        )
        if payer:
            continue
        for part, room in enumerate(("Outpatient Clinic", "Emergency Department", "Ward 3")):
            yield (
                "Location",
                writer.head("Location", f"{population}-loc-{n}-{part}")
                + f',"identifier":[{{"system":"urn:oid:2.16.840.1.113883.19.5.1","value":"LOC-{n}-{part}"}}]'
                f',"status":"active","name":"{name}, {room}","mode":"instance",'
                f'"telecom":[{{"system":"phone","value":"555-101-{n:02}{part:02}"}}],"address":{address}'
                f',"position":{{"longitude":-71.{n}5{part}0,"latitude":42.{n}3{part}50}}'
                f',"managingOrganization":{{"reference":"Organization/{population}-org-{n}"}}}}',
            )


def _practitioners(population: str, writer: _HeadWriter) -> Resources:
    for n in range(PRACTITIONERS):
        female = n % 2 == 0
        first, family = pick(writer.random, FEMALE if female else MALE), pick(writer.random, FAMILY)
        yield (
            "Practitioner",
            writer.head("Practitioner", f"{population}-prac-{n}")
            + f',"identifier":[{{"system":"http://hl7.org/fhir/sid/us-npi","value":"2{n:09}"}}],"active":true'
            f',"name":[{{"family":"{family}","given":["{first}"],"prefix":["Dr."]}}]'
            f',"telecom":[{{"system":"email","value":"clinician{n}@example.org","use":"work"}}]'
            f',"gender":"{"female" if female else "male"}"'
            f',"qualification":[{{"code":{hl7("v2-0360", "MD", "Doctor of Medicine")}}}]}}',
        )
        yield (
            "PractitionerRole",
            writer.head("PractitionerRole", f"{population}-role-{n}")
            + f',"identifier":[{{"system":"urn:oid:2.16.840.1.113883.19.5.2","value":"ROLE-{n}"}}],"active":true'
            f',"period":{{"start":"20{10 + n % 10}"}}'
            f',"practitioner":{{"reference":"Practitioner/{population}-prac-{n}","display":"Dr. {first} {family}"}}'
            f',"organization":{{"reference":"Organization/{population}-org-{n % PROVIDERS}"}}'
            f',"code":[{hl7("practitioner-role", "doctor", "Doctor")}],"specialty":[{_SPECIALTIES[n % 4]}]'
            f',"location":[{{"reference":"Location/{population}-loc-{n % PROVIDERS}-0"}}]'
            f',"telecom":[{{"system":"phone","value":"555-102-{n:04}"}}]}}',
        )
