"""Consent carried out in real tables, held against a naive model of what must be there."""

import json
import random
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fhir_assets.fhir.compartment import find_patient_ids
from fhir_assets.fhir.record import Record
from fhir_assets.fhir.views import CompiledViews
from fhir_assets.pipeline.consent.step import ConsentResult, ConsentStep
from fhir_assets.pipeline.replay.load_step import ReplayLoadStep
from fhir_assets.privacy.audit import AuditRecord
from fhir_assets.privacy.consent import ConsentGate, Policy, Purpose
from fhir_assets.privacy.encryption import NO_ENCRYPTION, Cipher
from fhir_assets.privacy.keys import new_key, parse_keys
from fhir_assets.warehouse.ops import audit_log, dead_letters, encryption_secret
from fhir_assets.warehouse.ops.dead_letters import DeadLetter
from fhir_assets.warehouse.postgres.db.connections import Session, connect
from fhir_assets.warehouse.postgres.tables import deletions
from fhir_assets.warehouse.postgres.tables.deletions import Deletion
from fhir_assets.warehouse.postgres.tables.loading import LoadCounts, Loader
from fhir_assets.warehouse.postgres.tables.view_tables import ensure_tables
from fhir_assets.windows import Window
from fhir_assets_tests.support.views import column, view

DAY = timedelta(days=1)
START = datetime(2024, 1, 1, tzinfo=UTC)
VIEWS = (
    view("patient", "Patient", column("gender", "gender", "code")),
    view("patient_name", "Patient", column("family", "family", "string"), forEach="name"),
    view("observation", "Observation", column("status", "status", "code")),
    view("consent", "Consent", column("status", "status", "code")),
    view("organization", "Organization", column("name", "name", "string")),
)


class Tables:
    """The tables under a policy, driven as a run drives them."""

    def __init__(self, url: str, gate: ConsentGate, cipher: Cipher | None = None) -> None:
        self.url = url
        self.gate = gate
        with connect(url) as conn:
            self.cipher = encryption_secret.unlock(conn, cipher or Cipher())
        with self.connect() as conn:
            ensure_tables(conn, VIEWS)

    def connect(self) -> Session:
        return connect(self.url, cipher=self.cipher)

    def load(self, *resources: dict[str, Any]) -> LoadCounts:
        total = LoadCounts()
        by_type: dict[str, list[dict[str, Any]]] = {}
        for resource in resources:
            by_type.setdefault(resource["resourceType"], []).append(resource)
        for name, some in by_type.items():
            views = [each for each in VIEWS if each.resource_type == name]
            rows = CompiledViews(views)
            with self.connect() as conn, conn.transaction():
                loader = Loader(conn, name, views, run_id="run", consent_gate=self.gate)
                assert not loader.add([(record(each), rows.rows(each)) for each in some], "2024-01-01")
                counts = loader.finish()
                assert not loader.take_unloadable()
            total.inserted += counts.inserted
            total.updated += counts.updated
            total.superseded += counts.superseded
            total.withheld += counts.withheld
        return total

    def sweep(self, now: datetime = START) -> ConsentResult:
        return ConsentStep(self.connect, VIEWS, self.gate, run_id="sweep", actor="test").run(now)

    def all(self, query: str) -> set[Any]:
        with self.connect() as conn:
            return {row[0] if len(row) == 1 else row for row in conn.execute(query.encode()).fetchall()}

    def shown(self) -> set[str]:
        """``Type/id`` of what is in fhir.resource; every view must show the same."""
        shown = self.all("SELECT resource_type || '/' || id FROM fhir.resource WHERE deleted_at IS NULL")
        for name in ("patient", "observation", "consent", "organization"):
            of_type = {each for each in shown if each.lower().startswith(f"{name}/")}
            assert {key.split("/")[1] for key in of_type} == self.all(f"SELECT _resource_key FROM fhir.{name}")
        assert self.all("SELECT _resource_key FROM fhir.patient_name") <= self.all(
            "SELECT _resource_key FROM fhir.patient"
        )
        return shown

    def held(self) -> set[str]:
        return self.all("SELECT resource_type || '/' || id FROM ops.withheld")


def record(resource: dict[str, Any]) -> Record:
    version = resource.get("meta", {}).get("versionId", "1")
    moment = START + int(version) * timedelta(minutes=1)
    body = json.dumps(resource).encode()
    return Record(resource["resourceType"], resource["id"], version, moment, moment, body, find_patient_ids(resource))


def patient(key: str, **more: Any) -> dict[str, Any]:
    return {"resourceType": "Patient", "id": key, "name": [{"family": f"F{key}"}], **more}


def observation(key: str, *patients: str, version: int = 1) -> dict[str, Any]:
    about = {"subject": {"reference": f"Patient/{patients[0]}"}} if patients else {}
    others = {"performer": [{"reference": f"Patient/{each}"} for each in patients[1:]]} if patients[1:] else {}
    meta = {"meta": {"versionId": str(version)}}
    return {"resourceType": "Observation", "id": key, "status": "final", **meta, **about, **others}


def consent(
    key: str, about: str, provision: dict[str, Any], version: int = 1, status: str = "active"
) -> dict[str, Any]:
    return {
        "resourceType": "Consent",
        "id": key,
        "meta": {"versionId": str(version)},
        "status": status,
        "scope": {"coding": [{"code": "patient-privacy"}]},
        "patient": {"reference": f"Patient/{about}"},
        "provision": provision,
    }


ORGANIZATION = {"resourceType": "Organization", "id": "o", "name": "Clinic"}
EVERYTHING = (patient("a"), observation("x", "a"), patient("b"), observation("y", "b"), ORGANIZATION)
OF_A = {"Patient/a", "Observation/x"}
OF_B = {"Patient/b", "Observation/y"}
NOBODYS = {"Organization/o"}
OPT_IN, OPT_OUT = ConsentGate(Policy.OPT_IN), ConsentGate(Policy.OPT_OUT)


@pytest.fixture(params=["clear", "sealed"])
def cipher(request: pytest.FixtureRequest) -> Cipher:
    return Cipher(parse_keys([new_key()])) if request.param == "sealed" else Cipher()


def test_opt_in_withholds_until_a_permit_comes_and_again_when_it_is_revoked(database: str, cipher: Cipher) -> None:
    tables = Tables(database, OPT_IN, cipher)
    tables.sweep()
    assert tables.load(*EVERYTHING).withheld.total() == 4
    assert (tables.shown(), tables.held()) == (NOBODYS, OF_A | OF_B)
    tables.load(consent("c", "a", {"type": "permit"}))
    swept = tables.sweep()
    assert (swept.decisions, swept.released, swept.withheld) == (2, 3, 0)
    assert (tables.shown(), tables.held()) == (NOBODYS | OF_A | {"Consent/c"}, OF_B)
    assert tables.all("SELECT family FROM fhir.patient_name") == {"Fa"}
    assert tables.all("SELECT decision, consent_id, source FROM ops.consents") == {("permit", "c", "Consent.provision")}
    tables.load(consent("c", "a", {"type": "permit"}, version=2, status="inactive"))
    tables.sweep()
    assert tables.shown() == NOBODYS
    assert tables.held() == OF_A | OF_B | {"Consent/c"}
    assert tables.all("SELECT * FROM fhir.patient_name") == set()


def test_opt_out_shows_until_a_deny_comes_and_again_when_it_is_withdrawn(database: str, cipher: Cipher) -> None:
    tables = Tables(database, OPT_OUT, cipher)
    tables.sweep()
    tables.load(*EVERYTHING)
    assert tables.shown() == OF_A | OF_B | NOBODYS
    tables.load(consent("c", "a", {"type": "deny"}))
    tables.sweep()
    assert tables.shown() == OF_B | NOBODYS
    tables.load(observation("z", "a"), observation("x", "a", version=2))
    assert tables.held() == OF_A | {"Observation/z", "Consent/c"}
    tables.load(consent("c", "a", {"type": "deny"}, version=2, status="rejected"))
    tables.sweep()
    assert tables.shown() == OF_A | OF_B | NOBODYS | {"Observation/z", "Consent/c"}
    assert tables.held() == set()


def test_a_period_that_ends_takes_effect_by_itself(database: str) -> None:
    tables = Tables(database, OPT_IN)
    tables.load(
        *EVERYTHING, consent("c", "a", {"type": "permit", "period": {"start": "2024-01-05", "end": "2024-01-10"}})
    )
    shown = []
    for day in range(12):
        tables.sweep(START + day * DAY)
        shown.append("Patient/a" in tables.shown())
    assert shown == [4 <= day < 10 for day in range(12)]


def test_what_belongs_to_several_patients_is_withheld_with_any_of_them(database: str) -> None:
    tables = Tables(database, OPT_OUT)
    tables.load(*EVERYTHING, observation("both", "a", "b"), consent("c", "b", {"type": "deny"}))
    tables.sweep()
    assert tables.shown() == OF_A | NOBODYS


def test_a_patient_known_by_no_id_is_withheld_under_opt_in_only(database: str) -> None:
    contained = {
        **observation("x"),
        "contained": [{"resourceType": "Patient", "id": "p"}],
        "subject": {"reference": "#p"},
    }
    for gate, shown in ((OPT_OUT, {"Observation/x"}), (OPT_IN, set())):
        tables = Tables(database, gate)
        tables.load(contained)
        tables.sweep()
        assert tables.shown() == shown


def test_the_newest_version_wins_whether_withheld_or_shown(database: str) -> None:
    tables = Tables(database, OPT_OUT)
    tables.load(consent("c", "b", {"type": "deny"}))
    tables.sweep()
    tables.load(observation("x", "a", version=1))
    tables.load(observation("x", "b", version=3))
    assert (tables.shown(), tables.held()) == (set(), {"Observation/x", "Consent/c"})
    tables.load(observation("x", "a", version=2))
    assert (tables.shown(), tables.held()) == (set(), {"Observation/x", "Consent/c"})
    tables.load(observation("x", "a", version=4))
    assert (tables.shown(), tables.held()) == ({"Observation/x"}, {"Consent/c"})
    tables.load(observation("x", "b", version=2))
    assert (tables.shown(), tables.held()) == ({"Observation/x"}, {"Consent/c"})


def test_a_consent_that_now_is_about_someone_else_frees_the_former(database: str) -> None:
    tables = Tables(database, OPT_OUT)
    tables.load(*EVERYTHING, consent("c", "a", {"type": "deny"}))
    tables.sweep()
    tables.load(consent("c", "b", {"type": "deny"}, version=2))
    tables.sweep()
    assert tables.shown() == OF_A | NOBODYS


def test_a_deleted_consent_no_longer_holds_and_what_was_deleted_does_not_come_back(database: str) -> None:
    tables = Tables(database, OPT_OUT)
    tables.load(*EVERYTHING, observation("z", "a"), consent("c", "a", {"type": "deny"}))
    tables.sweep()
    with tables.connect() as conn:
        gone = [Deletion("Consent", "c", START + DAY), Deletion("Observation", "z", START + DAY)]
        deletions.apply(conn, gone, run_id="run")
    assert tables.held() == OF_A
    tables.sweep()
    assert tables.shown() == OF_A | OF_B | NOBODYS
    tables.load(observation("z", "a"), consent("c", "a", {"type": "deny"}))
    tables.sweep()
    assert tables.shown() == OF_A | OF_B | NOBODYS


def test_a_policy_that_is_switched_goes_over_all_that_is_there(database: str, cipher: Cipher) -> None:
    Tables(database, ConsentGate(), cipher).load(*EVERYTHING, consent("c", "a", {"type": "permit"}))
    tables = Tables(database, OPT_IN, cipher)
    with tables.connect() as conn:  # as rows from before the first policy, or from before this version
        conn.execute("UPDATE fhir.resource SET patients = NULL")
        conn.execute("DELETE FROM ops.consent_records")
        conn.execute("DELETE FROM ops.consent_changes")
    tables.sweep()
    assert tables.shown() == OF_A | NOBODYS | {"Consent/c"}
    off = Tables(database, ConsentGate(), tables.cipher)
    off.sweep()
    assert off.shown() == OF_A | OF_B | NOBODYS | {"Consent/c"}
    assert off.held() == set()


def test_what_a_replay_heals_is_withheld_too(database: str) -> None:
    tables = Tables(database, OPT_IN)
    tables.load(*EVERYTHING, consent("c", "a", {"type": "permit"}))
    tables.sweep()
    newer = {"gender": "male", "meta": {"versionId": "2", "lastUpdated": "2024-01-02T00:00:00Z"}}
    letters = [
        DeadLetter("Patient", key, "load", "unloadable", "", "", json.dumps(patient(key, **newer)).encode(), "k")
        for key in ("a", "b", "new")
    ]
    with tables.connect() as conn:
        dead_letters.record(conn, "failed", letters)
    of_patients = [each for each in VIEWS if each.resource_type == "Patient"]
    replay = ReplayLoadStep(tables.connect, of_patients, run_id="replay", also_open=True, consent_gate=OPT_IN)
    assert replay.run("Patient", [Window(None, START, "k")]).resolved == 3
    assert tables.all("SELECT gender FROM fhir.patient") == {"male"}
    assert tables.shown() == OF_A | NOBODYS | {"Consent/c"}
    assert tables.held() == OF_B | {"Patient/new"}


def test_what_consent_did_is_on_record(database: str) -> None:
    tables = Tables(database, OPT_IN)
    tables.load(*EVERYTHING, consent("c", "a", {"type": "permit"}))
    tables.sweep()
    with tables.connect() as conn:
        audit_records = [entry.audit_record for entry in audit_log.find_latest(conn, limit=50)]
        assert AuditRecord("consent decision", "test", "Consent", count=2, run_id="sweep") in audit_records
        assert AuditRecord("release", "test", "Observation", count=1, run_id="sweep") in audit_records
        assert audit_log.find_fault(conn) is None


# The naive model: it knows nothing of sweeps, versions or periods' ends, and looks at everything anew each time.

_CODES = {"data-sharing": {"TREAT", "HOPERAT"}, "research": {"HRESCH", "CLINTRCH"}}


def naive(gate: ConsentGate, histories: dict[str, dict[str, list[dict[str, Any]]]], day: str) -> set[str]:
    """The patients who must be shown on a day."""
    shown = set()
    for who, by_consent in histories.items():
        verdicts = set()
        for versions in by_consent.values():
            newest = max(versions, key=lambda each: int(each["meta"]["versionId"]))
            if newest["status"] == "active":
                verdicts.add(naive_rule(newest["provision"], gate.purpose.value, day))
        denied, permitted = "deny" in verdicts, "permit" in verdicts and "deny" not in verdicts
        if permitted if gate.policy is Policy.OPT_IN else not denied:
            shown.add(who)
    return shown


def naive_rule(rule: dict[str, Any], purpose: str, day: str) -> str | None:
    codes = {each["code"] for each in rule.get("purpose", [])}
    period = rule.get("period", {})
    applies = not codes or codes & _CODES[purpose]
    if not applies or not period.get("start", "0") <= day <= period.get("end", "9"):
        return None
    inner = {naive_rule(each, purpose, day) for each in rule.get("provision", [])} - {None}
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
_any_story = given(
    seed=st.integers(0, 2**32),
    policy=st.sampled_from([Policy.OPT_IN, Policy.OPT_OUT]),
    purpose=st.sampled_from(Purpose),
)


@settings(max_examples=4, deadline=None, suppress_health_check=_SLOW_FIXTURES)
@_any_story
def test_the_tables_show_what_a_naive_model_says(database: str, seed: int, policy: Policy, purpose: Purpose) -> None:
    story(database, seed, ConsentGate(policy, purpose), patients=60, steps=3)


@pytest.mark.slow
@settings(max_examples=12, deadline=None, suppress_health_check=_SLOW_FIXTURES)
@_any_story
def test_the_tables_show_what_a_naive_model_says_for_a_thousand_patients(
    database: str, seed: int, policy: Policy, purpose: Purpose
) -> None:
    story(database, seed, ConsentGate(policy, purpose), patients=1000, steps=5)


def story(database: str, seed: int, gate: ConsentGate, *, patients: int, steps: int) -> None:
    """Consents come, are narrowed, revoked, run out and contradict each other, for half of the patients at a time."""
    chance = random.Random(seed)
    people = [f"p{number}" for number in range(patients)]
    with connect(database, cipher=NO_ENCRYPTION) as conn:
        for table in ("consents", "consent_records", "consent_changes", "consent_policy", "withheld"):
            conn.execute(f"DELETE FROM ops.{table}".encode())
        ensure_tables(conn, VIEWS)
        for table in ("resource", *(each.name for each in VIEWS)):
            conn.execute(f"DELETE FROM fhir.{table}".encode())
    tables = Tables(database, gate)
    tables.sweep()
    tables.load(*(patient(key) for key in people), *(observation(f"o{key}", key) for key in people))
    histories: dict[str, dict[str, list[dict[str, Any]]]] = {key: {} for key in people}
    for step in range(steps):
        now = START + step * 4 * DAY + DAY / 2
        said = []
        for key in chance.sample(people, patients // 2):
            name = f"c{key}-{chance.randrange(2)}"
            versions = histories[key].setdefault(name, [])
            status = chance.choice(["active", "active", "active", "inactive", "rejected"])
            versions.append(consent(name, key, random_rule(chance), len(versions) + 1, status))
            said.append(versions[-1])
        tables.load(*said)
        tables.sweep(now)
        expected = naive(gate, histories, now.date().isoformat())
        shown = tables.shown()
        assert {each.split("/")[1] for each in shown if each.startswith("Patient/")} == expected
        assert {each.split("/o")[1] for each in shown if each.startswith("Observation/")} == expected
        assert {each.split("/")[1].split("-")[0][1:] for each in shown if each.startswith("Consent/")} <= expected
        assert len(shown) + len(tables.held()) == 2 * patients + sum(map(len, histories.values()))
