"""Questions about patients and encounters."""

from collections.abc import Iterator
from datetime import timedelta

from fhir_assets_tests.support.clinical.questions import (
    Hospital,
    Row,
    code,
    day,
    instant,
    key,
    precision,
    question,
    tally,
)

RACE = "http://hl7.org/fhir/us/core/StructureDefinition/us-core-race"


@question("SELECT gender, EXTRACT(year FROM birth_date), count(*) FROM fhir.patient GROUP BY 1, 2")
def patients_by_gender_and_year_of_birth(hospital: Hospital) -> Iterator[Row]:
    """How many patients of each gender were born in each year?"""
    return tally(
        (patient.get("gender"), int(patient["birthDate"][:4]) if "birthDate" in patient else None)
        for patient in hospital.all("Patient")
    )


@question(
    "SELECT birth_date, birth_date_precision, count(*) FROM fhir.patient WHERE birth_date IS NOT NULL GROUP BY 1, 2"
)
def dates_of_birth(hospital: Hospital) -> Iterator[Row]:
    """On which day were patients born, and how exactly is it known?"""
    dates = (patient["birthDate"] for patient in hospital.all("Patient") if "birthDate" in patient)
    return tally((day(text), precision(text)) for text in dates)


@question(
    """
    SELECT id, deceased_date_time_date
    FROM fhir.patient
    WHERE deceased_boolean OR deceased_date_time IS NOT NULL
    """
)
def deaths(hospital: Hospital) -> Iterator[Row]:
    """Which patients have died, and on which day?"""
    for patient in hospital.all("Patient"):
        if patient.get("deceasedBoolean") or patient.get("deceasedDateTime"):
            yield patient["id"], day(patient.get("deceasedDateTime"))


@question("SELECT code, count(DISTINCT patient_key) FROM fhir.patient_race GROUP BY 1")
def every_race(hospital: Hospital) -> Iterator[Row]:
    """How many patients have each race, if all that they state count?"""
    return tally(
        race
        for patient in hospital.all("Patient")
        for race in {
            part["valueCoding"]["code"]
            for extension in patient.get("extension", [])
            if extension["url"] == RACE
            for part in extension["extension"]
            if part["url"] in ("ombCategory", "detailed")
        }
    )


@question("SELECT type_code, system, count(*) FROM fhir.patient_identifier GROUP BY 1, 2")
def identifiers(hospital: Hospital) -> Iterator[Row]:
    """How many identifiers of each kind and system are there?"""
    return tally(
        (code(identifier.get("type")), identifier.get("system"))
        for patient in hospital.all("Patient")
        for identifier in patient.get("identifier", [])
    )


@question(
    """
    SELECT p.id
    FROM fhir.patient p
    WHERE NOT EXISTS (
        SELECT 1
        FROM fhir.encounter e
        WHERE e.patient_key = p.id AND e.status IS DISTINCT FROM 'entered-in-error'
    )
    """
)
def patients_without_an_encounter(hospital: Hospital) -> Iterator[Row]:
    """Which patients have no encounter?"""
    seen = {key(encounter.get("subject"), "Patient") for encounter in hospital.valid("Encounter")}
    return ((patient["id"],) for patient in hospital.all("Patient") if patient["id"] not in seen)


@question(
    """
    SELECT class_code, EXTRACT(year FROM period_start_date), EXTRACT(month FROM period_start_date), count(*)
    FROM fhir.encounter
    WHERE status IS DISTINCT FROM 'entered-in-error' AND period_start IS NOT NULL
    GROUP BY 1, 2, 3
    """
)
def encounters_by_class_and_month(hospital: Hospital) -> Iterator[Row]:
    """How many encounters of each class began in each month, by the calendar of the source?"""
    return tally(
        (encounter["class"]["code"], start.year, start.month)
        for encounter in hospital.valid("Encounter")
        if (start := day(encounter.get("period", {}).get("start")))
    )


@question(
    """
    SELECT id, CAST(EXTRACT(epoch FROM period_end - period_start) AS bigint)
    FROM fhir.encounter
    WHERE period_start_precision = 'instant' AND period_end_precision = 'instant'
    """
)
def seconds_of_each_stay(hospital: Hospital) -> Iterator[Row]:
    """How long was each encounter, across changes of the clock?"""
    for encounter in hospital.all("Encounter"):
        start, end = (encounter.get("period", {}).get(name, "") for name in ("start", "end"))
        if "T" in start and "T" in end:
            yield encounter["id"], int((instant(end) - instant(start)).total_seconds())


@question(
    """
    SELECT encounter_key, reason_code, NULL, NULL
    FROM fhir.encounter_reason
    WHERE status IS DISTINCT FROM 'entered-in-error'
    UNION ALL
    SELECT encounter_key, NULL, condition_key, procedure_key
    FROM fhir.encounter_reason_reference
    WHERE status IS DISTINCT FROM 'entered-in-error'
    """
)
def every_reason_of_encounters(hospital: Hospital) -> Iterator[Row]:
    """For which reasons did encounters take place, if there are several?"""
    for encounter in hospital.valid("Encounter"):
        for concept in encounter.get("reasonCode", []):
            yield encounter["id"], code(concept), None, None
        for reference in encounter.get("reasonReference", []):
            yield encounter["id"], None, key(reference, "Condition"), key(reference, "Procedure")


@question(
    """
    SELECT earlier.id, later.id
    FROM fhir.encounter earlier
    JOIN fhir.encounter later ON later.patient_key = earlier.patient_key
    WHERE earlier.class_code IN ('IMP', 'EMER')
        AND later.class_code IN ('IMP', 'EMER')
        AND earlier.status IS DISTINCT FROM 'entered-in-error'
        AND later.status IS DISTINCT FROM 'entered-in-error'
        AND later.period_start > earlier.period_end
        AND later.period_start <= earlier.period_end + INTERVAL '30 days'
    """
)
def readmissions_within_30_days(hospital: Hospital) -> Iterator[Row]:
    """Which stays were followed by another stay of the patient within 30 days?"""
    stays = [stay for stay in hospital.valid("Encounter") if stay["class"]["code"] in ("IMP", "EMER")]
    for earlier in stays:
        for later in stays:
            end, start = earlier.get("period", {}).get("end"), later.get("period", {}).get("start")
            same = key(earlier.get("subject"), "Patient") == key(later.get("subject"), "Patient")
            if same and end and start and instant(end) < instant(start) <= instant(end) + timedelta(days=30):
                yield earlier["id"], later["id"]


@question(
    "SELECT practitioner_key, type_code, count(DISTINCT encounter_key) FROM fhir.encounter_participant GROUP BY 1, 2"
)
def encounters_of_each_practitioner(hospital: Hospital) -> Iterator[Row]:
    """At how many encounters did each practitioner take part, and as what?"""
    return tally(
        part
        for encounter in hospital.all("Encounter")
        for part in {
            (key(participant.get("individual"), "Practitioner"), code(participant.get("type", [None])[0]))
            for participant in encounter.get("participant", [])
        }
    )
