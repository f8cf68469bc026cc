"""Valid resources with what Synthea's lack: contained resources, several codings and reasons, offsets, partial dates.

Some were entered in error, and some results are outside of their ranges.
"""

from collections.abc import Iterator
from typing import Any

from fhir_assets_tests.support.clinical.people import RACE
from fhir_assets_tests.support.clinical.questions import CVX, ICD10, LOINC, RXNORM, SNOMED, Resource

HL7 = "http://terminology.hl7.org/CodeSystem"
UCUM = "http://unitsofmeasure.org"
LOCAL = "http://hospital.test/codes"


def build_resources() -> Iterator[Resource]:
    """Yield all resources, with a version and a time of their last update."""
    for build in (_patients, _encounters, _conditions, _observations, _procedures, _medications, _others):
        for resource in build():
            meta = {"versionId": "1", "lastUpdated": "2024-01-01T00:00:00Z"}
            yield {"resourceType": resource["resourceType"], "id": resource["id"], "meta": meta, **resource}


def _resource(resource_type: str, identity: str, **elements: Any) -> Resource:
    return {"resourceType": resource_type, "id": identity, **elements}


def _coded(*codes: tuple[str, str], **elements: Any) -> Resource:
    return {"coding": [{"system": system, "code": code} for system, code in codes], **elements}


def _refer(*references: str) -> list[Resource]:
    return [{"reference": reference} for reference in references]


def _mg(value: float | str, unit: str = "mg") -> Resource:
    return {"value": value, "unit": unit, "system": UCUM, "code": unit}


def _patients() -> Iterator[Resource]:
    record_number = {"type": _coded((f"{HL7}/v2-0203", "MR")), "system": "urn:oid:1.2.3", "value": "1"}
    races = [
        {"url": "ombCategory", "valueCoding": {"system": "urn:oid:2.16.840.1.113883.6.238", "code": "2106-3"}},
        {"url": "detailed", "valueCoding": {"system": "urn:oid:2.16.840.1.113883.6.238", "code": "1004-1"}},
        {"url": "text", "valueString": "Mixed"},
    ]
    yield _resource("Patient", "p1", gender="male", birthDate="1980", identifier=[record_number])
    yield _resource(
        "Patient",
        "p2",
        gender="female",
        birthDate="1975-05",
        identifier=[{**record_number, "value": "2"}, {"system": "urn:oid:1.2.4", "value": "2"}],
        extension=[{"url": RACE, "extension": races}],
    )
    yield _resource("Patient", "p3", gender="female", birthDate="2000-02-29", deceasedBoolean=False)
    yield _resource("Patient", "p4", birthDate="1980-12-31", deceasedDateTime="2021-03-01T23:30:00-05:00")
    yield _resource("Patient", "p5", gender="unknown", deceasedBoolean=True)


def _encounters() -> Iterator[Resource]:
    def stay(identity: str, patient: str, kind: str, start: str, end: str | None = None, **more: Any) -> Resource:
        period = {"start": start, **({"end": end} if end else {})}
        coding = {"system": f"{HL7}/v3-ActCode", "code": kind}
        elements = {"status": "finished", "class": coding, "subject": {"reference": f"Patient/{patient}"}}
        return _resource("Encounter", identity, **{**elements, "period": period, **more})

    reasons = {
        "reasonCode": [_coded((SNOMED, "25064002")), {"text": "fell"}],
        "reasonReference": _refer("Condition/c1", "Procedure/pr1", "Condition/c2"),
    }
    parts = [
        {"type": [_coded((f"{HL7}/v3-ParticipationType", kind))], "individual": {"reference": "Practitioner/d1"}}
        for kind in ("ATND", "ADM", "ATND")
    ]
    # The clock of New York changes during this stay.
    yield stay(
        "e1", "p1", "IMP", "2020-03-07T22:00:00-05:00", "2020-03-09T08:00:00-04:00", participant=parts, **reasons
    )
    yield stay("e2", "p1", "IMP", "2020-04-08T08:00:00-04:00", "2020-04-08T09:00:00-04:00")
    yield stay("e3", "p1", "EMER", "2020-04-08T13:00:01Z", "2020-04-08T14:00:00Z")
    yield stay("e4", "p2", "IMP", "2020-01-01", "2020-01-02", status="entered-in-error", **reasons)
    yield stay("e5", "p3", "AMB", "2020-03-01T00:30:00+13:00", participant=[{"individual": {"display": "Dr. X"}}])
    yield stay("e6", "p3", "IMP", "2020-05", "2020-06")
    yield stay("e7", "p3", "IMP", "2020-06-30T23:59:59.500-01:00")


def _conditions() -> Iterator[Resource]:
    def condition(identity: str, patient: str, codes: Resource, clinical: str = "active", **more: Any) -> Resource:
        status = _coded((f"{HL7}/condition-clinical", clinical))
        return _resource(
            "Condition",
            identity,
            **{"clinicalStatus": status, "code": codes, "subject": {"reference": f"Patient/{patient}"}, **more},
        )

    def verified(code: str) -> Resource:
        return _coded((f"{HL7}/condition-ver-status", code))

    pressure = _coded((LOCAL, "HTN"), (ICD10, "I10"), (SNOMED, "59621000"))
    pressure["coding"][1]["userSelected"] = True
    yield condition("c1", "p1", pressure, onsetDateTime="2019")
    yield condition("c2", "p2", _coded((SNOMED, "44054006")), "recurrence", onsetPeriod={"start": "2018-05"})
    wrong = _resource("Condition", "c3", code=pressure, subject={"reference": "Patient/p3"}, onsetDateTime="2020-01-01")
    yield {**wrong, "verificationStatus": verified("entered-in-error")}
    yield condition("c4", "p3", pressure, verificationStatus=verified("refuted"), onsetDateTime="2020-05-01T23:30:00Z")
    yield _resource("Condition", "c5", code={"text": "tired"}, subject={"reference": "Patient/p4"})
    moment = "2020-05-01T02:30:00+05:30"
    yield condition("c6", "p4", _coded((ICD10, "I10")), "resolved", onsetDateTime=moment, abatementDateTime="2021")
    yield condition("c7", "p2", _coded((SNOMED, "38341003"), (SNOMED, "59621000")), onsetAge=_mg(40, "a"))


def _observations() -> Iterator[Resource]:
    def result(identity: str, patient: str, codes: Resource, **more: Any) -> Resource:
        elements = {"status": "final", "code": codes, "subject": {"reference": f"Patient/{patient}"}}
        return _resource("Observation", identity, **{**elements, **more})

    glucose = _coded((LOCAL, "GLU"), (LOINC, "2339-0"), (LOINC, "2345-7"))
    kinds = f"{HL7}/v3-ObservationInterpretation"
    ranges = [{"low": _mg(70), "high": _mg(110)}, {"high": _mg(99.5)}, {"text": "fasting"}]
    yield result("o1", "p1", glucose, effectiveDateTime="2020-01-01", valueQuantity=_mg(100.10), referenceRange=ranges)
    late = {"effectiveDateTime": "2020-01-01T23:30:00-05:00", "valueQuantity": _mg(100.20)}
    yield result("o2", "p1", glucose, **late, interpretation=[_coded((kinds, "H")), _coded((kinds, "U"))])
    yield result("o3", "p1", glucose, status="entered-in-error", effectiveDateTime="2021", valueQuantity=_mg(900))
    yield result("o4", "p1", glucose, effectiveDateTime="2020-01-02T04:30:00Z", valueQuantity=_mg(95))
    unsure = {**_mg(5), "comparator": "<"}
    yield result("o5", "p2", glucose, effectivePeriod={"start": "2020-03"}, valueQuantity=unsure, referenceRange=ranges)
    yield result("o6", "p2", glucose, valueQuantity=_mg(1e-7), referenceRange=ranges)
    panel = _coded((LOINC, "85354-9"))
    parts = [
        {"code": _coded((LOCAL, "SYS"), (LOINC, "8480-6")), "valueQuantity": _mg(120, "mm[Hg]")},
        {"code": _coded((LOINC, "8462-4")), "valueQuantity": _mg(79.5, "mm[Hg]")},
    ]
    yield result("o7", "p2", panel, effectiveDateTime="2020-02-02T10:00:00+01:00", component=parts)
    yield result("o8", "p2", panel, status="entered-in-error", component=parts)
    missing = _coded((f"{HL7}/data-absent-reason", "unknown"))
    yield result("o9", "p3", panel, component=[parts[0], {"code": parts[1]["code"], "dataAbsentReason": missing}])
    smoker = _coded((SNOMED, "266919005"), (LOINC, "LA18978-9"))
    yield result("o10", "p3", _coded((LOINC, "72166-2")), valueCodeableConcept=smoker)
    yield result("o11", "p4", {"text": "mood"}, valueString="well", interpretation=[{"text": "fine"}])


def _procedures() -> Iterator[Resource]:
    def procedure(identity: str, patient: str, **more: Any) -> Resource:
        elements = {"status": "completed", "code": _coded((LOCAL, "1"), (SNOMED, "80146002"))}
        return _resource("Procedure", identity, **{**elements, "subject": {"reference": f"Patient/{patient}"}, **more})

    two = _refer("Condition/c1", "Condition/c2", "Observation/o1")
    yield procedure("pr1", "p1", performedDateTime="2020-01-01T23:30:00-05:00", reasonReference=two)
    yield procedure("pr2", "p2", performedPeriod={"start": "2020-01-01", "end": "2020-01-02"}, reasonReference=two[:1])
    yield procedure("pr3", "p3", status="entered-in-error", performedDateTime="2020-01")
    yield procedure(
        "pr4", "p3", performedString="last summer", reasonCode=[{"text": "pain"}, _coded((SNOMED, "22253000"))]
    )
    yield procedure("pr5", "p3", performedDateTime="2020", reasonReference=_refer("Condition/gone"))


def _medications() -> Iterator[Resource]:
    aspirin = _coded((LOCAL, "ASA"), (RXNORM, "1191"), (RXNORM, "243670"))

    def request(identity: str, patient: str, **more: Any) -> Resource:
        elements = {"status": "active", "intent": "order", "subject": {"reference": f"Patient/{patient}"}}
        return _resource("MedicationRequest", identity, **{**elements, **more})

    twice = {"timing": {"repeat": {"frequency": 2, "period": 1, "periodUnit": "d"}}, "asNeededBoolean": False}
    doses = [{**twice, "doseAndRate": [{"doseQuantity": _mg(0.5)}]}, {"asNeededBoolean": True}]
    reasons = _refer("Condition/c1", "Observation/o2", "Condition/c2")
    contained = [{"resourceType": "Medication", "id": "med", "code": aspirin}]
    inside = {"contained": contained, "medicationReference": {"reference": "#med"}}
    yield _resource("Medication", "m1", status="active", code=_coded((RXNORM, "860975")))
    yield request("mr1", "p1", medicationCodeableConcept=aspirin, dosageInstruction=doses, reasonReference=reasons)
    yield request("mr2", "p1", **inside, reasonReference=reasons[:2])
    yield request("mr3", "p1", medicationReference={"reference": "Medication/m1"}, status="stopped")
    yield request("mr4", "p2", medicationReference={"reference": "Medication/gone"})
    yield request("mr5", "p2", **inside, status="entered-in-error")
    yield request("mr6", "p2", medicationCodeableConcept={"text": "herbs"}, intent="proposal")


def _others() -> Iterator[Resource]:
    flu = _coded((CVX, "140"))
    for number, (status, patient, given) in enumerate(
        [
            ("completed", "p1", "2019-12-31T23:30:00-05:00"),
            ("completed", "p2", "2020"),
            ("completed", "p2", "2020-11"),
            ("not-done", "p3", "2020-01-01"),
            ("entered-in-error", "p4", "2020-01-01"),
        ]
    ):
        elements = {"patient": {"reference": f"Patient/{patient}"}, "occurrenceDateTime": given, "vaccineCode": flu}
        yield _resource("Immunization", f"i{number}", status=status, **elements)
    first = {"reference": "Patient/p1"}
    found = _refer("Observation/o1", "Observation/o2", "Observation/gone")
    report = {"status": "final", "code": _coded((LOINC, "24323-8")), "subject": first, "result": found}
    yield _resource("DiagnosticReport", "dr1", **report)
    reaction = {"manifestation": [_coded((SNOMED, "271807003")), _coded((SNOMED, "39579001"))], "severity": "severe"}
    milder = {"manifestation": [{"text": "itch"}]}
    active = _coded((f"{HL7}/allergyintolerance-clinical", "active"))
    nuts = {"code": _coded((SNOMED, "91934008")), "patient": first}
    yield _resource("AllergyIntolerance", "a1", **nuts, clinicalStatus=active, reaction=[reaction, milder])
    yield _resource("AllergyIntolerance", "a2", **nuts, clinicalStatus=active)
    wrong = _coded((f"{HL7}/allergyintolerance-verification", "entered-in-error"))
    yield _resource("AllergyIntolerance", "a3", **nuts, verificationStatus=wrong)
    order = {"status": "active", "intent": "order", "code": _coded((LOINC, "24323-8")), "subject": first}
    yield _resource("ServiceRequest", "s1", **order, reasonReference=_refer("Condition/c1", "Condition/c6"))
    yield from _claims(first)


def _claims(patient: Resource) -> Iterator[Resource]:
    common = {
        "status": "active",
        "type": _coded((f"{HL7}/claim-type", "professional")),
        "use": "claim",
        "patient": patient,
        "created": "2020-01-01",
        "provider": {"display": "A clinic"},
    }
    coverage = {
        "resourceType": "Coverage",
        "id": "cov",
        "status": "active",
        "beneficiary": patient,
        "payor": [{"display": "Humana"}],
    }
    for number, amount in enumerate((0.10, 0.20, None)):
        payment = {"payment": {"amount": {"value": amount, "currency": "USD"}}} if amount else {}
        yield _resource(
            "ExplanationOfBenefit",
            f"eob{number}",
            **common,
            **payment,
            contained=[coverage],
            insurer={"display": "Humana"},
            outcome="complete",
            insurance=[
                {"focal": False, "coverage": {"display": "Other"}},
                {"focal": True, "coverage": {"reference": "#cov"}},
            ],
        )
    product = {"productOrService": _coded((SNOMED, "80146002"))}
    yield _resource(
        "Claim",
        "cl1",
        **common,
        priority=_coded((f"{HL7}/processpriority", "normal")),
        insurance=[{"sequence": 1, "focal": True, "coverage": {"display": "Humana"}}],
        diagnosis=[
            {"sequence": 2, "diagnosisReference": {"reference": "Condition/c1"}},
            {"sequence": 5, "diagnosisReference": {"reference": "Condition/c2"}},
            {"sequence": 7, "diagnosisCodeableConcept": _coded((ICD10, "I10"))},
        ],
        item=[
            {"sequence": 1, **product, "diagnosisSequence": [5, 2]},
            {"sequence": 2, **product},
            {"sequence": 3, **product, "diagnosisSequence": [7]},
        ],
    )
