"""Encounters, conditions, allergies, procedures and documents."""

from base64 import b64encode

from fhir_assets.sandbox.synthetic.clock import DAY, DAYS, date_time, day_of
from fhir_assets.sandbox.synthetic.codes import (
    ALLERGIES,
    DISORDERS,
    EMERGENCY,
    INPATIENT,
    LOINC,
    PROCEDURES,
    REACTIONS,
    VISITS,
    Disorder,
    concept,
    hl7,
)
from fhir_assets.sandbox.synthetic.facility import PRACTITIONERS, PROVIDERS
from fhir_assets.sandbox.synthetic.people import Person, Resources, Visit, pick

_ATTENDER = hl7("v3-ParticipationType", "ATND", "attender")
_PRIMARY = hl7("v3-ParticipationType", "PPRF", "primary performer")
_CLINICAL = tuple(hl7("condition-clinical", code) for code in ("active", "resolved"))
_CONFIRMED = hl7("condition-ver-status", "confirmed", "Confirmed")
_DIAGNOSIS = hl7("condition-category", "encounter-diagnosis", "Encounter Diagnosis")
_ALLERGY_ACTIVE = hl7("allergyintolerance-clinical", "active", "Active")
_ALLERGY_CONFIRMED = hl7("allergyintolerance-verification", "confirmed", "Confirmed")
_ADMISSION_DIAGNOSIS = hl7("diagnosis-role", "AD", "Admission diagnosis")
_DISCHARGE = hl7("discharge-disposition", "home", "Home")
_NOTE = concept(LOINC, "11506-3", "Progress note")
_CLINICAL_NOTE = (
    '{"coding":[{"system":"http://hl7.org/fhir/us/core/CodeSystem/us-core-documentreference-category",'
    '"code":"clinical-note","display":"Clinical Note"}]}'
)
_SEVERITY = ("mild", "moderate", "severe")


def plan_visits(person: Person, first_ms: int) -> list[Visit]:
    """Return three to eight visits, oldest first. Two in five were last updated long after they took place."""
    random = person.random
    visits = []
    for n in range(3 + int(random.random() * 6)):
        updated = first_ms + int(random.random() * (person.last - first_ms))
        draw = random.random()
        kind = 3 if draw < 0.04 else 2 if draw < 0.12 else 4 if draw < 0.24 else 1 if draw < 0.5 else 0
        lag = DAY // 4 + random.random() * DAY if random.random() < 0.6 else DAY + random.random() ** 2 * 5 * 365 * DAY
        duration = VISITS[kind].minutes * 60
        start = max(updated // 1000 - int(lag) - duration, (person.born + 2) * DAY)
        organization = int(random.random() * PROVIDERS)
        part = {EMERGENCY: 1, INPATIENT: 2}.get(kind, 0)
        visits.append(
            Visit(
                id=f"{person.id}-e{n}",
                kind=VISITS[kind],
                kind_index=kind,
                start=start,
                end=start + duration,
                updated=updated,
                practitioner=f"{person.population}-prac-{int(random.random() * PRACTITIONERS)}",
                organization=f"{person.population}-org-{organization}",
                location=f"{person.population}-loc-{organization}-{part}",
            )
        )
    visits.sort(key=lambda visit: visit.start)
    return visits


def generate_encounter(person: Person, visit: Visit, condition: str | None) -> Resources:
    """Yield the Encounter of a visit. ``condition`` is the id of the condition that was diagnosed."""
    start, end = date_time(visit.start), date_time(visit.end)
    diagnosis = ""
    if condition is not None:
        diagnosis = (
            f',"reasonReference":[{{"reference":"Condition/{condition}"}}]'
            f',"diagnosis":[{{"condition":{{"reference":"Condition/{condition}"}},"use":{_ADMISSION_DIAGNOSIS},"rank":1}}]'
        )
    stay = ""
    if visit.kind_index == INPATIENT:
        stay = f',"hospitalization":{{"dischargeDisposition":{_DISCHARGE}}}'
    yield (
        "Encounter",
        person.head("Encounter", visit.id, visit.updated)
        + f',"identifier":[{{"use":"official","system":"urn:oid:2.16.840.1.113883.19.5.3","value":"VN-{visit.id}"}}]'
        f',"status":"finished","class":{visit.kind.act},"type":[{visit.kind.type}],"subject":{person.subject}'
        f',"participant":[{{"type":[{_PRIMARY if visit.kind_index < EMERGENCY else _ATTENDER}],'
        f'"period":{{"start":"{start}","end":"{end}"}},'
        f'"individual":{{"reference":"Practitioner/{visit.practitioner}"}}}}]'
        f',"period":{{"start":"{start}","end":"{end}"}}'
        f',"length":{{"value":{visit.kind.minutes},"unit":"min","system":"http://unitsofmeasure.org","code":"min"}}'
        f'{diagnosis}{stay},"location":[{{"location":{{"reference":"Location/{visit.location}"}},'
        f'"status":"completed"}}],"serviceProvider":{{"reference":"Organization/{visit.organization}"}}}}',
    )


def choose_disorder(person: Person) -> Disorder:
    """Choose a disorder. Chronic disorders are more likely with age."""
    while True:
        disorder = pick(person.random, DISORDERS)
        if not disorder.chronic or person.random.random() * 60 < person.age(person.last // 1000) - 15:
            return disorder


def generate_condition(person: Person, visit: Visit, disorder: Disorder, condition_id: str) -> Resources:
    """Yield the Condition that was diagnosed at a visit. The onset of a chronic condition may be a year or a month."""
    random = person.random
    resolved = not disorder.chronic and random.random() < 0.7
    onset = f'"onsetDateTime":"{date_time(visit.start - int(random.random() * 5 * DAY))}"'
    if disorder.chronic:
        years = int(random.random() * min(10, max(person.age(visit.start), 0)))
        day = DAYS[visit.start // DAY - years * 365]
        onset = f'"onsetDateTime":"{day[: pick(random, (4, 7, 10))]}"'
    abated = f',"abatementDateTime":"{day_of(visit.end)}"' if resolved else ""
    yield (
        "Condition",
        person.head("Condition", condition_id, visit.updated)
        + f',"clinicalStatus":{_CLINICAL[resolved]},"verificationStatus":{_CONFIRMED},"category":[{_DIAGNOSIS}]'
        f',"code":{disorder.code},"subject":{person.subject},"encounter":{visit.encounter},{onset}{abated}'
        f',"recordedDate":"{date_time(visit.start)}","recorder":{{"reference":"Practitioner/{visit.practitioner}"}}}}',
    )


def generate_allergies(person: Person) -> Resources:
    """Yield one or two allergies for some patients."""
    random = person.random
    if random.random() < 0.65:
        return
    first = int(random.random() * len(ALLERGIES))
    for n in range(1 + int(random.random() * 2)):
        category, code = ALLERGIES[(first + n) % len(ALLERGIES)]
        severity = pick(random, _SEVERITY)
        since = DAYS[person.born + int(random.random() * 4000)]
        yield (
            "AllergyIntolerance",
            person.head("AllergyIntolerance", person.new_id("al"), person.updated)
            + f',"clinicalStatus":{_ALLERGY_ACTIVE},"verificationStatus":{_ALLERGY_CONFIRMED},"type":"allergy"'
            f',"category":["{category}"],"criticality":"{"high" if severity == "severe" else "low"}","code":{code}'
            f',"patient":{person.subject},"onsetDateTime":"{since[:4]}"'
            f',"reaction":[{{"manifestation":[{pick(random, REACTIONS)}],"severity":"{severity}"}}]}}',
        )


def generate_procedure(person: Person, visit: Visit, request: str | None) -> Resources:
    """Yield a Procedure during a visit, based on ``request`` if there is one."""
    start = visit.start + 120
    based_on = f',"basedOn":[{{"reference":"ServiceRequest/{request}"}}]' if request else ""
    yield (
        "Procedure",
        person.head("Procedure", person.new_id("pr"), visit.updated)
        + f'{based_on},"status":"completed","code":{pick(person.random, PROCEDURES)},"subject":{person.subject}'
        f',"encounter":{visit.encounter}'
        f',"performedPeriod":{{"start":"{date_time(start)}","end":"{date_time(start + 600)}"}}'
        f',"performer":[{{"actor":{{"reference":"Practitioner/{visit.practitioner}"}}}}]'
        f',"location":{{"reference":"Location/{visit.location}"}}}}',
    )


def generate_document(person: Person, visit: Visit, disorder: Disorder | None) -> Resources:
    """Yield the note of a visit, with its text as a base64 attachment."""
    complaint = disorder.name if disorder else "no acute complaint"
    note = (
        f"{day_of(visit.start)}\n\n# Subjective\n{person.first} {person.family}, {person.age(visit.start)} years: "
        f"{complaint}.\n\n# Objective\nVital signs as recorded.\n\n# Assessment and plan\n"
        f"{complaint}; follow up as needed.\n"
    )
    data = b64encode(note.encode()).decode()
    yield (
        "DocumentReference",
        person.head("DocumentReference", person.new_id("doc"), visit.updated)
        + f',"identifier":[{{"system":"urn:oid:2.16.840.1.113883.19.5.4","value":"NOTE-{visit.id}"}}]'
        f',"status":"current","docStatus":"final","type":{_NOTE},"category":[{_CLINICAL_NOTE}]'
        f',"subject":{person.subject},"date":"{date_time(visit.end)}"'
        f',"author":[{{"reference":"Practitioner/{visit.practitioner}"}}]'
        f',"custodian":{{"reference":"Organization/{visit.organization}"}}'
        f',"content":[{{"attachment":{{"contentType":"text/plain; charset=utf-8","data":"{data}"}},'
        f'"format":{{"system":"http://ihe.net/fhir/ihe.formatcode.fhir/CodeSystem/formatcode",'
        f'"code":"urn:ihe:iti:xds:2017:mimeTypeSufficient","display":"mimeType Sufficient"}}}}]'
        f',"context":{{"encounter":[{visit.encounter}],'
        f'"period":{{"start":"{date_time(visit.start)}","end":"{date_time(visit.end)}"}}}}}}',
    )
