"""The HTTP API works with a login that has the role ``fhir_api`` only."""

from pathlib import Path

import pytest

from fhir_assets.deployment.views import build_views
from fhir_assets.privacy.encryption import NO_ENCRYPTION
from fhir_assets.settings import load_settings
from fhir_assets.warehouse.postgres.db import role_rights
from fhir_assets.warehouse.postgres.db.connections import connect
from fhir_assets.warehouse.postgres.tables import view_tables
from fhir_assets_tests.support.api import api_in_threads, api_settings
from fhir_assets_tests.support.database_users import User
from fhir_assets_tests.support.views import load, patient
from fhir_assets_tests.support.visits import visit

RECORD = {"resourceType": "Patient", "mrn": "1", "consent": {"research": False}}


@pytest.mark.parametrize("policy", ["off", "opt-out"])
def test_the_api_receives_withholds_looks_up_exports_and_audits_with_its_own_role(
    database: str, user: User, tmp_path: Path, policy: str
) -> None:
    (tmp_path / "landing").mkdir()
    more: dict[str, object] = {"consent_policy": policy, "fhir_export_url": str(tmp_path / "exports")}
    settings = load_settings(**api_settings(user(role_rights.API), tmp_path, more))
    views = build_views(settings).views
    with connect(database, cipher=NO_ENCRYPTION) as conn:
        view_tables.ensure_tables(conn, views)
        load(conn, patient("a", gender="male"), views=tuple(view for view in views if view.resource_type == "Patient"))
    with api_in_threads(settings) as api:
        consent = {
            "resourceType": "Consent",
            "id": "c",
            "status": "active",
            "scope": {"coding": [{"code": "patient-privacy"}]},
            "category": [{"text": "privacy"}],
            "patient": {"reference": "Patient/a"},
            "policyRule": {"text": "rule"},
            "provision": {"type": "deny"},
        }
        calls = [
            api.post("/fhir", json={"resourceType": "Patient", "id": "b"}),
            api.post("/api/v1/ingest", json={"records": [RECORD]}, headers={"Idempotency-Key": "k"}),
            api.post("/api/v1/ingest", json={"records": [RECORD]}, headers={"Idempotency-Key": "k"}),
            api.post("/ingest", json=[visit("1", "V1")]),
            api.post("/fhir", json=consent),
            api.get("/patients"),
            api.get("/runs"),
            api.get("/audit"),
            api.post("/export/patient"),
        ]
        assert [f"{call.request.path_url}: {call.text}" for call in calls if not call.ok] == []
        assert api.get("/patients/a").status_code < 500
    with connect(database) as conn:
        writers = conn.execute("SELECT DISTINCT database_user LIKE 'user_%' FROM ops.audit_log").fetchall()
    assert writers == [(True,)]
