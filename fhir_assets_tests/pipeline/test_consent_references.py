"""Consent withholds by every form in which a resource or a Consent names a patient, and by reference."""

import re
from typing import Any

import pytest

from fhir_assets.fhir.subjects import find_subjects
from fhir_assets.privacy.consent import ConsentGate, Policy
from fhir_assets.privacy.encryption import NO_ENCRYPTION, Cipher
from fhir_assets.privacy.keys import new_key, parse_keys
from fhir_assets.warehouse.ops import consents
from fhir_assets.warehouse.postgres.tables import deletions
from fhir_assets.warehouse.postgres.tables.deletions import Deletion
from fhir_assets_tests.support.consent_records import START, consent, observation, patient
from fhir_assets_tests.support.consent_tables import Tables

OPT_IN, OPT_OUT = ConsentGate(Policy.OPT_IN), ConsentGate(Policy.OPT_OUT)
MRN = {"system": "urn:mrn", "value": "7"}
DENY = {"type": "deny"}
PERMIT = {"type": "permit"}
OBSERVATIONS = {"Observation/x", "Observation/y"}


@pytest.fixture(params=["cleartext", "encrypted"])
def cipher(request: pytest.FixtureRequest) -> Cipher:
    return Cipher(parse_keys([new_key()])) if request.param == "encrypted" else Cipher()


def about(reference: dict[str, Any], key: str = "x", **more: Any) -> dict[str, Any]:
    """Return an Observation with a subject."""
    return {**observation(key), "subject": reference, **more}


def denial(reference: dict[str, Any], key: str = "c", **more: Any) -> dict[str, Any]:
    """Return a Consent that denies."""
    return {**consent(key, "", DENY), "patient": reference, **more}


def refer(resource_type: str, key: str, **more: Any) -> dict[str, Any]:
    return {"resourceType": resource_type, "id": key, "meta": {"versionId": "1"}, **more}


UNRESOLVED: dict[str, dict[str, Any]] = {
    "urn:uuid": about({"reference": "urn:uuid:0f2a1c34-0000-4000-8000-00000000000b"}),
    "identifier of unknown type": about({"identifier": {"value": "9"}}),
    "identifier without value": about({"identifier": {"system": "urn:mrn"}, "type": "Patient"}),
    "contained": about({"reference": "#p"}, contained=[{"resourceType": "Patient", "id": "p"}]),
    "contained that is missing": about({"reference": "#q"}),
    "conditional": about({"reference": "Patient?name=x"}),
    "conditional of another server": about({"reference": "https://else.example/r4/Patient?identifier=a|9"}),
    "unknown form": about({"reference": "MRN-7"}),
    "no type": about({"reference": "7"}),
    "a type that is no type": about({"reference": "patient/7"}),
    "empty": about({"reference": ""}),
    "an id that is no id": about({"reference": "Patient/a b"}),
    "display only": about({"display": "somebody"}),
    "extension only": about({"extension": [{"url": "urn:x", "valueCode": "masked"}]}),
    "performer by urn": about({"reference": "Patient/b"}, performer=[{"reference": "urn:uuid:0f2a1c34-0000"}]),
    "performer by identifier": about({"reference": "Patient/b"}, performer=[{"type": "Patient", "identifier": MRN}]),
}
RESOLVED: dict[str, dict[str, Any]] = {
    "literal": about({"reference": "Patient/b"}),
    "absolute": about({"reference": "https://x.example/Patient/b/_history/2"}),
    "group": about({"reference": "Group/g"}),
    "location by identifier": about({"type": "Location", "identifier": {"value": "9"}}),
    "contained device": about({"reference": "#d"}, contained=[{"resourceType": "Device", "id": "d"}]),
    "conditional location": about({"reference": "Location?identifier=9"}),
    "performer by number": about({"reference": "Patient/b"}, performer=[{"identifier": {"value": "9"}}]),
    "performer by name": about({"reference": "Patient/b"}, performer=[{"display": "Dr. X"}]),
    "no subject": observation("x"),
}


def name_resources(forms: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the resources with ids that tell their forms."""
    return {form: {**resource, "id": re.sub(r"[^A-Za-z]+", "-", form)} for form, resource in forms.items()}


def list_shown(tables: Tables, forms: dict[str, dict[str, Any]]) -> list[str]:
    """Return the forms whose resources are in the tables."""
    shown = tables.shown()
    return [form for form, each in forms.items() if f"{each['resourceType']}/{each['id']}" in shown]


@pytest.mark.parametrize("gate", [OPT_IN, OPT_OUT], ids=["opt-in", "opt-out"])
def test_a_resource_whose_patient_is_not_known_is_withheld(database: str, gate: ConsentGate) -> None:
    tables = Tables(database, gate)
    tables.load(patient("b"), consent("c", "b", PERMIT))
    tables.apply_consent()
    forms = name_resources(UNRESOLVED)
    assert tables.load(*forms.values()).withheld.total() == len(forms)
    tables.apply_consent()
    assert list_shown(tables, forms) == []
    tables.load(
        *({**about({"reference": "Patient/b"}, each["id"]), "meta": {"versionId": "2"}} for each in forms.values())
    )
    assert list_shown(tables, forms) == list(forms)
    assert tables.withheld() == set()


def test_a_resource_whose_subject_is_known_or_nobody_is_loaded(database: str) -> None:
    for gate in (OPT_OUT, OPT_IN):
        tables = Tables(database, gate)
        tables.load(patient("b"), consent("c", "b", PERMIT))
        tables.apply_consent()
        forms = name_resources(RESOLVED)
        tables.load(*forms.values())
        tables.apply_consent()
        assert list_shown(tables, forms) == list(forms)


def name_by_identifier(value: str) -> dict[str, dict[str, Any]]:
    """Return the references to the Patient with an identifier, by form."""
    identifier = {"system": "urn:mrn", "value": value}
    return {
        "identifier": {"identifier": identifier},
        "identifier with white space": {"identifier": {"system": "urn:mrn", "value": f" {value} "}},
        "identifier and type": {"type": "Patient", "identifier": identifier},
        "identifier without system": {"identifier": {"value": value}},
        "urn and identifier": {"reference": "urn:uuid:0f2a1c34-0000-4000-8000-00000000000b", "identifier": identifier},
        "unknown form and identifier": {"reference": "unknown:1", "identifier": identifier},
        "conditional": {"reference": f"Patient?identifier=urn:mrn|{value}"},
        "conditional encoded": {"reference": f"Patient?identifier=urn%3Amrn%7C{value}"},
        "conditional without system": {"reference": f"Patient?identifier={value}"},
        "contained": {"reference": "#p"},
    }


FORMS = [(number, form) for number, form in enumerate(name_by_identifier(""))]
"""The forms with a number each: the patient of form 3 has the id ``p3`` and the identifier ``m3``."""


def by_form(number: int, form: str) -> dict[str, Any]:
    """Return the elements ``reference`` and ``contained`` of a resource that names the patient of a form."""
    identifiers = [{"system": "urn:other", "value": f"m{number}"}, {"system": "urn:mrn", "value": f"m{number}"}]
    contained = [{"resourceType": "Patient", "id": "p", "identifier": identifiers}]
    return {"reference": name_by_identifier(f"m{number}")[form], "contained": contained}


def patient_of(number: int) -> dict[str, Any]:
    return patient(f"p{number}", identifier=[{"system": "urn:mrn", "value": f"m{number}"}])


def test_a_resource_that_names_its_patient_by_an_identifier_is_withheld_until_the_patient_is_known(
    database: str, cipher: Cipher
) -> None:
    tables = Tables(database, OPT_OUT, cipher)
    tables.apply_consent()
    numbers = {n for n, _ in FORMS}
    tables.load(*(about(key=f"x{n}", **by_form(n, form)) for n, form in FORMS), about({"identifier": MRN}, "y"))
    tables.apply_consent()
    assert tables.shown() == set()
    tables.load(*map(patient_of, numbers))
    tables.apply_consent()
    assert tables.withheld() == {"Observation/y"}
    assert tables.all("SELECT id, array_to_string(patients, ' ') FROM fhir_partitions.resource_observation") == {
        (f"x{n}", f"p{n}") for n in numbers
    }
    tables.load(*(consent(f"c{n}", f"p{n}", DENY) for n in numbers))
    tables.apply_consent()
    assert tables.shown() == set()
    tables.load(*(consent(f"c{n}", f"p{n}", DENY, 2, "inactive") for n in numbers))
    tables.apply_consent()
    assert tables.withheld() == {"Observation/y"}


@pytest.mark.parametrize("order", ["patient first", "denial first"])
def test_a_denial_that_names_its_patient_by_an_identifier_counts(database: str, cipher: Cipher, order: str) -> None:
    tables = Tables(database, OPT_OUT, cipher)
    tables.apply_consent()
    numbers = {n for n, _ in FORMS}
    others = [patient("b", identifier=[{"system": "urn:mrn", "value": "8"}]), observation("y", "b")]
    of_forms = [*map(patient_of, numbers), *(observation(f"x{n}", f"p{n}") for n in numbers)]
    denials = [denial(key=f"c{n}", **by_form(n, form)) for n, form in FORMS]
    if order == "patient first":
        tables.load(*of_forms, *others)
    tables.load(*denials)
    tables.apply_consent()
    with tables.connect() as conn:
        unknown = consents.count_unknown_denials(conn, OPT_OUT)
    assert unknown == (0 if order == "patient first" else len(FORMS))
    if order == "denial first":
        tables.load(*of_forms, *others)
        assert {f"Patient/p{n}" for n in numbers} <= tables.withheld()
        tables.apply_consent()
        with tables.connect() as conn:
            assert consents.count_unknown_denials(conn, OPT_OUT) == 0
    assert tables.shown() == {"Patient/b", "Observation/y"}
    tables.load(*({**each, "status": "inactive", "meta": {"versionId": "2"}} for each in denials))
    tables.apply_consent()
    assert tables.withheld() == set()


def test_under_opt_in_a_denial_by_identifier_wins_over_a_permit_and_a_permit_by_identifier_counts_for_one_patient(
    database: str,
) -> None:
    tables = Tables(database, OPT_IN)
    tables.load(patient("a", identifier=[MRN]), patient("b"), consent("p", "a", PERMIT), consent("q", "b", PERMIT))
    tables.apply_consent()
    assert {"Patient/a", "Patient/b"} <= tables.shown()
    tables.load(denial({"identifier": MRN}))
    tables.apply_consent()
    assert "Patient/a" not in tables.shown()
    assert "Patient/b" in tables.shown()
    tables.load({**denial({"identifier": MRN}), "provision": PERMIT, "meta": {"versionId": "2"}})
    tables.load(consent("p", "a", PERMIT, 2, "inactive"))
    tables.apply_consent()
    assert "Patient/a" in tables.shown()
    tables.load(patient("twin", identifier=[MRN]))
    tables.apply_consent()
    assert "Patient/twin" not in tables.shown()


def test_a_denial_of_a_literal_patient_counts_for_its_identifier_too(database: str) -> None:
    tables = Tables(database, OPT_OUT)
    tables.load(patient("a", identifier=[MRN]), denial({"reference": "Patient/elsewhere", "identifier": MRN}))
    tables.apply_consent()
    assert tables.shown() == set()


UNKNOWN_DENIALS: dict[str, dict[str, Any]] = {
    "urn:uuid": denial({"reference": "urn:uuid:0f2a1c34-0000-4000-8000-00000000000b"}),
    "display": denial({"display": "somebody"}),
    "contained": denial({"reference": "#p"}, contained=[{"resourceType": "Patient", "id": "p"}]),
    "identifier of nobody": denial({"identifier": {"value": "99"}}),
    "no patient": {key: value for key, value in denial({}).items() if key != "patient"},
}


@pytest.mark.parametrize("form", UNKNOWN_DENIALS)
def test_a_denial_whose_patient_is_not_known_holds_back_its_file_and_is_counted(database: str, form: str) -> None:
    by_file = ConsentGate(Policy.OPT_OUT, by_file=True)
    tables = Tables(database, by_file)
    tables.load({**patient("b"), "meta": {"versionId": "5"}}, refer("Organization", "o"), UNKNOWN_DENIALS[form])
    tables.apply_consent()
    tables.load(patient("a"), observation("x", "a"))  # of the file, as their times of arrival are equal
    tables.apply_consent()
    assert tables.shown() - {"Consent/c"} == {"Patient/b", "Organization/o"}
    with tables.connect() as conn:
        assert consents.count_unknown_denials(conn, by_file) == 1
    tables.load({**denial({"reference": "Patient/zz"}), "meta": {"versionId": "2"}})
    tables.apply_consent()
    assert {"Patient/a", "Observation/x"} <= tables.shown()
    with tables.connect() as conn:
        assert consents.count_unknown_denials(conn, by_file) == 0


def test_a_denial_whose_patient_is_not_known_and_that_came_from_a_search_holds_back_nobody(database: str) -> None:
    tables = Tables(database, OPT_OUT)
    tables.load(*name_resources(UNKNOWN_DENIALS).values(), patient("a"))
    tables.apply_consent()
    assert "Patient/a" in tables.shown()
    with tables.connect() as conn:
        assert consents.count_unknown_denials(conn, OPT_OUT) == len(UNKNOWN_DENIALS)


OF_X = {"reference": "Observation/x"}
REFERRING: dict[str, dict[str, Any]] = {
    "Provenance.target": refer("Provenance", "r", target=[OF_X]),
    "Provenance.entity": refer("Provenance", "r", entity=[{"what": OF_X}]),
    "AuditEvent.entity.what": refer("AuditEvent", "r", entity=[{"what": {"reference": "Observation/x/_history/1"}}]),
    "AuditEvent.agent.who": refer("AuditEvent", "r", agent=[{"who": {"reference": "Patient/a"}}]),
    "List.entry.item": refer("List", "r", entry=[{"item": {"reference": "https://x.example/Observation/x"}}]),
    "Composition.section.entry": refer("Composition", "r", section=[{"section": [{"entry": [OF_X]}]}]),
    "DocumentReference.context": refer("DocumentReference", "r", context={"related": [OF_X]}),
    "Linkage.item": refer("Linkage", "r", item=[{"resource": {"reference": "Patient/a"}}]),
    "MessageHeader.focus": refer("MessageHeader", "r", focus=[OF_X]),
    "Task.focus": refer("Task", "r", focus=OF_X),
    "Media": refer("Media", "r", basedOn=[OF_X]),
    "QuestionnaireResponse": refer("QuestionnaireResponse", "r", subject={"reference": "Patient/a"}),
    "Group.member": refer("Group", "r", member=[{"entity": {"reference": "Patient/a"}}]),
    "Basic.subject": refer("Basic", "r", subject=OF_X),
    "RelatedPerson.patient": refer("RelatedPerson", "r", patient={"reference": "Patient/a"}),
    "DiagnosticReport.result": refer("DiagnosticReport", "r", subject={"reference": "Patient/b"}, result=[OF_X]),
    "extension": refer("Organization", "r", extension=[{"url": "urn:x", "valueReference": OF_X}]),
    "contained": refer(
        "Procedure",
        "r",
        subject={"reference": "Patient/b"},
        contained=[{"resourceType": "Observation", "id": "i", "subject": {"reference": "Patient/a"}}],
    ),
    "contained by identifier": refer(
        "Procedure",
        "r",
        subject={"reference": "Patient/b"},
        contained=[{"resourceType": "Observation", "id": "i", "subject": {"identifier": MRN}}],
    ),
    "escaped": refer("List", "r", entry=[{"item": {"reference": "Observation/x"}}]),
}


@pytest.mark.parametrize("order", ["denied before", "referring before", "denied after"])
def test_what_refers_to_a_withheld_resource_is_withheld_until_consent_is_given_again(database: str, order: str) -> None:
    tables = Tables(database, OPT_OUT)
    referring = name_resources(REFERRING)
    of_a = [patient("a", identifier=[MRN]), observation("x", "a")]
    the_denial = consent("c", "a", DENY)
    nobodys = [*referring.values(), refer("Practitioner", "p"), patient("b")]
    in_order = {
        "denied before": [[the_denial], of_a, nobodys],
        "referring before": [[the_denial], nobodys, of_a],
        "denied after": [of_a, nobodys, [the_denial]],
    }
    for resources in in_order[order]:
        tables.load(*resources)
        tables.apply_consent()
    assert list_shown(tables, referring) == []
    assert len(tables.withheld()) == 3 + len(referring)
    assert tables.shown() == {"Practitioner/p", "Patient/b"}
    tables.load(consent("c", "a", DENY, 2, "inactive"))
    tables.apply_consent()
    assert tables.withheld() == set()
    assert list_shown(tables, referring) == list(referring)


def test_references_are_followed_through_any_number_of_resources_and_in_circles(database: str) -> None:
    tables = Tables(database, OPT_OUT)
    chain = [
        refer("List", "l", entry=[{"item": {"reference": "Composition/k"}}]),
        refer("Composition", "k", section=[{"entry": [{"reference": "List/l"}, {"reference": "Task/t"}]}]),
        refer("Task", "t", focus={"reference": "Observation/x"}),
        refer("Task", "loose", focus={"reference": "Observation/y"}),
    ]
    tables.load(patient("a"), patient("b"), observation("x", "a"), observation("y", "b"), *chain)
    tables.apply_consent()
    assert len(tables.shown()) == 8
    tables.load(consent("c", "a", DENY))
    tables.apply_consent()
    assert tables.shown() == {"Patient/b", "Observation/y", "Task/loose"}
    # A chunk of a load meets them too.
    tables.load(refer("Provenance", "v", target=[{"reference": "List/l"}]))
    assert "Provenance/v" in tables.withheld()
    tables.load(observation("x", "b", version=2))
    tables.apply_consent()
    assert tables.withheld() == {"Patient/a", "Consent/c"}


def test_what_refers_to_a_resource_that_is_deleted_returns(database: str) -> None:
    tables = Tables(database, OPT_OUT)
    tables.load(patient("a"), observation("x", "a"), refer("Task", "t", focus=OF_X), consent("c", "a", DENY))
    tables.apply_consent()
    assert "Task/t" in tables.withheld()
    with tables.connect() as conn:
        deletions.apply(conn, [Deletion("Observation", "x", START.replace(year=2025))], run_id="run")
    tables.apply_consent()
    assert "Task/t" in tables.shown()


def test_a_policy_that_is_switched_on_later_finds_subjects_by_identifier_and_reference(
    database: str, cipher: Cipher
) -> None:
    off = Tables(database, ConsentGate(), cipher)
    off.load(
        patient("a", identifier=[MRN]),
        observation("x", "a"),
        about({"identifier": MRN}, "y"),
        about({"display": "somebody"}, "z"),
        refer("Task", "t", focus=OF_X),
        denial({"identifier": MRN}),
    )
    assert off.withheld() == set()
    with off.connect() as conn:
        conn.execute("UPDATE fhir.resource SET mentions = NULL")
    tables = Tables(database, OPT_OUT, off.cipher)
    tables.apply_consent()
    assert tables.shown() == set()
    off.apply_consent()
    assert off.withheld() == set()


@pytest.mark.parametrize(
    "elements",
    [
        {"subject": {"identifier": {"value": "7"}, "type": {"text": "x"}}},
        {"subject": [{"reference": 7}, None, 3], "performer": {"reference": ["Patient/b"]}},
        {"contained": {"id": "p"}, "subject": {"reference": "#p"}},
        {"contained": [None, {"resourceType": "Patient", "id": "p", "identifier": {"value": "7"}}]},
        {"subject": {"reference": "Patient/" + "a" * 5000}, "focus": [{"reference": "X" + "a" * 5000 + "/1"}]},
        {"subject": {"reference": "Patient?identifier=%ff%00|&identifier&identifier=,"}},
        {"focus": [{"reference": "Group/\x00"}], "extension": [[{"reference": "Patient/b"}]]},
    ],
)
def test_elements_that_do_not_conform_to_r4_are_ignored_or_unknown(elements: dict[str, Any]) -> None:
    patients, mentions = find_subjects({**observation("x"), **elements}, None, NO_ENCRYPTION.fingerprint)
    assert all(len(each) < 200 and "\x00" not in each for each in (*patients, *mentions))


def test_the_subjects_of_each_source_are_determined_once(database: str) -> None:
    tables = Tables(database, OPT_OUT)
    tables.apply_consent()
    with tables.connect() as conn:
        before = consents.get_applied_policy(conn)
        conn.execute("SELECT set_config('fhir_assets.source', 'other', false)")
        assert consents.get_applied_policy(conn).subjects is None
        consents.set_applied_policy(conn, consents.AppliedPolicy(OPT_OUT, "another"))
        conn.execute("SELECT set_config('fhir_assets.source', '', false)")
        assert consents.get_applied_policy(conn) == before
    assert before.subjects
