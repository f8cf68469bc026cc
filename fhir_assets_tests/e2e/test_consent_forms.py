"""Every form of docs/privacy.md in which a Consent names its patient and a resource its subject, through each channel.

A deployment loads all forms at once. The texts of the resources that consent withholds contain a marker, which is in no
table, export, lake, API answer or message afterwards.
"""

import json
import logging
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from pydantic import SecretStr
from typer.testing import CliRunner

from fhir_assets.cli.main import app
from fhir_assets.definitions import build_definitions
from fhir_assets.fhir.intake.resources import MRN_SYSTEM
from fhir_assets.sandbox.process import SandboxServer
from fhir_assets.storage.blobs import LocalBlobs
from fhir_assets_tests.support.alerts import AlertsSensor, receive_webhooks
from fhir_assets_tests.support.api import TOKENS, api_in_threads
from fhir_assets_tests.support.channels import BUNDLE_CHANNELS, CHANNELS, deploy_landing, encode, name
from fhir_assets_tests.support.consent_forms import (
    DENIALS,
    ELSEWHERE,
    MARKER,
    MRN,
    URN,
    build,
    build_consent,
    build_contained,
    build_patient,
    build_settings,
)
from fhir_assets_tests.support.deployment import Deploy, Deployment
from fhir_assets_tests.support.echoing_server import serve_echo
from fhir_assets_tests.support.landing import land
from fhir_assets_tests.support.leak_scan import tables
from fhir_assets_tests.support.uploads import read_back
from fhir_assets_tests.support.visits import visit
from fhir_assets_tests.support.written_files import write_files

pytestmark = pytest.mark.slow

TYPES = "Patient,Observation,Consent,Provenance,DiagnosticReport,Organization,Practitioner,Condition"


def build_observation(key: str, subject: dict[str, Any], text: str = MARKER, **more: Any) -> dict[str, Any]:
    return build("Observation", key, status="final", code={"text": text}, subject=subject, **more)


SUBJECTS: dict[str, dict[str, Any]] = {
    "literal": {"subject": {"reference": "Patient/literal"}},
    "versioned": {"subject": {"reference": "Patient/literal/_history/1"}},
    "identifier": {"subject": {"identifier": {"system": MRN, "value": "mrn-literal"}}},
    "conditional": {"subject": {"reference": f"Patient?identifier={MRN}|mrn-literal"}},
    "contained": {"subject": {"reference": "#inner"}, "contained": build_contained("mrn-literal")},
    "unknown-urn": {"subject": {"reference": URN}},
    "unknown-identifier": {"subject": {"identifier": {"system": MRN, "value": "nobody's"}}},
    "unknown-conditional": {"subject": {"reference": "Patient?name=x"}},
    "unknown-server": {"subject": {"reference": ELSEWHERE}},
    "unknown-contained": {
        "subject": {"reference": "#inner"},
        "contained": [{"resourceType": "Patient", "id": "inner", "gender": "male"}],
    },
    "display": {"subject": {"display": "somebody"}},
    "performer": {"subject": {"reference": "Patient/ok"}, "performer": [{"reference": "Patient/literal"}]},
    "focus": {"subject": {"reference": "Patient/ok"}, "focus": [{"reference": "Patient/literal"}]},
    "member": {"subject": {"reference": "Patient/ok"}, "hasMember": [{"reference": "Observation/s-literal"}]},
    "inner": {
        "subject": {"reference": "Patient/ok"},
        "hasMember": [{"reference": "#o"}],
        "contained": [
            {
                "resourceType": "Observation",
                "id": "o",
                "status": "final",
                "code": {"text": "x"},
                "subject": {"reference": "Patient/literal"},
            }
        ],
    },
}
"""The elements of Observations that consent withholds, by form."""

OF_THE_DENIED = {"reference": "Observation/s-literal"}


def build_withheld() -> list[dict[str, Any]]:
    """Return the resources that must not be in the tables."""
    return [
        *map(build_patient, DENIALS),
        *(build_consent(f"deny-{key}", **{"provision_type": "deny", **more}) for key, more in DENIALS.items()),
        *(build_observation(f"o-{key}", {"reference": f"Patient/{key}"}) for key in DENIALS),
        *(build_observation(f"s-{form}", **more) for form, more in SUBJECTS.items()),
        build(
            "Provenance",
            "v",
            target=[OF_THE_DENIED],
            recorded="2024-01-05T00:00:00Z",
            agent=[{"who": {"display": MARKER}}],
        ),
        build(
            "DiagnosticReport",
            "r",
            status="final",
            code={"text": MARKER},
            subject={"reference": "Patient/ok"},
            result=[OF_THE_DENIED],
        ),
        build(
            "Condition",
            "c",
            code={"text": MARKER},
            subject={"reference": "Patient/ok"},
            evidence=[{"detail": [{"reference": "DiagnosticReport/r"}]}],
        ),
    ]


def build_loaded() -> list[dict[str, Any]]:
    """Return the resources that must be in the tables."""
    practitioner = {"reference": "Practitioner/doc"}
    return [
        build_patient("ok", "Loaded"),
        build_observation("o-ok", {"reference": "Patient/ok"}, "loaded", performer=[practitioner]),
        build_observation("o-device", {"type": "Device", "identifier": {"value": "9"}}, "loaded"),
        build("Organization", "org", name="Clinic"),
        build("Practitioner", "doc", name=[{"family": "Doc"}]),
        build(
            "Provenance",
            "v-ok",
            target=[{"reference": "Observation/o-ok"}],
            recorded="2024-01-05T00:00:00Z",
            agent=[{"who": practitioner}],
        ),
    ]


PERMITTED = ("ok", *DENIALS)


def build_permits() -> list[dict[str, Any]]:
    return [build_consent(f"permit-{key}", {"reference": f"Patient/{key}"}, "permit") for key in PERMITTED]


BY_URL = "urn:uuid:0f2a1c34-0000-4000-8000-0000000000aa"


def build_bundle_entries() -> list[dict[str, Any]]:
    """Return entries of a Bundle in which a Patient and its denial meet by a full URL."""
    return [
        {"fullUrl": BY_URL, "resource": build_patient("by-url")},
        {"resource": build_consent("deny-by-url", {"reference": BY_URL}, "deny")},
    ]


@pytest.mark.parametrize("policy", ["opt-out", "opt-in"])
@pytest.mark.parametrize(
    "channel",
    ["files", *(pytest.param(each, marks=pytest.mark.slow) for each in ("landing zone", "search", "bulk", "post"))],
)
def test_a_denial_counts_in_every_form_and_withholds_by_every_form_of_subject(
    deploy: Deploy, tmp_path: Path, channel: str, policy: str, caplog: pytest.LogCaptureFixture
) -> None:
    resources = [*build_withheld(), *build_loaded(), *build_permits()]
    values = {**build_settings(TYPES, policy), "api_tokens": TOKENS, "dead_letter_error_rate": 0.0001}
    if channel in BUNDLE_CHANNELS:
        resources += build_bundle_entries()
    else:
        resources.append(build("Observation", "dead", code={"text": MARKER}, subject={"reference": "Patient/literal"}))
    with SandboxServer() as target, caplog.at_level(logging.INFO):
        values["fhir_delivery_url"] = target.url
        deployment, faults = CHANNELS[channel](deploy, resources, tmp_path, values)
        delivered = read_back(target.url, TYPES.split(","))
    assert faults == []
    assert sum(deployment.count_dead_letters().values()) == (channel not in BUNDLE_CHANNELS)
    assert not [key for key, body in delivered.items() if MARKER.encode() in body]
    if channel not in BUNDLE_CHANNELS:  # what was received is delivered by a run of its own
        assert "Patient/ok" in delivered
    assert MARKER not in caplog.text
    require_no_marker_in_records(deployment)
    loaded = {f"{kind}/{key}" for kind, key in deployment.query("SELECT resource_type, id FROM fhir.resource")}
    expected = {*map(name, build_loaded()), "Consent/permit-ok"}
    if policy == "opt-in":
        expected.discard("Observation/o-device")  # is about no patient, and is loaded
        loaded.discard("Observation/o-device")
    assert loaded == expected
    withheld = {f"{kind}/{key}" for kind, key in deployment.query("SELECT resource_type, id FROM ops.withheld")}
    assert withheld >= {*map(name, build_withheld())}
    require_no_marker(deployment, tmp_path)
    if channel == "search":
        require_that_denied_patients_are_refused(deployment)
    if channel == "files":
        require_no_marker_in_alerts(deployment)
        require_no_marker_in_an_upload(deployment, tmp_path)


def require_no_marker_in_alerts(deployment: Deployment) -> None:
    """Require that no message to the webhook has a text of a withheld resource. A dead letter causes one."""
    with receive_webhooks() as hook:
        alarmed = deployment.settings.model_copy(update={"alert_webhook_url": SecretStr(hook.url)})
        AlertsSensor(Deployment(alarmed, deployment.instance)).tick()
    assert hook.messages
    assert MARKER not in hook.text


def require_no_marker_in_an_upload(deployment: Deployment, folder: Path) -> None:
    """Upload the exported resources to a server that refuses them and quotes each one in its answer.

    Nothing withheld is sent, and neither the output of the command nor its journal has it.
    """
    (folder / "upload").mkdir()
    for path in (folder / "left").rglob("*.valid.ndjson"):
        (folder / "upload" / path.name).write_bytes(path.read_bytes())
    with serve_echo(422) as server, pytest.MonkeyPatch.context() as patch:
        for variable, value in {**deployment.environment(), "FHIR_BASE_URL": server.url}.items():
            patch.setenv(variable, value)
        words = ["upload", "--input", str(folder / "upload"), "--failures", str(folder / "failures.ndjson")]
        done = CliRunner().invoke(app, words)
    assert done.exit_code == 1
    assert any(b"Loaded" in body for body in server.received)
    journals = [path for path in (deployment.settings.home / "uploads").rglob("*") if path.is_file()]
    assert journals
    kept = [(folder / "failures.ndjson").read_bytes(), *(path.read_bytes() for path in journals)]
    assert not [content for content in (*server.received, *kept) if MARKER.encode() in content]
    assert MARKER not in done.output


def require_no_marker(deployment: Deployment, folder: Path) -> None:
    """Require that no text of a withheld resource is in a table, an export or the lake."""
    assert not [row for rows in deployment.tables().values() for row in rows if MARKER in row]
    views = ("patient", "observation", "provenance", "diagnostic_report", "condition")
    write_files(deployment, LocalBlobs(folder / "left"), views)
    files = [path for path in (folder / "left").rglob("*") if path.is_file()]
    assert files
    assert not [path.name for path in files if MARKER.encode() in path.read_bytes()]


def require_no_marker_in_records(deployment: Deployment) -> None:
    """Require that no text of a withheld resource is in an event of Dagster, or in a record that operators may read."""
    marker = MARKER.encode()
    assert not {place for place, content in tables(deployment.url, "public") if marker in content}
    hidden = ("ops.withheld.", "ops.consent_records.", "ops.dead_letters.resource")
    found = {place for place, content in tables(deployment.url, "ops") if marker in content}
    assert not {place for place in found if not place.startswith(hidden)}
    with api_in_threads(deployment.settings) as api:
        for path in ("/runs", "/resource-types", "/health/ready"):
            assert MARKER not in api.get(path).text
    with pytest.MonkeyPatch.context() as patch:
        for variable, value in deployment.environment().items():
            patch.setenv(variable, value)
        listed = CliRunner().invoke(app, ["dead-letters", "list", "--json"])
    assert listed.exit_code == 0
    assert MARKER not in listed.output


def require_that_denied_patients_are_refused(deployment: Deployment) -> None:
    with api_in_threads(deployment.settings) as api:
        for key in DENIALS:
            answer = api.get(f"/patients/{key}")
            assert answer.status_code == 403, key
            assert MARKER not in answer.text
        assert [each["id"] for each in api.get("/patients").json()["patients"]] == ["ok"]


@pytest.mark.parametrize("policy", ["opt-out", "opt-in"])
@pytest.mark.parametrize(
    "denial_first",
    [pytest.param(True, id="denial first"), pytest.param(False, id="visits first", marks=pytest.mark.slow)],
)
def test_a_denial_by_record_number_withholds_visits(
    deploy: Deploy, tmp_path: Path, policy: str, denial_first: bool
) -> None:
    values = build_settings("Patient,Encounter,Consent", policy)
    deployment, zone = deploy_landing(deploy, tmp_path, **values)
    rows = [visit("D-1", "A-1", MARKER), visit("P-2", "A-2", "Loaded")]
    csv = "\n".join([",".join(rows[0]), *(",".join(row.values()) for row in rows)])
    by_number = [{"identifier": {"system": MRN_SYSTEM, "value": number}} for number in ("D-1", "P-2")]
    consents = [build_consent("d", by_number[0], "deny"), build_consent("p", by_number[1], "permit")]
    files = [("consents.ndjson", encode(consents)), ("visits.csv", csv.encode())]
    for file, content in files if denial_first else files[::-1]:
        zone.put(file, content)
        assert land(deployment) == []
    assert deployment.query("SELECT family FROM fhir.patient") == [("Loaded",)]
    assert deployment.query("SELECT count(*) FROM fhir.encounter") == [(1,)]
    assert not [row for rows in deployment.tables().values() for row in rows if MARKER in row]


def test_a_denial_whose_patient_is_not_known_holds_back_its_file_only_and_is_red_until_it_is_known(
    deploy: Deploy, tmp_path: Path
) -> None:
    values = build_settings("Patient,Consent,Organization", "opt-out")
    deployment, zone = deploy_landing(deploy, tmp_path, **values)
    zone.put("other.json", json.dumps(build_patient("other")).encode())
    assert land(deployment) == []
    unknown = build_consent("c", {"reference": URN}, "deny")
    zone.put("same.ndjson", encode([unknown, build_patient("same"), build("Organization", "org", name="Clinic")]))
    assert land(deployment) == []
    assert set(deployment.query("SELECT id FROM fhir.resource")) == {("other",), ("org",)}
    red = evaluate(deployment, "consent")
    assert (red.passed, red.severity) == (False, dg.AssetCheckSeverity.ERROR)
    assert "1 Consents deny, and their patient is not known" in (red.description or "")
    known = {**unknown, "patient": {"reference": "Patient/gone"}, "meta": {"lastUpdated": "2024-01-06T00:00:00Z"}}
    zone.put("corrected.ndjson", encode([known]))
    assert land(deployment) == []
    assert set(deployment.query("SELECT id FROM fhir.resource")) == {("other",), ("org",), ("same",)}
    assert evaluate(deployment, "consent").passed


@pytest.mark.parametrize("channel", ["search", pytest.param("bulk", marks=pytest.mark.slow)])
def test_a_denial_of_a_server_whose_patient_is_not_known_counts_by_identifier_and_is_red(
    deploy: Deploy, tmp_path: Path, channel: str
) -> None:
    resources = [
        build_consent("without", {"reference": URN}, "deny"),
        build_consent("with", {"identifier": {"system": MRN, "value": "mrn-named"}}, "deny"),
        build_patient("named"),
        build_patient("other", "Loaded"),
    ]
    deployment, faults = CHANNELS[channel](deploy, resources, tmp_path, build_settings("Patient,Consent", "opt-out"))
    assert faults == []
    assert deployment.query("SELECT id FROM fhir.patient") == [("other",)]
    red = evaluate(deployment, "consent")
    assert (red.passed, red.severity) == (False, dg.AssetCheckSeverity.ERROR)
    assert "1 Consents deny, and their patient is not known" in (red.description or "")


def evaluate(deployment: Deployment, table: str) -> dg.AssetCheckEvaluation:
    """Return the evaluation of the check ``patients_known`` of a table."""
    job = build_definitions(deployment.settings).resolve_job_def("check_tables")
    result = job.execute_in_process(instance=deployment.instance)
    [evaluation] = [
        each
        for each in result.get_asset_check_evaluations()
        if (each.asset_key.path[-1], each.check_name) == (table, "patients_known")
    ]
    return evaluation


def test_ingest_ends_with_1_while_the_patient_of_a_denial_is_not_known(
    deploy: Deploy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    number = {"system": MRN, "value": "mrn-late"}
    (folder / "Consent.ndjson").write_bytes(encode([build_consent("c", {"identifier": number}, "deny")]))
    values = build_settings("Patient,Consent", "opt-out")
    deployment = deploy(fhir_base_url=str(folder), fhir_source="ndjson", **values)
    for variable, value in {**deployment.environment(), "CONSENT_POLICY": "opt-out"}.items():
        monkeypatch.setenv(variable, value)
    first = CliRunner().invoke(app, ["ingest"])
    assert first.exit_code == 1
    assert "1 Consents deny, and their patient is not known" in first.stderr
    assert "mrn-late" not in first.stdout + first.stderr
    (folder / "Patient.ndjson").write_bytes(encode([build_patient("late")]))
    second = CliRunner().invoke(app, ["ingest", "--json"])
    summary = json.loads(second.stdout)
    assert (second.exit_code, summary["success"], summary["unknown_denials"]) == (0, True, 0)
    assert deployment.query("SELECT count(*) FROM fhir.patient") == [(0,)]
