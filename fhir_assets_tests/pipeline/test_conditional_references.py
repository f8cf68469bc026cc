"""Conditional references get keys, keep them, and lose them, whatever happens to the resources that they lead to."""

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fhir_assets.pipeline.load import conditional_references
from fhir_assets.pipeline.rebuild.step import RebuildStep
from fhir_assets.pipeline.refresh import Refresh
from fhir_assets.privacy.consent import ConsentGate, Policy
from fhir_assets.privacy.encryption import Cipher
from fhir_assets.privacy.keys import new_key, parse_keys
from fhir_assets.warehouse.ops import checkpoints, encryption_secret
from fhir_assets.warehouse.postgres.db.connections import Session, connect
from fhir_assets.warehouse.postgres.db.schema_state import sql_folder
from fhir_assets_tests.support.consent_records import VIEWS
from fhir_assets_tests.support.consent_resources import DAY, consent
from fhir_assets_tests.support.small_hospital import SmallHospital, build_patient
from fhir_assets_tests.support.views import column, view

OBSERVATION = view(
    "observation",
    "Observation",
    column("status", "status", "code"),
    column("patient_key", "subject.getReferenceKey(Patient)", "string"),
)
REFERENCE = "Patient?identifier=urn:mrn|7"


@pytest.fixture
def hospital(database: str, tmp_path: Path) -> SmallHospital:
    return open_hospital(database, tmp_path)


def open_hospital(url: str, folder: Path, cipher: Cipher | None = None, **more: Any) -> SmallHospital:
    with connect(url) as conn:
        unlocked = encryption_secret.unlock(conn, cipher or Cipher())
    hospital = SmallHospital(url, folder, cipher=unlocked, **more)
    hospital.views = [OBSERVATION if each.name == "observation" else each for each in VIEWS]
    return hospital


def identified(key: str, *values: str, **more: Any) -> dict[str, Any]:
    return build_patient(key, identifier=[{"system": "urn:mrn", "value": value} for value in values], **more)


def observation(key: str = "o", reference: str = REFERENCE, version: int = 1) -> dict[str, Any]:
    template = build_patient(key, version=version)
    return {
        "resourceType": "Observation",
        "id": key,
        "meta": template["meta"],
        "status": "final",
        "code": {"text": "x"},
        "subject": {"reference": reference},
    }


def load(
    hospital: SmallHospital, *resources: dict[str, Any], refresh: Refresh = Refresh.MISSING, resolve: bool = True
) -> None:
    """Receive resources, load the windows of their types, and resolve what waits, as the assets do."""
    for name in dict.fromkeys(each["resourceType"] for each in resources):
        of_type = [each for each in resources if each["resourceType"] == name]
        hospital.receive(*of_type, origin=f"file-{id(of_type)}-{len(str(of_type))}")
        reload(hospital, name, refresh)
    if resolve:
        hospital.resolve_references()


def reload(hospital: SmallHospital, name: str, refresh: Refresh = Refresh.WINDOW) -> None:
    with hospital.live_run("load"):
        hospital.validate("load", refresh=refresh, resource_type=name)
        hospital.load_tables("load", refresh=refresh, resource_type=name)


def find_keys(hospital: SmallHospital) -> dict[str, str | None]:
    """Return the keys of the observations' patients; require that the others are counted as without a key."""
    with hospital.connect() as conn:
        keys = dict(conn.execute("SELECT _resource_key, patient_key FROM fhir.observation").fetchall())
        counted = conn.execute(
            "SELECT id FROM fhir.resource WHERE resource_type = 'Observation' AND keyless <> '{}' ORDER BY id"
        ).fetchall()
        patients = conn.execute("SELECT id, patients[1] FROM fhir.resource WHERE resource_type = 'Observation'")
        members = dict(patients.fetchall())
    assert [key for (key,) in counted] == sorted(key for key, found in keys.items() if found is None)
    if not hospital.gate.withholds:
        assert {key: None if found == "?" else found for key, found in members.items()} == keys
    return keys


def test_the_patient_may_come_before_with_or_after_the_reference(hospital: SmallHospital) -> None:
    load(hospital, observation("before"), identified("p", "7"))
    assert find_keys(hospital) == {"before": "p"}
    load(hospital, observation("after"), resolve=False)
    assert find_keys(hospital) == {"before": "p", "after": "p"}


def test_several_matches_make_no_key_until_one_is_left(hospital: SmallHospital) -> None:
    load(hospital, identified("p", "7"), identified("q", "7", "8"), observation())
    assert find_keys(hospital) == {"o": None}
    load(hospital, identified("q", "8", version=2))
    assert find_keys(hospital) == {"o": "p"}


def test_a_deleted_patient_is_not_found_and_the_next_one_is(hospital: SmallHospital) -> None:
    load(hospital, identified("p", "7"))
    hospital.delete("p")
    load(hospital, observation())
    assert find_keys(hospital) == {"o": None}
    load(hospital, identified("q", "7"))
    assert find_keys(hospital) == {"o": "q"}


def test_patients_that_were_loaded_before_the_first_reference_are_found(hospital: SmallHospital) -> None:
    load(hospital, *(identified(f"p{n}", str(n)) for n in range(10)))
    with hospital.connect() as conn:
        assert conn.execute("SELECT count(identifiers) FROM fhir.resource").fetchone() == (0,)
    load(hospital, observation())
    assert find_keys(hospital) == {"o": "p7"}


def test_a_reload_of_the_window_keeps_the_keys_without_a_moment_in_between(hospital: SmallHospital) -> None:
    load(hospital, identified("p", "7"), observation())
    reload(hospital, "Observation")
    assert find_keys(hospital) == {"o": "p"}
    reload(hospital, "Patient")
    load(hospital, observation("o", version=2), observation("more"), resolve=False)
    assert find_keys(hospital) == {"o": "p", "more": "p"}


def test_a_resource_that_refers_to_its_own_type_and_has_identifiers_itself(hospital: SmallHospital) -> None:
    first = {**observation("first"), "identifier": [{"value": "77"}]}
    member = {**observation("second"), "hasMember": [{"reference": "Observation?identifier=77"}]}
    load(hospital, identified("p", "7"), first, member)
    assert find_keys(hospital) == {"first": "p", "second": "p"}


@pytest.mark.parametrize("from_clear", [False, True])
def test_a_rotation_of_keys_keeps_the_keys_of_references(database: str, tmp_path: Path, from_clear: bool) -> None:
    old = parse_keys([new_key()])
    hospital = open_hospital(database, tmp_path, None if from_clear else Cipher(old))
    load(hospital, identified("p", "7"), observation(), observation("waits", "Patient?identifier=8"))
    new = parse_keys([new_key()])
    rotated = open_hospital(database, tmp_path, Cipher([*new, *(() if from_clear else old)]))
    assert rotated.rotate() == 0
    rotated.resolve_references()
    assert find_keys(rotated) == {"o": "p", "waits": None}
    load(rotated, identified("q", "8"))
    assert find_keys(rotated) == {"o": "p", "waits": "q"}


def test_a_rebuild_of_changed_tables_keeps_the_keys_of_references(hospital: SmallHospital) -> None:
    load(hospital, identified("p", "7"), observation(), observation("waits", "Patient?identifier=8"))
    code = column("code", "code.text", "string")
    wider = view("observation", "Observation", *OBSERVATION.definition["select"][0]["column"], code)
    hospital.views = [wider if each is OBSERVATION else each for each in hospital.views]
    assert RebuildStep(hospital.connect, hospital.views).run().rebuilt == {"Observation": 2}
    assert find_keys(hospital) == {"o": "p", "waits": None}
    load(hospital, identified("q", "8"))
    assert find_keys(hospital) == {"o": "p", "waits": "q"}


def test_what_was_loaded_before_the_upgrade_is_looked_at(hospital: SmallHospital) -> None:
    load(hospital, identified("p", "7"), resolve=False)
    load(hospital, observation(), observation("other", "Patient/p"), resolve=False)
    with hospital.connect() as conn:
        conn.execute("ALTER TABLE fhir.resource DROP COLUMN identifiers")
        conn.execute("DROP TABLE ops.identifier_types")
        run_revision(conn, "0032_identifiers")
    assert hospital.resolve_references()
    assert find_keys(hospital) == {"o": "p", "other": "p"}


def test_a_reference_to_a_patient_whom_consent_withholds_makes_no_key(database: str, tmp_path: Path) -> None:
    hospital = open_hospital(database, tmp_path, gate=ConsentGate(Policy.OPT_OUT))
    load(hospital, identified("a", "7"), identified("q", "8"), json.loads(consent("deny", DAY)))
    hospital.apply_consent()
    load(hospital, observation(), observation("loaded", "Patient?identifier=8"))
    hospital.apply_consent()
    hospital.resolve_references()
    assert find_keys(hospital) == {"loaded": "q"}


@pytest.mark.parametrize("first", ["Patient", "Observation"])
def test_whichever_of_two_loads_commits_last_gives_the_key(
    hospital: SmallHospital, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    load(hospital, identified("other", "1"), observation("earlier", "Patient?identifier=1"))
    hospital.receive(identified("p", "7"), origin="patient")
    hospital.receive(observation(), origin="observation")
    second = "Observation" if first == "Patient" else "Patient"

    def load_other(*arguments: object) -> None:
        """Load the other type, and resolve, while the first load has written and not committed."""
        monkeypatch.undo()
        reload(hospital, second, Refresh.MISSING)
        hospital.resolve_references()

    monkeypatch.setattr(checkpoints, "record_loaded_parts", run_before(checkpoints.record_loaded_parts, load_other))
    reload(hospital, first, Refresh.MISSING)
    assert find_keys(hospital) == {"earlier": "other", "o": None}
    hospital.resolve_references()
    assert find_keys(hospital) == {"earlier": "other", "o": "p"}


def test_a_load_at_the_moment_of_the_first_reference_is_not_missed(
    hospital: SmallHospital, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(hospital, observation(), resolve=False)
    hospital.receive(identified("p", "7"), origin="patient")

    def resolve(*arguments: object) -> None:
        monkeypatch.undo()
        monkeypatch.setattr(conditional_references, "_BUSY_SECONDS", 0.0)
        hospital.resolve_references()

    monkeypatch.setattr(checkpoints, "record_loaded_parts", run_before(checkpoints.record_loaded_parts, resolve))
    reload(hospital, "Patient", Refresh.MISSING)
    assert find_keys(hospital) == {"o": None}
    hospital.resolve_references()
    assert find_keys(hospital) == {"o": "p"}


def run_revision(conn: Session, name: str) -> None:
    """Execute the statements of one revision."""
    path = sql_folder() / "migrations" / "versions" / f"{name}.py"
    variables = runpy.run_path(str(path))
    operations = SimpleNamespace(execute=lambda statement: conn.execute(statement.encode()))
    variables["upgrade"].__globals__["op"] = operations
    variables["upgrade"]()


def run_before(function: Callable[..., Any], first: Callable[..., object]) -> Callable[..., Any]:
    """Return a function that calls ``first`` before ``function``."""

    def run(*arguments: Any, **options: Any) -> Any:
        first()
        return function(*arguments, **options)

    return run
