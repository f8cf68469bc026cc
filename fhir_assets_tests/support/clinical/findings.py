"""Questions about conditions, observations, reports and allergies."""

from collections import defaultdict
from collections.abc import Iterator
from datetime import datetime
from decimal import Decimal

from fhir_assets_tests.support.clinical.questions import (
    ERROR,
    ICD10,
    LOINC,
    SNOMED,
    Hospital,
    Resource,
    Row,
    code,
    codings,
    day,
    instant,
    key,
    offset,
    precision,
    question,
    tally,
)

ACTIVE = ("active", "recurrence", "relapse")
HYPERTENSION = ("59621000", "38341003", "I10")


def list_valid_conditions(hospital: Hospital) -> list[Resource]:
    """Return the conditions that were not entered in error."""
    return [item for item in hospital.all("Condition") if code(item.get("verificationStatus")) != ERROR]


def find_onset(condition: Resource) -> str | None:
    """Return the dateTime of a condition's onset, or the start of its period."""
    start: str | None = condition.get("onsetDateTime") or condition.get("onsetPeriod", {}).get("start")
    return start


def find_effective(observation: Resource) -> str | None:
    """Return the time of an observation, or the start of its period."""
    start: str | None = (
        observation.get("effectiveDateTime")
        or observation.get("effectivePeriod", {}).get("start")
        or observation.get("effectiveInstant")
    )
    return start


@question(
    """
    SELECT snomed_code, count(*)
    FROM fhir.condition
    WHERE clinical_status IN ('active', 'recurrence', 'relapse')
        AND verification_status IS DISTINCT FROM 'entered-in-error'
        AND verification_status IS DISTINCT FROM 'refuted'
    GROUP BY 1
    """
)
def active_conditions(hospital: Hospital) -> Iterator[Row]:
    """How many conditions of each SNOMED CT code are active?"""
    return tally(
        code(condition["code"], SNOMED)
        for condition in hospital.all("Condition")
        if code(condition.get("clinicalStatus")) in ACTIVE
        and code(condition.get("verificationStatus")) not in (ERROR, "refuted")
    )


@question("SELECT system, code, user_selected, count(*) FROM fhir.condition_code_coding GROUP BY 1, 2, 3")
def every_coding_of_conditions(hospital: Hospital) -> Iterator[Row]:
    """How often is each code used, of all codings of a condition?"""
    return tally(
        (coding.get("system"), coding.get("code"), coding.get("userSelected"))
        for condition in hospital.all("Condition")
        for coding in codings(condition["code"])
    )


@question(
    """
    SELECT onset_start_date, onset_start_precision, count(*)
    FROM fhir.condition
    WHERE onset_start IS NOT NULL AND verification_status IS DISTINCT FROM 'entered-in-error'
    GROUP BY 1, 2
    """
)
def conditions_by_day_of_onset(hospital: Hospital) -> Iterator[Row]:
    """How many conditions began on each day of the source's calendar, and how exactly is it known?"""
    onsets = (find_onset(condition) for condition in list_valid_conditions(hospital))
    return tally((day(text), precision(text)) for text in onsets if text)


@question("SELECT id, onset_start, onset_start_offset FROM fhir.condition WHERE onset_start IS NOT NULL")
def instants_and_offsets_of_onset(hospital: Hospital) -> Iterator[Row]:
    """At which instant did each condition begin, and which offset from UTC was written?"""
    for condition in hospital.all("Condition"):
        if text := find_onset(condition):
            yield condition["id"], instant(text), offset(text)


@question(
    """
    SELECT count(DISTINCT c.patient_key)
    FROM fhir.condition c
    JOIN fhir.condition_code_coding k ON k.condition_key = c.id
    WHERE k.code IN ('59621000', '38341003', 'I10')
        AND k.system IN ('http://snomed.info/sct', 'http://hl7.org/fhir/sid/icd-10-cm')
        AND c.verification_status IS DISTINCT FROM 'entered-in-error'
    """
)
def patients_with_hypertension(hospital: Hospital) -> Iterator[Row]:
    """How many patients have hypertension, in whichever coding?"""
    patients = {
        key(condition["subject"], "Patient")
        for condition in list_valid_conditions(hospital)
        for coding in codings(condition["code"])
        if coding.get("code") in HYPERTENSION and coding.get("system") in (SNOMED, ICD10)
    }
    yield (len(patients - {None}),)


@question(
    """
    SELECT code, count(DISTINCT observation_key)
    FROM fhir.observation_code_coding
    WHERE system = 'http://loinc.org' AND status IS DISTINCT FROM 'entered-in-error'
    GROUP BY 1
    """
)
def observations_by_any_loinc_code(hospital: Hospital) -> Iterator[Row]:
    """How many observations have each LOINC code, also as a second coding?"""
    return tally(
        loinc
        for observation in hospital.valid("Observation")
        for loinc in {coding["code"] for coding in codings(observation["code"], LOINC)}
    )


@question(
    """
    SELECT patient_key, loinc_code, id, value_quantity_value, value_quantity_unit
    FROM (
        SELECT *, row_number() OVER (PARTITION BY patient_key, loinc_code ORDER BY effective_start DESC, id) AS place
        FROM fhir.observation
        WHERE status IS DISTINCT FROM 'entered-in-error'
            AND value_quantity_value IS NOT NULL
            AND effective_start IS NOT NULL
            AND loinc_code IS NOT NULL
            AND patient_key IS NOT NULL
    ) numbered
    WHERE place = 1
    """
)
def last_value_of_each_patient(hospital: Hospital) -> Iterator[Row]:
    """Which value of each LOINC code was measured last, for each patient?"""
    last: dict[tuple[str, str], tuple[datetime, Resource]] = {}
    for item in sorted(hospital.valid("Observation"), key=lambda observation: str(observation["id"])):
        patient, loinc, text = key(item.get("subject"), "Patient"), code(item["code"], LOINC), find_effective(item)
        if not (patient and loinc and text and "value" in item.get("valueQuantity", {})):
            continue
        if (patient, loinc) not in last or instant(text) > last[patient, loinc][0]:
            last[patient, loinc] = instant(text), item
    for (patient, loinc), (_, item) in last.items():
        yield patient, loinc, item["id"], item["valueQuantity"]["value"], item["valueQuantity"].get("unit")


@question(
    """
    SELECT s.observation_key, s.value_quantity_value, d.value_quantity_value
    FROM fhir.observation_component s
    JOIN fhir.observation_component d ON d.observation_key = s.observation_key
    WHERE s.loinc_code = '8480-6' AND d.loinc_code = '8462-4' AND s.status IS DISTINCT FROM 'entered-in-error'
    """
)
def blood_pressures(hospital: Hospital) -> Iterator[Row]:
    """Which systolic and diastolic blood pressures were measured together?"""
    for observation in hospital.valid("Observation"):
        values = {
            code(part["code"], LOINC): part.get("valueQuantity", {}).get("value")
            for part in observation.get("component", [])
        }
        if {"8480-6", "8462-4"} <= values.keys():
            yield observation["id"], values["8480-6"], values["8462-4"]


@question(
    """
    SELECT loinc_code, value_quantity_unit, count(*), sum(value_quantity_value), max(value_quantity_value)
    FROM fhir.observation
    WHERE value_quantity_value IS NOT NULL AND value_quantity_comparator IS NULL
    GROUP BY 1, 2
    """
)
def sums_of_values(hospital: Hospital) -> Iterator[Row]:
    """How many values of each code and unit are there, and what is their exact sum and their maximum?"""
    values: dict[Row, list[Decimal]] = defaultdict(list)
    for observation in hospital.all("Observation"):
        quantity = observation.get("valueQuantity", {})
        if "value" in quantity and "comparator" not in quantity:
            values[code(observation["code"], LOINC), quantity.get("unit")].append(Decimal(quantity["value"]))
    for group, numbers in values.items():
        yield (*group, len(numbers), sum(numbers), max(numbers))


@question("SELECT observation_key, index, interpretation_code FROM fhir.observation_interpretation")
def every_interpretation(hospital: Hospital) -> Iterator[Row]:
    """How was each result interpreted, in all of its interpretations?"""
    for observation in hospital.all("Observation"):
        for index, concept in enumerate(observation.get("interpretation", [])):
            yield observation["id"], index, code(concept)


@question("SELECT system, code, count(*) FROM fhir.observation_value_coding GROUP BY 1, 2")
def coded_results(hospital: Hospital) -> Iterator[Row]:
    """How often was each coded result found, in all of its codings?"""
    return tally(
        (coding.get("system"), coding.get("code"))
        for observation in hospital.all("Observation")
        for coding in codings(observation.get("valueCodeableConcept"))
    )


@question(
    """
    SELECT DISTINCT o.id
    FROM fhir.observation o
    JOIN fhir.observation_reference_range r ON r.observation_key = o.id
    WHERE (o.value_quantity_value < r.low_value OR o.value_quantity_value > r.high_value)
        AND o.status IS DISTINCT FROM 'entered-in-error'
    """
)
def values_outside_a_range(hospital: Hospital) -> Iterator[Row]:
    """Which values are outside one of their reference ranges?"""
    for observation in hospital.valid("Observation"):
        value = observation.get("valueQuantity", {}).get("value")
        ranges = observation.get("referenceRange", []) if value is not None else []
        if any(
            value < limits.get("low", {}).get("value", value) or value > limits.get("high", {}).get("value", value)
            for limits in ranges
        ):
            yield (observation["id"],)


@question(
    """
    SELECT r.diagnostic_report_key, count(*), count(o.id)
    FROM fhir.diagnostic_report_result r
    LEFT JOIN fhir.observation o ON o.id = r.observation_key
    GROUP BY 1
    """
)
def results_of_reports(hospital: Hospital) -> Iterator[Row]:
    """How many results has each report, and how many of them are there?"""
    present = hospital.by_id("Observation")
    for report in hospital.all("DiagnosticReport"):
        if results := report.get("result", []):
            yield report["id"], len(results), sum(key(result, "Observation") in present for result in results)


@question(
    """
    SELECT a.patient_key, a.code, r.manifestation_code, r.severity
    FROM fhir.allergy_intolerance a
    LEFT JOIN fhir.allergy_intolerance_reaction r ON r.allergy_intolerance_key = a.id
    WHERE a.verification_status IS DISTINCT FROM 'entered-in-error'
    """
)
def allergies_and_reactions(hospital: Hospital) -> Iterator[Row]:
    """Which allergies have patients, and which reactions, if any, were observed?"""
    for allergy in hospital.all("AllergyIntolerance"):
        if code(allergy.get("verificationStatus")) == ERROR:
            continue
        for reaction in allergy.get("reaction") or [{}]:
            manifestation = code(reaction.get("manifestation", [None])[0])
            yield key(allergy["patient"], "Patient"), code(allergy["code"]), manifestation, reaction.get("severity")
