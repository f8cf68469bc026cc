"""Questions about procedures, medications, immunizations, orders and claims."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from decimal import Decimal

from fhir_assets_tests.support.clinical.questions import (
    CVX,
    RXNORM,
    SNOMED,
    Hospital,
    Resource,
    Row,
    code,
    day,
    key,
    question,
    tally,
)


@question(
    """
    SELECT snomed_code, performed_start_date, count(*)
    FROM fhir.procedure
    WHERE status IS DISTINCT FROM 'entered-in-error'
    GROUP BY 1, 2
    """
)
def procedures_by_day(hospital: Hospital) -> Iterator[Row]:
    """How many procedures of each SNOMED CT code began on each day of the source's calendar?"""
    return tally(
        (
            code(procedure.get("code"), SNOMED),
            day(procedure.get("performedDateTime") or procedure.get("performedPeriod", {}).get("start")),
        )
        for procedure in hospital.valid("Procedure")
    )


@question(
    """
    SELECT r.procedure_key, c.snomed_code, NULL
    FROM fhir.procedure_reason_reference r
    LEFT JOIN fhir.condition c ON c.id = r.condition_key
    UNION ALL
    SELECT procedure_key, NULL, reason_code
    FROM fhir.procedure_reason
    """
)
def every_reason_of_procedures(hospital: Hospital) -> Iterator[Row]:
    """For which conditions, and for which coded reasons, was each procedure done?"""
    conditions = hospital.by_id("Condition")
    for procedure in hospital.all("Procedure"):
        for reference in procedure.get("reasonReference", []):
            condition = conditions.get(key(reference, "Condition") or "", {})
            yield procedure["id"], code(condition.get("code"), SNOMED), None
        for concept in procedure.get("reasonCode", []):
            yield procedure["id"], None, code(concept)


def find_medication(request: Resource, medications: dict[str, Resource]) -> Resource | None:
    """Return the code of a request's medication: its own, or that of a contained or referenced Medication."""
    reference = request.get("medicationReference")
    if reference is None:
        concept: Resource | None = request.get("medicationCodeableConcept")
        return concept
    contained = {f"#{resource.get('id')}": resource for resource in request.get("contained", [])}
    found = contained.get(reference["reference"]) or medications.get(key(reference, "Medication") or "")
    return found.get("code") if found else None


@question(
    """
    SELECT COALESCE(r.rxnorm_code, m.rxnorm_code), count(*)
    FROM fhir.medication_request r
    LEFT JOIN fhir.medication m ON m.id = r.medication_key
    WHERE r.status IS DISTINCT FROM 'entered-in-error'
    GROUP BY 1
    """
)
def prescriptions_by_rxnorm_code(hospital: Hospital) -> Iterator[Row]:
    """How often was each medication prescribed, whether it is coded, contained or a resource of its own?"""
    medications = hospital.by_id("Medication")
    return tally(code(find_medication(item, medications), RXNORM) for item in hospital.valid("MedicationRequest"))


@question(
    """
    SELECT patient_key, count(*)
    FROM fhir.medication_request
    WHERE status = 'active' AND intent <> 'proposal'
    GROUP BY 1
    HAVING count(*) > 1
    """
)
def patients_with_several_active_prescriptions(hospital: Hospital) -> Iterator[Row]:
    """Which patients have more than one active prescription?"""
    counts = Counter(
        key(request["subject"], "Patient")
        for request in hospital.all("MedicationRequest")
        if request.get("status") == "active" and request["intent"] != "proposal"
    )
    return ((patient, count) for patient, count in counts.items() if count > 1)


@question(
    """
    SELECT medication_request_key, index, condition_key, observation_key
    FROM fhir.medication_request_reason_reference
    """
)
def every_reason_of_prescriptions(hospital: Hospital) -> Iterator[Row]:
    """For which conditions or observations was each medication prescribed?"""
    for request in hospital.all("MedicationRequest"):
        for index, reference in enumerate(request.get("reasonReference", [])):
            yield request["id"], index, key(reference, "Condition"), key(reference, "Observation")


@question(
    """
    SELECT medication_request_key, index, timing_frequency, dose_quantity_value, as_needed_boolean
    FROM fhir.medication_request_dosage
    """
)
def dosages(hospital: Hospital) -> Iterator[Row]:
    """How often, how much and whether as needed is each medication taken, in each of its instructions?"""
    for request in hospital.all("MedicationRequest"):
        for index, dosage in enumerate(request.get("dosageInstruction", [])):
            dose = (dosage.get("doseAndRate") or [{}])[0].get("doseQuantity", {}).get("value")
            frequency = dosage.get("timing", {}).get("repeat", {}).get("frequency")
            yield request["id"], index, frequency, dose, dosage.get("asNeededBoolean")


@question(
    """
    SELECT cvx_code, EXTRACT(year FROM occurrence_date_time_date), count(DISTINCT patient_key)
    FROM fhir.immunization
    WHERE status = 'completed'
    GROUP BY 1, 2
    """
)
def immunized_patients(hospital: Hospital) -> Iterator[Row]:
    """How many patients received each vaccine in each year?"""
    patients: dict[Row, set[str | None]] = defaultdict(set)
    for item in hospital.all("Immunization"):
        if item["status"] == "completed":
            given = day(item.get("occurrenceDateTime"))
            group = (code(item["vaccineCode"], CVX), given.year if given else None)
            patients[group].add(key(item["patient"], "Patient"))
    return ((*group, len(found - {None})) for group, found in patients.items())


@question("SELECT service_request_key, condition_key FROM fhir.service_request_reason_reference")
def every_reason_of_orders(hospital: Hospital) -> Iterator[Row]:
    """For which conditions was each order placed?"""
    for request in hospital.all("ServiceRequest"):
        for reference in request.get("reasonReference", []):
            yield request["id"], key(reference, "Condition")


@question(
    """
    SELECT coverage_payor_display, count(*), sum(payment_value)
    FROM fhir.explanation_of_benefit
    GROUP BY 1
    """
)
def payments_by_payer(hospital: Hospital) -> Iterator[Row]:
    """How much did each payer pay, if its coverage is contained in the statement?"""
    payments: dict[str | None, list[Decimal | None]] = defaultdict(list)
    for statement in hospital.all("ExplanationOfBenefit"):
        contained = {f"#{resource.get('id')}": resource for resource in statement.get("contained", [])}
        focal: Resource = next((item for item in statement.get("insurance", []) if item.get("focal")), {})
        coverage = contained.get(focal.get("coverage", {}).get("reference", ""), {})
        payer = next((payor["display"] for payor in coverage.get("payor", []) if "display" in payor), None)
        payments[payer].append(statement.get("payment", {}).get("amount", {}).get("value"))
    for payer, amounts in payments.items():
        paid = [Decimal(amount) for amount in amounts if amount is not None]
        yield payer, len(amounts), sum(paid) if paid else None


@question(
    """
    SELECT i.claim_key, i.item_index, i.diagnosis_sequence, d.condition_key
    FROM fhir.claim_item_diagnosis i
    JOIN fhir.claim_diagnosis d ON d.claim_key = i.claim_key AND d.sequence = i.diagnosis_sequence
    """
)
def diagnoses_of_items(hospital: Hospital) -> Iterator[Row]:
    """Which conditions does each item of a claim name, by the numbers of the claim's diagnoses?"""
    for claim in hospital.all("Claim"):
        diagnoses = {item["sequence"]: item for item in claim.get("diagnosis", [])}
        for index, item in enumerate(claim.get("item", [])):
            for number in item.get("diagnosisSequence", []):
                yield claim["id"], index, number, key(diagnoses[number].get("diagnosisReference"), "Condition")
