"""A posted Consent is obeyed from its answer on, before it is loaded, by every read and export."""

import json
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fhir_assets.cli.main import app
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.warehouse.ops import consents
from fhir_assets_tests.support.api import TOKENS, Api, api_in_threads
from fhir_assets_tests.support.channels import encode
from fhir_assets_tests.support.consent_forms import (
    DENIALS,
    MARKER,
    build,
    build_consent,
    build_patient,
    build_settings,
)
from fhir_assets_tests.support.deployment import Deploy, Deployment
from fhir_assets_tests.support.landing import LandingZone, land, load_received

pytestmark = pytest.mark.slow

FHIR = {"Content-Type": "application/fhir+json"}
KEYS = (*DENIALS, "ok")


def build_visit(key: str, subject: str, **more: Any) -> dict[str, Any]:
    coding = {"system": "http://terminology.hl7.org/CodeSystem/v3-ActCode", "code": "AMB"}
    return build("Encounter", key, status="finished", subject={"reference": subject}, **{"class": coding, **more})


def deploy_clinic(deploy: Deploy, folder: Path, policy: str = "opt-out", **values: Any) -> Deployment:
    """Return a deployment with loaded patients, a visit each, and permits for all of them."""
    (folder / "landing").mkdir()
    zone = LandingZone(str(folder / "landing"))
    settings = build_settings("Patient,Encounter,Consent", policy)
    deployment = deploy(
        fhir_landing_url=zone.url,
        fhir_export_url=str(folder / "exports"),
        api_tokens=TOKENS,
        **settings,
        **values,
    )
    patients = [build_patient(key, "Loaded" if key == "ok" else MARKER) for key in KEYS]
    visits = [build_visit(f"e-{key}", f"Patient/{key}") for key in KEYS]
    permits = [build_consent(f"permit-{key}", {"reference": f"Patient/{key}"}, "permit") for key in KEYS]
    zone.put("all.ndjson", encode([*patients, *visits, *(permits if policy == "opt-in" else ())]))
    assert land(deployment) == []
    return deployment


def post(api: Api, channel: str, resources: Iterable[dict[str, Any]]) -> None:
    if channel == "/fhir":
        bundle = {"resourceType": "Bundle", "type": "collection", "entry": [{"resource": each} for each in resources]}
        assert api.post(channel, data=json.dumps(bundle), headers=FHIR).status_code == 200
    else:
        answer = api.post(channel, json={"records": list(resources)})
        assert (answer.status_code, answer.json()["rejected"]) == (202, 0)


def build_denials() -> list[dict[str, Any]]:
    return [build_consent(f"deny-{key}", **{"provision_type": "deny", **more}) for key, more in DENIALS.items()]


@pytest.mark.parametrize("policy", ["opt-out", "opt-in"])
@pytest.mark.parametrize("channel", ["/fhir", "/api/v1/ingest"])
def test_a_posted_denial_in_every_form_is_obeyed_by_the_next_read(
    deploy: Deploy, tmp_path: Path, channel: str, policy: str
) -> None:
    deployment = deploy_clinic(deploy, tmp_path, policy)
    with api_in_threads(deployment.settings) as api:
        assert sorted(each["id"] for each in api.get("/patients").json()["patients"]) == sorted(KEYS)
        post(api, channel, build_denials())
        statuses = {key: api.get(f"/patients/{key}").status_code for key in KEYS}
        assert statuses == {**dict.fromkeys(DENIALS, 403), "ok": 200}
        listed = api.get("/patients").json()["patients"]
        assert [(each["id"], [visit["id"] for visit in each["visits"]]) for each in listed] == [("ok", ["e-ok"])]
        assert load_received(deployment) == []
        assert {key: api.get(f"/patients/{key}").status_code for key in KEYS} == statuses
    assert deployment.query("SELECT id FROM fhir.patient") == [("ok",)]
    assert deployment.query("SELECT id FROM fhir.encounter") == [("e-ok",)]


def test_exports_and_commands_that_begin_after_the_answer_obey_it(
    deploy: Deploy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deployment = deploy_clinic(deploy, tmp_path)
    exports = tmp_path / "exports"
    of_the_load = set(exports.rglob("*"))
    with api_in_threads(deployment.settings) as api:
        post(api, "/fhir", build_denials())
        assert api.post("/export/Patient", params={"include_normalized": "false"}).status_code == 200
    files = [path for path in exports.rglob("*") if path.is_file() and path not in of_the_load]
    assert files
    assert not [path.name for path in files if MARKER.encode() in path.read_bytes()]
    for name, value in deployment.environment().items():
        monkeypatch.setenv(name, value)
    shown = CliRunner().invoke(app, ["patient", "show", "literal", "--everything"])
    assert (shown.exit_code, MARKER in shown.output) == (1, False)


def test_a_visit_that_names_a_patient_who_denied_is_left_out_of_another_patients_visits(
    deploy: Deploy, tmp_path: Path
) -> None:
    deployment = deploy_clinic(deploy, tmp_path)
    also = {"url": "https://example.org/also", "valueReference": {"reference": "Patient/literal"}}
    shared = build_visit("shared", "Patient/ok", extension=[also])
    with api_in_threads(deployment.settings) as api:
        post(api, "/api/v1/ingest", [shared])
        assert load_received(deployment) == []
        assert {visit["id"] for visit in api.get("/patients/ok").json()["visits"]} == {"e-ok", "shared"}
        post(api, "/api/v1/ingest", [build_consent("deny", {"reference": "Patient/literal"}, "deny")])
        assert {visit["id"] for visit in api.get("/patients/ok").json()["visits"]} == {"e-ok"}


def test_a_post_does_not_wait_for_a_load_in_progress(deploy: Deploy, tmp_path: Path) -> None:
    deployment = deploy_clinic(deploy, tmp_path)
    with api_in_threads(deployment.settings) as api, Warehouse(deployment.settings).connect() as conn:
        consents.lock_decisions_for_load(conn)  # as a load does until its transaction ends
        post(api, "/fhir", [build_consent("deny", {"reference": "Patient/literal"}, "deny")])
        assert api.get("/patients/literal").status_code == 403


def test_of_a_denial_and_a_permit_that_are_posted_at_once_the_denial_counts(deploy: Deploy, tmp_path: Path) -> None:
    deployment = deploy_clinic(deploy, tmp_path)
    with api_in_threads(deployment.settings) as api:
        for n in range(5):
            posts = [
                threading.Thread(
                    target=post,
                    args=(
                        api,
                        "/fhir",
                        [build_consent(f"{verdict}-{key}-{n}", {"reference": f"Patient/{key}"}, verdict)],
                    ),
                )
                for key in ("literal", "scope")
                for verdict in ("deny", "permit")
            ]
            for thread in posts:
                thread.start()
            for thread in posts:
                thread.join()
        assert [api.get(f"/patients/{key}").status_code for key in ("literal", "scope", "ok")] == [403, 403, 200]


def test_a_posted_permit_counts_when_it_is_loaded_and_a_withdrawn_denial_releases(
    deploy: Deploy, tmp_path: Path
) -> None:
    deployment = deploy_clinic(deploy, tmp_path)
    denial = build_consent("deny", {"reference": "Patient/literal"}, "deny")
    with api_in_threads(deployment.settings) as api:
        post(api, "/fhir", [denial])
        assert load_received(deployment) == []
        assert api.get("/patients/literal").status_code == 403
        withdrawn = {**denial, "status": "inactive", "meta": {"lastUpdated": "2024-02-01T00:00:00Z"}}
        post(api, "/fhir", [withdrawn])
        assert load_received(deployment) == []
        assert api.get("/patients/literal").status_code == 200
