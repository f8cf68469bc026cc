"""Consent in real tables, compared with a naive model of the resources that must be in them."""

import json
import random
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fhir_assets.pipeline.replay.load_step import ReplayLoadStep
from fhir_assets.privacy.audit import AuditRecord
from fhir_assets.privacy.consent import ConsentGate, Policy, Purpose
from fhir_assets.privacy.encryption import NO_ENCRYPTION, Cipher
from fhir_assets.privacy.keys import new_key, parse_keys
from fhir_assets.warehouse.ops import audit_log, dead_letters
from fhir_assets.warehouse.ops.dead_letters import DeadLetter
from fhir_assets.warehouse.postgres.db.connections import connect
from fhir_assets.warehouse.postgres.tables import deletions
from fhir_assets.warehouse.postgres.tables.deletions import Deletion
from fhir_assets.warehouse.postgres.tables.view_tables import ensure_tables
from fhir_assets.windows import Window
from fhir_assets_tests.support.consent_records import START, VIEWS, consent, observation, patient
from fhir_assets_tests.support.consent_tables import Tables

DAY = timedelta(days=1)


ORGANIZATION = {"resourceType": "Organization", "id": "o", "name": "Clinic"}
EVERYTHING = (patient("a"), observation("x", "a"), patient("b"), observation("y", "b"), ORGANIZATION)
OF_A = {"Patient/a", "Observation/x"}
OF_B = {"Patient/b", "Observation/y"}
NO_PATIENT = {"Organization/o"}
OPT_IN, OPT_OUT = ConsentGate(Policy.OPT_IN), ConsentGate(Policy.OPT_OUT)


@pytest.fixture(params=["cleartext", "encrypted"])
def cipher(request: pytest.FixtureRequest) -> Cipher:
    return Cipher(parse_keys([new_key()])) if request.param == "encrypted" else Cipher()


def test_opt_in_releases_with_a_permit_and_withholds_when_it_is_revoked(database: str, cipher: Cipher) -> None:
    tables = Tables(database, OPT_IN, cipher)
    tables.apply_consent()
    assert tables.load(*EVERYTHING).withheld.total() == 4
    assert (tables.shown(), tables.withheld()) == (NO_PATIENT, OF_A | OF_B)
    tables.load(consent("c", "a", {"type": "permit"}))
    result = tables.apply_consent()
    assert (result.decisions, result.released, result.withheld) == (2, 3, 0)
    assert (tables.shown(), tables.withheld()) == (NO_PATIENT | OF_A | {"Consent/c"}, OF_B)
    assert tables.all("SELECT family FROM fhir.patient_name") == {"Fa"}
    assert tables.all("SELECT decision, consent_id, basis FROM ops.consents") == {("permit", "c", "Consent.provision")}
    tables.load(consent("c", "a", {"type": "permit"}, version=2, status="inactive"))
    tables.apply_consent()
    assert tables.shown() == NO_PATIENT
    assert tables.withheld() == OF_A | OF_B | {"Consent/c"}
    assert tables.all("SELECT * FROM fhir.patient_name") == set()


def test_opt_out_withholds_with_a_deny_and_releases_when_it_is_withdrawn(database: str, cipher: Cipher) -> None:
    tables = Tables(database, OPT_OUT, cipher)
    tables.apply_consent()
    tables.load(*EVERYTHING)
    assert tables.shown() == OF_A | OF_B | NO_PATIENT
    tables.load(consent("c", "a", {"type": "deny"}))
    tables.apply_consent()
    assert tables.shown() == OF_B | NO_PATIENT
    tables.load(observation("z", "a"), observation("x", "a", version=2))
    assert tables.withheld() == OF_A | {"Observation/z", "Consent/c"}
    tables.load(consent("c", "a", {"type": "deny"}, version=2, status="rejected"))
    tables.apply_consent()
    assert tables.shown() == OF_A | OF_B | NO_PATIENT | {"Observation/z", "Consent/c"}
    assert tables.withheld() == set()


def test_a_permit_applies_within_its_period_only(database: str) -> None:
    tables = Tables(database, OPT_IN)
    tables.load(
        *EVERYTHING, consent("c", "a", {"type": "permit", "period": {"start": "2024-01-05", "end": "2024-01-10"}})
    )
    shown = []
    for day in range(12):
        tables.apply_consent(START + day * DAY)
        shown.append("Patient/a" in tables.shown())
    assert shown == [4 <= day < 10 for day in range(12)]


def test_a_resource_of_several_patients_is_withheld_if_any_of_them_denies(database: str) -> None:
    tables = Tables(database, OPT_OUT)
    tables.load(*EVERYTHING, observation("both", "a", "b"), consent("c", "b", {"type": "deny"}))
    tables.apply_consent()
    assert tables.shown() == OF_A | NO_PATIENT


def test_a_resource_of_a_contained_patient_is_withheld_and_nothing_is_if_no_policy_is_on(database: str) -> None:
    contained = {
        **observation("x"),
        "contained": [{"resourceType": "Patient", "id": "p"}],
        "subject": {"reference": "#p"},
    }
    for gate, shown in ((OPT_OUT, set()), (OPT_IN, set()), (ConsentGate(), {"Observation/x"})):
        tables = Tables(database, gate)
        tables.load(contained)
        tables.apply_consent()
        assert tables.shown() == shown


def test_the_newest_version_wins_whether_withheld_or_shown(database: str) -> None:
    tables = Tables(database, OPT_OUT)
    tables.load(consent("c", "b", {"type": "deny"}))
    tables.apply_consent()
    tables.load(observation("x", "a", version=1))
    tables.load(observation("x", "b", version=3))
    assert (tables.shown(), tables.withheld()) == (set(), {"Observation/x", "Consent/c"})
    tables.load(observation("x", "a", version=2))
    assert (tables.shown(), tables.withheld()) == (set(), {"Observation/x", "Consent/c"})
    tables.load(observation("x", "a", version=4))
    assert (tables.shown(), tables.withheld()) == ({"Observation/x"}, {"Consent/c"})
    tables.load(observation("x", "b", version=2))
    assert (tables.shown(), tables.withheld()) == ({"Observation/x"}, {"Consent/c"})


def test_a_consent_whose_patient_changes_no_longer_applies_to_the_former_patient(database: str) -> None:
    tables = Tables(database, OPT_OUT)
    tables.load(*EVERYTHING, consent("c", "a", {"type": "deny"}))
    tables.apply_consent()
    tables.load(consent("c", "b", {"type": "deny"}, version=2))
    tables.apply_consent()
    assert tables.shown() == OF_A | NO_PATIENT


def test_a_deleted_consent_no_longer_applies_and_a_deleted_withheld_resource_is_not_released(database: str) -> None:
    tables = Tables(database, OPT_OUT)
    tables.load(*EVERYTHING, observation("z", "a"), consent("c", "a", {"type": "deny"}))
    tables.apply_consent()
    with tables.connect() as conn:
        deleted = [Deletion("Consent", "c", START + DAY), Deletion("Observation", "z", START + DAY)]
        deletions.apply(conn, deleted, run_id="run")
    assert tables.withheld() == OF_A
    tables.apply_consent()
    assert tables.shown() == OF_A | OF_B | NO_PATIENT
    tables.load(observation("z", "a"), consent("c", "a", {"type": "deny"}))
    tables.apply_consent()
    assert tables.shown() == OF_A | OF_B | NO_PATIENT


def test_a_changed_policy_is_applied_to_all_resources_in_the_tables(database: str, cipher: Cipher) -> None:
    Tables(database, ConsentGate(), cipher).load(*EVERYTHING, consent("c", "a", {"type": "permit"}))
    tables = Tables(database, OPT_IN, cipher)
    # The state of rows that were loaded before a policy was set, or by an earlier version of the project.
    with tables.connect() as conn:
        conn.execute("UPDATE fhir.resource SET patients = NULL")
        conn.execute("DELETE FROM ops.consent_records")
        conn.execute("DELETE FROM ops.consent_changes")
    tables.apply_consent()
    assert tables.shown() == OF_A | NO_PATIENT | {"Consent/c"}
    off = Tables(database, ConsentGate(), tables.cipher)
    off.apply_consent()
    assert off.shown() == OF_A | OF_B | NO_PATIENT | {"Consent/c"}
    assert off.withheld() == set()


def test_resources_that_a_replay_resolves_are_withheld(database: str) -> None:
    tables = Tables(database, OPT_IN)
    tables.load(*EVERYTHING, consent("c", "a", {"type": "permit"}))
    tables.apply_consent()
    newer = {"gender": "male", "meta": {"versionId": "2", "lastUpdated": "2024-01-02T00:00:00Z"}}
    failed = [
        DeadLetter("Patient", key, "load", "unloadable", "", "", json.dumps(patient(key, **newer)).encode(), "k")
        for key in ("a", "b", "new")
    ]
    with tables.connect() as conn:
        dead_letters.record(conn, "failed", failed)
    patient_views = [view for view in VIEWS if view.resource_type == "Patient"]
    replay = ReplayLoadStep(tables.connect, patient_views, run_id="replay", also_open=True, consent_gate=OPT_IN)
    assert replay.run("Patient", [Window(None, START, "k")]).resolved == 3
    assert tables.all("SELECT gender FROM fhir.patient") == {"male"}
    assert tables.shown() == OF_A | NO_PATIENT | {"Consent/c"}
    assert tables.withheld() == OF_B | {"Patient/new"}


def test_consent_decisions_and_releases_are_in_the_audit_log(database: str) -> None:
    tables = Tables(database, OPT_IN)
    tables.load(*EVERYTHING, consent("c", "a", {"type": "permit"}))
    tables.apply_consent()
    with tables.connect() as conn:
        audit_records = [entry.audit_record for entry in audit_log.find_latest(conn, limit=50)]
        assert AuditRecord("consent decision", "test", "Consent", count=2, run_id="consent") in audit_records
        assert AuditRecord("release", "test", "Observation", count=1, run_id="consent") in audit_records
        assert audit_log.find_fault(conn) is None


# The naive model evaluates all consents again at each step and keeps no state.

_CODES = {"data-sharing": {"TREAT", "HOPERAT"}, "research": {"HRESCH", "CLINTRCH"}}


def naive(gate: ConsentGate, histories: dict[str, dict[str, list[dict[str, Any]]]], day: str) -> set[str]:
    """Return the patients whose resources must be in the tables on a day."""
    shown = set()
    for patient_id, by_consent in histories.items():
        rule_types = set()
        for versions in by_consent.values():
            newest = max(versions, key=lambda version: int(version["meta"]["versionId"]))
            if newest["status"] == "active":
                rule_types.add(naive_rule(newest["provision"], gate.purpose.value, day))
        denied, permitted = (
            "deny" in rule_types,
            "permit" in rule_types and "deny" not in rule_types,
        )
        if permitted if gate.policy is Policy.OPT_IN else not denied:
            shown.add(patient_id)
    return shown


def naive_rule(rule: dict[str, Any], purpose: str, day: str) -> str | None:
    codes = {coding["code"] for coding in rule.get("purpose", [])}
    period = rule.get("period", {})
    applies = not codes or codes & _CODES[purpose]
    if not applies or not period.get("start", "0") <= day <= period.get("end", "9"):
        return None
    inner = {naive_rule(nested, purpose, day) for nested in rule.get("provision", [])} - {None}
    if inner:
        return "deny" if "deny" in inner else "permit"
    if rule["type"] == "permit" and ("actor" in rule or "class" in rule):
        return None
    return str(rule["type"])


def random_rule(random: random.Random, depth: int = 0) -> dict[str, Any]:
    rule: dict[str, Any] = {"type": random.choice(["permit", "deny"])}
    if random.random() < 0.4:
        rule["purpose"] = [{"code": random.choice(["TREAT", "HRESCH", "CLINTRCH", "HOPERAT", "HMARKT"])}]
    if random.random() < 0.4:
        first = START + random.randrange(-5, 20) * DAY
        rule["period"] = {
            "start": first.date().isoformat(),
            "end": (first + random.randrange(12) * DAY).date().isoformat(),
        }
    if random.random() < 0.15:
        rule.update(random.choice([{"class": [{"code": "Observation"}]}, {"actor": [{"role": {"text": "nurse"}}]}]))
    if depth < 2 and random.random() < 0.35:
        rule["provision"] = [random_rule(random, depth + 1) for _ in range(random.randint(1, 2))]
    return rule


_SLOW_FIXTURES = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
_any_history = given(
    seed=st.integers(0, 2**32),
    policy=st.sampled_from([Policy.OPT_IN, Policy.OPT_OUT]),
    purpose=st.sampled_from(Purpose),
)


@settings(max_examples=4, deadline=None, suppress_health_check=_SLOW_FIXTURES)
@_any_history
def test_the_tables_match_the_naive_model(database: str, seed: int, policy: Policy, purpose: Purpose) -> None:
    check_history(database, seed, ConsentGate(policy, purpose), patients=60, steps=3)


@pytest.mark.slow
@settings(max_examples=12, deadline=None, suppress_health_check=_SLOW_FIXTURES)
@_any_history
def test_the_tables_match_the_naive_model_with_a_thousand_patients(
    database: str, seed: int, policy: Policy, purpose: Purpose
) -> None:
    check_history(database, seed, ConsentGate(policy, purpose), patients=1000, steps=5)


def check_history(database: str, seed: int, gate: ConsentGate, *, patients: int, steps: int) -> None:
    """Load random consents for half of the patients in each step, and compare the tables with the naive model."""
    chance = random.Random(seed)
    people = [f"p{number}" for number in range(patients)]
    with connect(database, cipher=NO_ENCRYPTION) as conn:
        for table in ("consents", "consent_records", "consent_changes", "consent_policy", "withheld"):
            conn.execute(f"DELETE FROM ops.{table}".encode())
        ensure_tables(conn, VIEWS)
        for table in ("resource", *(view.name for view in VIEWS)):
            conn.execute(f"DELETE FROM fhir.{table}".encode())
    tables = Tables(database, gate)
    tables.apply_consent()
    tables.load(*(patient(key) for key in people), *(observation(f"o{key}", key) for key in people))
    histories: dict[str, dict[str, list[dict[str, Any]]]] = {key: {} for key in people}
    for step in range(steps):
        now = START + step * 4 * DAY + DAY / 2
        changed = []
        for key in chance.sample(people, patients // 2):
            name = f"c{key}-{chance.randrange(2)}"
            versions = histories[key].setdefault(name, [])
            status = chance.choice(["active", "active", "active", "inactive", "rejected"])
            versions.append(consent(name, key, random_rule(chance), len(versions) + 1, status))
            changed.append(versions[-1])
        tables.load(*changed)
        tables.apply_consent(now)
        expected = naive(gate, histories, now.date().isoformat())
        shown = tables.shown()
        assert {key.split("/")[1] for key in shown if key.startswith("Patient/")} == expected
        assert {key.split("/o")[1] for key in shown if key.startswith("Observation/")} == expected
        assert {key.split("/")[1].split("-")[0][1:] for key in shown if key.startswith("Consent/")} <= expected
        assert len(shown) + len(tables.withheld()) == 2 * patients + sum(map(len, histories.values()))
