"""References that have no key are stored with their resource and counted; they put it into no patient's compartment."""

import json
from datetime import UTC, datetime
from typing import Any

import pytest

from fhir_assets.deployment.views import build_views
from fhir_assets.fhir.compartment import UNKNOWN_PATIENT, find_patient_ids
from fhir_assets.fhir.references import normalize_bases
from fhir_assets.pipeline.load.row_builder import Batch, RowBuilder
from fhir_assets.privacy.encryption import NO_ENCRYPTION
from fhir_assets.settings import load_settings
from fhir_assets.warehouse.postgres.db.connections import Session
from fhir_assets.warehouse.postgres.queries import references
from fhir_assets.warehouse.postgres.tables import view_tables
from fhir_assets.warehouse.postgres.tables.loading import Loader

NOW = datetime(2026, 1, 5, tzinfo=UTC)
BASE = "https://h.example/fhir"
VIEWS = [view for view in build_views(load_settings(fhir_base_url=BASE)).views if view.resource_type == "Condition"]


def condition(resource_id: str, subject: dict[str, Any], version: int = 1) -> bytes:
    meta = {"versionId": str(version), "lastUpdated": f"2026-01-0{version}T00:00:00Z"}
    return json.dumps({"resourceType": "Condition", "id": resource_id, "meta": meta, "subject": subject}).encode()


def load(conn: Session, *lines: bytes) -> None:
    view_tables.ensure_tables(conn, VIEWS)
    built = RowBuilder(VIEWS, NO_ENCRYPTION, "default")(Batch(list(lines), "2026-01", NOW))
    loader = Loader(conn, "Condition", VIEWS, run_id="run")
    loader.add_block(built.block, list(lines), "2026-01")
    loader.finish()


def test_references_without_a_key_are_counted_until_they_have_one(conn: Session) -> None:
    subjects: dict[str, dict[str, Any]] = {
        "ours": {"reference": f"{BASE}/Patient/77/_history/3"},
        "theirs": {"reference": "https://other.example/r4/Patient/77"},
        "urn": {"reference": "urn:uuid:0f2a1c34-0000-4000-8000-00000000000b"},
        "conditional": {"reference": "Patient?identifier=a|77"},
        "logical": {"type": "Patient", "identifier": {"value": "77"}},
    }
    load(conn, *(condition(name, subject) for name, subject in subjects.items()))
    assert conn.execute("SELECT id, patient_key FROM fhir.condition WHERE patient_key IS NOT NULL").fetchall() == [
        ("ours", "77")
    ]
    assert sorted(references.count_keyless(conn, "Condition")) == [
        ("absolute Patient", 1),
        ("conditional Patient", 1),
        ("identifier Patient", 1),
        ("urn", 1),
    ]
    load(conn, *(condition(name, {"reference": "Patient/77"}, 2) for name in subjects))
    assert references.count_keyless(conn, "Condition") == []


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ({"reference": "Patient/77"}, "77"),
        ({"reference": f"{BASE}/Patient/77/_history/2"}, "77"),
        ({"reference": "https://other.example/r4/Patient/77"}, UNKNOWN_PATIENT),
        ({"reference": "Patient?identifier=a|77"}, UNKNOWN_PATIENT),
        ({"reference": "urn:uuid:0f2a1c34-0000-4000-8000-00000000000b"}, UNKNOWN_PATIENT),
        ({"reference": "urn:uuid:0f2a1c34-0000-4000-8000-00000000000b", "type": "Practitioner"}, None),
        ({"reference": "Practitioner?identifier=a|77"}, None),
    ],
)
def test_only_a_reference_to_our_own_patient_names_a_compartment(
    reference: dict[str, str], expected: str | None
) -> None:
    resource = {"resourceType": "Condition", "subject": reference}
    assert find_patient_ids(resource, normalize_bases([BASE])) == ((expected,) if expected else ())
