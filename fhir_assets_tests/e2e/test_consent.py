"""Runs withhold and release resources as consent changes, and all windows reconcile."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from pyarrow.parquet import read_table

from fhir_assets.ingestion.outcome import Outcome
from fhir_assets.privacy.encryption import NO_ENCRYPTION
from fhir_assets.privacy.keys import new_key
from fhir_assets.sandbox.process import SandboxServer
from fhir_assets.storage.blobs import LocalBlobs
from fhir_assets.warehouse.exports.export import Export
from fhir_assets.warehouse.postgres.db.connections import connect
from fhir_assets_tests.support.consent_resources import DAY, consent, observation, resource
from fhir_assets_tests.support.content import add
from fhir_assets_tests.support.deployment import Deploy, Deployment
from fhir_assets_tests.support.written_files import write_files

pytestmark = pytest.mark.slow


@pytest.fixture
def server() -> Iterator[SandboxServer]:
    people = [resource("Patient", key, DAY, name=[{"family": key}]) for key in "ab"]
    with SandboxServer([*people, *(observation(f"o{key}{n}", key) for key in "ab" for n in range(3))]) as server:
        yield server


def deploy_with_policy(deploy: Deploy, server: SandboxServer, policy: str, **values: Any) -> Deployment:
    """Return a deployment that loads Patients, Observations and Consents from the server under a consent policy."""
    return deploy(
        fhir_base_url=server.url,
        fhir_resource_types="Patient,Observation,Consent",
        fhir_last_updated_gte="2024-01-01",
        fhir_partition="monthly",
        consent_policy=policy,
        **values,
    )


@pytest.fixture(params=["opt-in", "opt-out"])
def deployment(request: pytest.FixtureRequest, deploy: Deploy, server: SandboxServer) -> Deployment:
    keys = new_key() if request.param == "opt-in" else None
    return deploy_with_policy(deploy, server, request.param, phi_encryption_keys=keys)


def list_patients_in_tables(deployment: Deployment) -> tuple[set[str], set[str]]:
    """Return the patients in fhir.patient_name and the subjects in fhir.observation."""
    patients = {key for (key,) in deployment.query("SELECT patient_key FROM fhir.patient_name")}
    about = {key for (key,) in deployment.query("SELECT patient_key FROM fhir.observation")}
    return patients, about


def ingest(deployment: Deployment) -> Outcome:
    [outcome] = deployment.ingest()
    assert outcome.success
    assert deployment.unreconciled(outcome) == []
    return outcome


def test_resources_are_released_and_withheld_as_consent_changes(deployment: Deployment, server: SandboxServer) -> None:
    withheld_by_default = deployment.settings.consent_policy == "opt-in"
    others = set() if withheld_by_default else {"b"}
    first = ingest(deployment)
    assert list_patients_in_tables(deployment) == ((set(), set()) if withheld_by_default else ({"a", "b"}, {"a", "b"}))
    counted = deployment.query(
        "SELECT sum(valid)::int, sum(withheld)::int, sum(loaded)::int FROM ops.ingestion_runs WHERE run_id = %s",
        first.run_id,
    )
    assert counted == ([(0, 8, 0)] if withheld_by_default else [(8, 0, 8)])
    add(server, consent("permit" if withheld_by_default else "deny", datetime.now(UTC)))
    ingest(deployment)
    assert list_patients_in_tables(deployment) == (({"a"}, {"a"}) if withheld_by_default else ({"b"}, {"b"}))
    add(server, consent("permit", datetime.now(UTC), version="2", status="inactive"))
    ingest(deployment)
    assert list_patients_in_tables(deployment) == (others | (set() if withheld_by_default else {"a"}),) * 2
    assert deployment.query("SELECT count(*) FROM ops.consents") == [(0,)]


def test_resources_of_a_patient_who_denied_consent_are_never_inserted(deploy: Deploy, server: SandboxServer) -> None:
    add(server, consent("deny", DAY))
    deployment = deploy_with_policy(deploy, server, "opt-out")
    ingest(deployment)
    # The Consent itself is created first, because it is unknown before it is loaded.
    created: dict[str, int] = dict(
        deployment.query("SELECT resource_type, count FROM ops.audit_log WHERE action = 'create'")
    )
    assert created == {"Observation": 3, "Patient": 1, "Consent": 1}
    assert list_patients_in_tables(deployment) == ({"b"}, {"b"})


def test_exports_and_the_lake_leave_out_withheld_resources(
    deploy: Deploy, server: SandboxServer, tmp_path: Path
) -> None:
    deployment = deploy_with_policy(deploy, server, "opt-out")
    folder = LocalBlobs(tmp_path / "left")

    def find_exported_patients() -> set[str]:
        """Return the patients in the exports and in the lake, which must be equal."""
        write_files(deployment, folder, ["patient", "observation"])
        resources = (folder.root / "export" / "Patient.valid.ndjson").read_bytes().splitlines()
        of_export = [json.loads(line) for line in (folder.root / "export" / "observation.ndjson").open()]
        of_lake = [row for path in folder.root.glob("patient/*/*.parquet") for row in read_table(path).to_pylist()]
        assert {row["patient_key"] for row in of_export} == {row["id"] for row in of_lake}
        assert {json.loads(line)["id"] for line in resources} == {row["id"] for row in of_lake}
        return {row["id"] for row in of_lake}

    ingest(deployment)
    assert find_exported_patients() == {"a", "b"}
    add(server, consent("deny", datetime.now(UTC)))
    ingest(deployment)
    assert find_exported_patients() == {"b"}
    add(server, consent("deny", datetime.now(UTC), version="2", status="inactive"))
    ingest(deployment)
    assert find_exported_patients() == {"a", "b"}


def test_an_export_leaves_out_earlier_versions_that_are_about_another_patient(
    deploy: Deploy, server: SandboxServer, tmp_path: Path
) -> None:
    deployment = deploy_with_policy(deploy, server, "opt-out")
    ingest(deployment)
    subject = {"reference": "Patient/b"}
    moment = datetime.now(UTC)
    moved = resource("Observation", "oa0", moment, version="2", status="final", code={"text": "x"}, subject=subject)
    add(server, moved)
    ingest(deployment)
    add(server, consent("deny", datetime.now(UTC)))
    ingest(deployment)
    with connect(deployment.url, cipher=NO_ENCRYPTION) as conn:
        folder = LocalBlobs(tmp_path / "left")
        with Export(conn, deployment.store, folder, "e", actor="test", withholding=True) as export:
            export.for_type("Observation", None).write_valid()
            export.finish()
    lines = (tmp_path / "left" / "e" / "Observation.valid.ndjson").read_bytes().splitlines()
    assert {json.loads(line)["subject"]["reference"] for line in lines} == {"Patient/b"}
    assert len(lines) == 4
