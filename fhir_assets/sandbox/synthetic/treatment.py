"""Medication requests, dispenses, statements and administrations; immunizations; devices."""

from fhir_assets.sandbox.synthetic.clock import DAY, DAYS, date_time, day_of
from fhir_assets.sandbox.synthetic.codes import (
    DEVICES,
    EMERGENCY,
    MEDICATIONS,
    SNOMED,
    UCUM,
    VACCINES,
    Disorder,
    concept,
    hl7,
)
from fhir_assets.sandbox.synthetic.people import Person, Resources, Visit, pick

_ORAL = concept(SNOMED, "26643006", "Oral route")
_INTRAMUSCULAR = hl7("v3-RouteOfAdministration", "IM", "Injection, intramuscular")
_LEFT_ARM = hl7("v3-ActSite", "LA", "left arm")
_OUTPATIENT = hl7("medicationrequest-category", "outpatient", "Outpatient")
_ORDERED = hl7("dose-rate-type", "ordered", "Ordered")
_IMMUNE = hl7("v3-ActReason", "IMMUNE", "immunity")


def generate_medication(person: Person, visit: Visit, disorder: Disorder, condition: str) -> Resources:
    """Yield the resources of a medication for a disorder.

    The first is always a MedicationRequest. A MedicationDispense is frequent; a MedicationStatement is added for a
    chronic disorder, and a MedicationAdministration for an emergency or a stay in hospital. ``condition`` is the id of
    the Condition.
    """
    random = person.random
    drug = MEDICATIONS[disorder.medication]
    code = f'"medicationCodeableConcept":{drug.code}'
    reference = (
        f'"medicationReference":{{"reference":"Medication/{person.population}-med-{disorder.medication}",'
        f'"display":"{drug.name}"}}'
    )
    request_id = person.new_id("mr")
    days = 90 if disorder.chronic else 10
    amount = days * drug.daily
    text = f"Take 1 {drug.unit} {drug.daily} times a day by mouth" if drug.daily > 1 else f"1 {drug.unit} daily"
    dosage = (
        f'{{"sequence":1,"text":"{text}","timing":{{"repeat":{{"frequency":{drug.daily},"period":1,"periodUnit":"d"}}}}'
        f',"asNeededBoolean":false,"route":{_ORAL},"doseAndRate":[{{"type":{_ORDERED},'
        f'"doseQuantity":{{"value":1.0,"unit":"{drug.unit}"}}}}]}}'
    )
    written = date_time(visit.end)
    yield (
        "MedicationRequest",
        person.head("MedicationRequest", request_id, visit.updated)
        + f',"identifier":[{{"system":"urn:oid:2.16.840.1.113883.19.5.7","value":"RX-{request_id}"}}]'
        f',"status":"{"active" if disorder.chronic else "completed"}","intent":"order","category":[{_OUTPATIENT}]'
        f',{code if random.random() < 0.7 else reference},"subject":{person.subject},"encounter":{visit.encounter}'
        f',"authoredOn":"{written}","requester":{{"reference":"Practitioner/{visit.practitioner}"}}'
        f',"reasonReference":[{{"reference":"Condition/{condition}"}}],"dosageInstruction":[{dosage}]'
        f',"dispenseRequest":{{"numberOfRepeatsAllowed":{3 if disorder.chronic else 0},'
        f'"quantity":{{"value":{amount},"unit":"{drug.unit}"}},'
        f'"expectedSupplyDuration":{{"value":{days},"unit":"days","system":"{UCUM}","code":"d"}}}}}}',
    )
    if random.random() < 0.6:
        prepared = visit.end + int(random.random() * 3600)
        yield (
            "MedicationDispense",
            person.head("MedicationDispense", person.new_id("md"), visit.updated)
            + f',"status":"completed",{code},"subject":{person.subject},"context":{visit.encounter}'
            f',"performer":[{{"actor":{{"reference":"Organization/{visit.organization}"}}}}]'
            f',"authorizingPrescription":[{{"reference":"MedicationRequest/{request_id}"}}]'
            f',"quantity":{{"value":{amount},"unit":"{drug.unit}"}}'
            f',"daysSupply":{{"value":{days},"unit":"days","system":"{UCUM}","code":"d"}}'
            f',"whenPrepared":"{date_time(prepared)}","whenHandedOver":"{date_time(prepared + 900)}"'
            f',"dosageInstruction":[{dosage}]}}',
        )
    if disorder.chronic:
        yield (
            "MedicationStatement",
            person.head("MedicationStatement", person.new_id("ms"), visit.updated)
            + f',"basedOn":[{{"reference":"MedicationRequest/{request_id}"}}],"status":"active",{code}'
            f',"subject":{person.subject},"context":{visit.encounter}'
            f',"effectivePeriod":{{"start":"{day_of(visit.end)}"}},"dateAsserted":"{written}"'
            f',"informationSource":{person.subject},"dosage":[{dosage}]}}',
        )
    if visit.kind_index >= EMERGENCY and visit.kind.minutes > 100:
        given_at = visit.start + 1800
        yield (
            "MedicationAdministration",
            person.head("MedicationAdministration", person.new_id("ma"), visit.updated)
            + f',"status":"completed",{code},"subject":{person.subject},"context":{visit.encounter}'
            f',"effectiveDateTime":"{date_time(given_at)}"'
            f',"performer":[{{"actor":{{"reference":"Practitioner/{visit.practitioner}"}}}}]'
            f',"request":{{"reference":"MedicationRequest/{request_id}"}}'
            f',"dosage":{{"text":"{text}","route":{_ORAL},"dose":{{"value":1,"unit":"{drug.unit}"}}}}}}',
        )


def generate_immunization(person: Person, visit: Visit) -> Resources:
    """Yield the Immunization of a visit. One in twenty has the status ``not-done``."""
    random = person.random
    refused = random.random() < 0.05
    reason = f',"statusReason":{_IMMUNE}' if refused else ""
    details = "" if refused else (
        f',"lotNumber":"LOT{int(random.random() * 9000)}","expirationDate":"{DAYS[visit.start // DAY + 400]}"'
        f',"site":{_LEFT_ARM},"route":{_INTRAMUSCULAR}'
        f',"doseQuantity":{{"value":0.50,"unit":"mL","system":"{UCUM}","code":"mL"}}'
        f',"performer":[{{"actor":{{"reference":"Practitioner/{visit.practitioner}"}}}}]'
    )  # fmt: skip
    yield (
        "Immunization",
        person.head("Immunization", person.new_id("im"), visit.updated)
        + f',"status":"{"not-done" if refused else "completed"}"{reason},"vaccineCode":{pick(random, VACCINES)}'
        f',"patient":{person.subject},"encounter":{visit.encounter},"occurrenceDateTime":"{date_time(visit.start)}"'
        f',"primarySource":true,"location":{{"reference":"Location/{visit.location}"}}{details}}}',
    )


def generate_device(person: Person, visit: Visit) -> Resources:
    """Yield a Device of the patient, with its unique device identifier (UDI)."""
    name, kind = pick(person.random, DEVICES)
    device_id = person.new_id("dev")
    serial = f"{person.number:06}{person.serial:03}"
    yield (
        "Device",
        person.head("Device", device_id, visit.updated)
        + f',"identifier":[{{"system":"urn:oid:2.16.840.1.113883.19.5.8","value":"{device_id}"}}]'
        f',"udiCarrier":[{{"deviceIdentifier":"0084000{person.number % 9_999_999:07}",'
        f'"carrierHRF":"(01)0084000{person.number % 9_999_999:07}(21){serial}"}}],"status":"active"'
        f',"manufactureDate":"{DAYS[visit.start // DAY - 200]}","serialNumber":"{serial}"'
        f',"deviceName":[{{"name":"{name}","type":"user-friendly-name"}}],"type":{kind},"patient":{person.subject}}}',
    )
