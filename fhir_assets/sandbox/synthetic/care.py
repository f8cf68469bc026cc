"""Care plans and teams, goals, orders, consents and provenance."""

from fhir_assets.sandbox.synthetic.clock import date_time, day_of
from fhir_assets.sandbox.synthetic.codes import HL7, LOINC, SNOMED, Panel, coding, concept, hl7
from fhir_assets.sandbox.synthetic.people import Person, Resources, Visit

_PATIENT_ROLE = concept(SNOMED, "116154003", "Patient")
_CLINICIAN_ROLE = concept(SNOMED, "223366009", "Healthcare professional")
_PLAN = concept(SNOMED, "734163000", "Care plan")
_EXERCISE = concept(SNOMED, "229065009", "Exercise therapy")
_DIET = concept(SNOMED, "183061007", "Dietary regime")
_GOAL_STATE = hl7("goal-achievement", "in-progress", "In Progress")
_BMI = concept(LOINC, "39156-5", "Body mass index (BMI) [Ratio]")
_LABORATORY = concept(SNOMED, "108252007", "Laboratory procedure")
_PRIVACY = hl7("consentscope", "patient-privacy", "Privacy Consent")
_CONSENT_DOCUMENT = concept(LOINC, "59284-0", "Consent Document")
_OPT = {True: hl7("v3-ActCode", "OPTIN", "opt-in"), False: hl7("v3-ActCode", "OPTOUT", "opt-out")}
_PURPOSES = ",".join(
    (
        coding(HL7 + "v3-ActReason", "TREAT", "treatment"),
        coding(HL7 + "v3-ActReason", "HPAYMT", "healthcare payment"),
    )
)
_RESEARCH = coding(HL7 + "v3-ActReason", "HRESCH", "healthcare research")
_AUTHOR = hl7("provenance-participant-type", "author", "Author")
_CREATE = hl7("v3-DataOperation", "CREATE", "create")


def generate_care_plan(person: Person, visit: Visit, condition: str) -> Resources:
    """Yield a care team, a goal, and a plan that refers to both, for a chronic condition."""
    team, goal = person.new_id("ct"), person.new_id("g")
    since = day_of(visit.start)
    addresses = f'"addresses":[{{"reference":"Condition/{condition}"}}]'
    yield (
        "CareTeam",
        person.head("CareTeam", team, visit.updated)
        + f',"status":"active","name":"Care team","subject":{person.subject},"encounter":{visit.encounter}'
        f',"period":{{"start":"{since}"}},"participant":[{{"role":[{_PATIENT_ROLE}],"member":{person.subject}}},'
        f'{{"role":[{_CLINICIAN_ROLE}],"member":{{"reference":"Practitioner/{visit.practitioner}"}},'
        f'"onBehalfOf":{{"reference":"Organization/{visit.organization}"}}}}]'
        f',"managingOrganization":[{{"reference":"Organization/{visit.organization}"}}]}}',
    )
    yield (
        "Goal",
        person.head("Goal", goal, visit.updated) + f',"lifecycleStatus":"active","achievementStatus":{_GOAL_STATE}'
        f',"description":{{"text":"Body mass index below 25"}},"subject":{person.subject},"startDate":"{since}"'
        f',"target":[{{"measure":{_BMI},"detailQuantity":{{"value":25.0,"comparator":"<","unit":"kg/m2",'
        f'"system":"http://unitsofmeasure.org","code":"kg/m2"}},"dueDate":"{int(since[:4]) + 1}"}}],{addresses}}}',
    )
    yield (
        "CarePlan",
        person.head("CarePlan", person.new_id("cp"), visit.updated)
        + f',"status":"active","intent":"plan","category":[{_PLAN}],"title":"Plan for lasting illness"'
        f',"subject":{person.subject},"encounter":{visit.encounter},"period":{{"start":"{since}"}}'
        f',"created":"{date_time(visit.end)}","author":{{"reference":"Practitioner/{visit.practitioner}"}}'
        f',"careTeam":[{{"reference":"CareTeam/{team}"}}],{addresses},"goal":[{{"reference":"Goal/{goal}"}}]'
        f',"activity":[{{"detail":{{"code":{_EXERCISE},"status":"in-progress"}}}},'
        f'{{"detail":{{"code":{_DIET},"status":"in-progress"}}}}]}}',
    )


def generate_service_request(person: Person, visit: Visit, request: str, panel: Panel) -> Resources:
    """Yield the ServiceRequest with id ``request`` for a laboratory panel."""
    yield (
        "ServiceRequest",
        person.head("ServiceRequest", request, visit.updated)
        + f',"identifier":[{{"system":"urn:oid:2.16.840.1.113883.19.5.9","value":"ORD-{request}"}}]'
        f',"status":"completed","intent":"order","category":[{_LABORATORY}],"priority":"routine","code":{panel.code}'
        f',"subject":{person.subject},"encounter":{visit.encounter}'
        f',"occurrenceDateTime":"{date_time(visit.start + 300)}","authoredOn":"{date_time(visit.start + 240)}"'
        f',"requester":{{"reference":"Practitioner/{visit.practitioner}"}}'
        f',"performer":[{{"reference":"Organization/{visit.organization}"}}]}}',
    )


def generate_consent(person: Person, visit: Visit) -> Resources:
    """Yield the patient's Consent: one in twenty denies sharing, one in three denies research."""
    shares, research = person.random.random() < 0.95, person.random.random() < 0.67
    research_rule = f'"provision":[{{"type":"{"permit" if research else "deny"}","purpose":[{_RESEARCH}]}}]'
    yield (
        "Consent",
        person.head("Consent", person.new_id("con"), visit.updated)
        + f',"identifier":[{{"system":"urn:oid:2.16.840.1.113883.19.5.10","value":"CON-{person.id}"}}]'
        f',"status":"active","scope":{_PRIVACY},"category":[{_CONSENT_DOCUMENT}],"patient":{person.subject}'
        f',"dateTime":"{date_time(visit.start)}","performer":[{person.subject}]'
        f',"organization":[{{"reference":"Organization/{visit.organization}"}}],"policyRule":{_OPT[shares]}'
        f',"provision":{{"type":"{"permit" if shares else "deny"}","period":{{"start":"{day_of(visit.start)}"}}'
        f',"purpose":[{_PURPOSES}],{research_rule}}}}}',
    )


def generate_provenance(person: Person, visit: Visit, targets: list[str]) -> Resources:
    """Yield the Provenance of ``targets`` (``Type/id``) that were recorded at a visit."""
    listed = ",".join(f'{{"reference":"{target}"}}' for target in targets)
    yield (
        "Provenance",
        person.head("Provenance", person.new_id("prov"), visit.updated)
        + f',"target":[{listed}],"occurredDateTime":"{date_time(visit.start)}","recorded":"{date_time(visit.end)}"'
        f',"activity":{_CREATE},"agent":[{{"type":{_AUTHOR},"who":{{"reference":"Practitioner/{visit.practitioner}"}}'
        f',"onBehalfOf":{{"reference":"Organization/{visit.organization}"}}}}]}}',
    )
