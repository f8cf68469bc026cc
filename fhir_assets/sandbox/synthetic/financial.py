"""Coverage, claims and explanations of benefit."""

from fhir_assets.sandbox.synthetic.clock import DAYS, date_time, day_of
from fhir_assets.sandbox.synthetic.codes import INPATIENT, hl7
from fhir_assets.sandbox.synthetic.facility import PAYERS, PROVIDERS
from fhir_assets.sandbox.synthetic.people import Person, Resources, Visit

_INSURED = hl7("v3-ActCode", "EHCPOL", "extended healthcare")
_SELF = hl7("subscriber-relationship", "self", "Self")
_GROUP = hl7("coverage-class", "group", "Group")
_NORMAL = hl7("processpriority", "normal", "Normal")
_CLAIM_TYPES = {
    True: hl7("claim-type", "institutional", "Institutional"),
    False: hl7("claim-type", "professional", "Professional"),
}
_DIAGNOSIS = hl7("ex-diagnosistype", "principal", "Principal Diagnosis")
_SUBMITTED = hl7("adjudication", "submitted", "Submitted Amount")
_BENEFIT = hl7("adjudication", "benefit", "Benefit Amount")
_COPAY = hl7("adjudication", "copay", "CoPay")
_PAID = hl7("ex-paymenttype", "complete", "Complete")


def _payer(person: Person) -> str:
    number = 0 if person.age(person.last // 1000) >= 65 else 1 + person.number % (PAYERS - 1)
    return f'{{"reference":"Organization/{person.population}-org-{PROVIDERS + number}"}}'


def _usd(cents: int) -> str:
    return f'{{"value":{cents // 100}.{cents % 100:02},"currency":"USD"}}'


def generate_coverage(person: Person, coverage_id: str) -> Resources:
    """Yield the patient's Coverage."""
    start = max(person.born, person.last // 86_400_000 - 700)
    yield (
        "Coverage",
        person.head("Coverage", coverage_id, person.updated)
        + f',"identifier":[{{"system":"urn:oid:2.16.840.1.113883.19.5.11","value":"MEM{person.number:08}"}}]'
        f',"status":"active","type":{_INSURED},"subscriber":{person.subject},"subscriberId":"MEM{person.number:08}"'
        f',"beneficiary":{person.subject},"relationship":{_SELF},"period":{{"start":"{DAYS[start]}"}}'
        f',"payor":[{_payer(person)}],"class":[{{"type":{_GROUP},"value":"G{person.number % 97:03}"}}]}}',
    )


def generate_claim(person: Person, visit: Visit, coverage_id: str, condition: str | None) -> Resources:
    """Yield the Claim of a visit and its ExplanationOfBenefit."""
    claim_id = person.new_id("cl")
    cents = visit.kind.price * 100 + int(person.random.random() * 2500)
    copay = min(2000, cents // 5)
    kind = _CLAIM_TYPES[visit.kind_index == INPATIENT]
    created = day_of(visit.end)
    period = f'"billablePeriod":{{"start":"{date_time(visit.start)}","end":"{date_time(visit.end)}"}}'
    insurance = f'"focal":true,"coverage":{{"reference":"Coverage/{coverage_id}"}}'
    provider = f'"provider":{{"reference":"Organization/{visit.organization}"}}'
    diagnosis = ""
    if condition is not None:
        diagnosis = (
            f',"diagnosis":[{{"sequence":1,"diagnosisReference":{{"reference":"Condition/{condition}"}},'
            f'"type":[{_DIAGNOSIS}]}}]'
        )
    item = (
        f'"sequence":1,"productOrService":{visit.kind.service},"servicedPeriod":{{"start":"{day_of(visit.start)}",'
        f'"end":"{day_of(visit.end)}"}},"unitPrice":{_usd(cents)},"net":{_usd(cents)},"encounter":[{visit.encounter}]'
    )
    yield (
        "Claim",
        person.head("Claim", claim_id, visit.updated)
        + f',"identifier":[{{"system":"urn:oid:2.16.840.1.113883.19.5.12","value":"CLM-{claim_id}"}}]'
        f',"status":"active","type":{kind},"use":"claim","patient":{person.subject},{period},"created":"{created}"'
        f',"insurer":{_payer(person)},{provider},"priority":{_NORMAL}{diagnosis}'
        f',"insurance":[{{"sequence":1,{insurance}}}],"item":[{{{item}}}],"total":{_usd(cents)}}}',
    )
    yield (
        "ExplanationOfBenefit",
        person.head("ExplanationOfBenefit", person.new_id("eob"), visit.updated)
        + f',"identifier":[{{"system":"urn:oid:2.16.840.1.113883.19.5.13","value":"EOB-{claim_id}"}}]'
        f',"status":"active","type":{kind},"use":"claim","patient":{person.subject},{period},"created":"{created}"'
        f',"insurer":{_payer(person)},{provider},"claim":{{"reference":"Claim/{claim_id}"}},"outcome":"complete"'
        f'{diagnosis},"insurance":[{{{insurance}}}],"item":[{{{item},"adjudication":['
        f'{{"category":{_SUBMITTED},"amount":{_usd(cents)}}},{{"category":{_COPAY},"amount":{_usd(copay)}}},'
        f'{{"category":{_BENEFIT},"amount":{_usd(cents - copay)}}}]}}]'
        f',"total":[{{"category":{_SUBMITTED},"amount":{_usd(cents)}}},'
        f'{{"category":{_BENEFIT},"amount":{_usd(cents - copay)}}}]'
        f',"payment":{{"type":{_PAID},"date":"{created}","amount":{_usd(cents - copay)}}}}}',
    )
