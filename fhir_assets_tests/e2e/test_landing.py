"""Files in a landing zone are received once, split by type and loaded; invalid files are reported."""

import gzip
import json
from datetime import UTC, datetime
from pathlib import Path

import dagster as dg
import pytest

from fhir_assets.deployment.landing import build_landing_zone
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.privacy.keys import new_key
from fhir_assets.warehouse.ops import landing_files, landing_reports, received
from fhir_assets.warehouse.postgres.db.connections import connect
from fhir_assets_tests.support.content import patient
from fhir_assets_tests.support.deployment import Deploy, Deployment
from fhir_assets_tests.support.landing import LandingZone, land, load_received, receive, tick

DAY = datetime(2024, 1, 5, tzinfo=UTC)
ENCOUNTER = {
    "resourceType": "Encounter",
    "id": "e",
    "meta": {"lastUpdated": "2024-01-05T10:00:00Z"},
    "status": "finished",
    "class": {"code": "AMB"},
}


@pytest.fixture(params=["folder", pytest.param("s3", marks=pytest.mark.slow)])
def zone(request: pytest.FixtureRequest, tmp_path: Path) -> LandingZone:
    if request.param == "s3":
        return LandingZone(request.getfixturevalue("s3_url"))
    (tmp_path / "landing").mkdir()
    return LandingZone(str(tmp_path / "landing"))


@pytest.fixture
def deployment(deploy: Deploy, zone: LandingZone) -> Deployment:
    return deploy(fhir_landing_url=zone.url, fhir_resource_types=("Patient", "Encounter"))


def check(result: dg.ExecuteInProcessResult) -> dg.AssetCheckEvaluation:
    (evaluation,) = result.get_asset_check_evaluations()
    return evaluation


def files(deployment: Deployment) -> dict[str, str]:
    return dict(deployment.query("SELECT name, status FROM ops.landing_files"))


def test_files_of_several_types_and_formats_are_split_loaded_and_left_in_the_landing_zone(
    deployment: Deployment, zone: LandingZone
) -> None:
    zone.put("a.ndjson", patient("a", DAY) + b"\n" + json.dumps(ENCOUNTER).encode() + b"\n")
    bundle = {"resourceType": "Bundle", "type": "collection", "entry": [{"resource": json.loads(patient("b", DAY))}]}
    zone.put("deep/down/b.json.gz", gzip.compress(json.dumps(bundle, indent=1).encode()))
    zone.put("c.json", patient("c", DAY))
    for name in ("readme.txt", "x.ndjson.part", ".hidden.ndjson"):
        zone.put(name, b"not ours")
    before = zone.names()
    assert land(deployment) == []
    assert deployment.count_loaded() == {"Patient": 3, "Encounter": 1}
    assert zone.names() == before
    assert tick(deployment).run_requests == []
    assert receive(deployment).success
    assert load_received(deployment) == []


def test_the_same_content_is_loaded_once_under_any_file_name(deployment: Deployment, zone: LandingZone) -> None:
    zone.put("a.ndjson", patient("a", DAY))
    assert land(deployment) == []
    zone.put("again/b.ndjson", patient("a", DAY))
    zone.put("a.ndjson", patient("a", DAY))
    tick(deployment)
    tick(deployment)
    receive(deployment)
    assert deployment.ingestion().find_received() == []
    known = deployment.query("SELECT status, known_before FROM ops.landing_files WHERE name = 'again/b.ndjson'")
    assert known == [("loaded", True)]
    assert deployment.query("SELECT sum(rows) FROM ops.received") == [(1,)]


def test_a_file_with_new_content_under_its_old_name_is_loaded(deployment: Deployment, zone: LandingZone) -> None:
    zone.put("a.ndjson", patient("a", DAY))
    assert land(deployment) == []
    zone.put("a.ndjson", patient("b", DAY) + b"\n")
    assert land(deployment) == []
    assert deployment.count_loaded() == {"Patient": 2}


def test_an_invalid_file_fails_the_check_until_its_dead_letters_are_resolved_and_stops_no_other_file(
    deployment: Deployment, zone: LandingZone
) -> None:
    zone.put("bad.ndjson", patient("a", DAY) + b'\n{"resourceType": "Patient", "id": \n')
    zone.put("cut.ndjson.gz", gzip.compress(patient("b", DAY) * 99)[:-20])
    zone.put("good.ndjson", patient("c", DAY))
    tick(deployment)
    second_tick = tick(deployment)
    result = receive(deployment)
    assert result.success
    assert not check(result).passed
    assert "2 landed files are bad" in (check(result).description or "")
    assert load_received(deployment) == []
    assert {"a", "c"} <= {identity for (identity,) in deployment.query("SELECT id FROM fhir.resource")}
    assert set(files(deployment).values()) == {"loaded"}
    dead_letters = deployment.query(
        "SELECT id, stage, rule, origin IS NOT NULL FROM ops.dead_letters WHERE status = 'open'"
    )
    assert all((stage, rule, known) == ("fetch", "json", True) for _, stage, rule, known in dead_letters)
    tick_with_dead_letters = tick(deployment, cursor=second_tick.cursor)
    with connect(deployment.url) as conn:
        conn.execute("UPDATE ops.dead_letters SET status = 'discarded'")
    (event,) = tick(deployment, cursor=tick_with_dead_letters.cursor).asset_events
    assert isinstance(event, dg.AssetCheckEvaluation)
    assert event.passed


def test_file_names_which_may_name_patients_stay_out_of_events_and_dead_letters(
    deployment: Deployment, zone: LandingZone
) -> None:
    zone.put("Peter_Chalmers_1974.ndjson", b"{")
    zone.put("Peter_Chalmers_1975.ndjson", patient("a", DAY))
    assert land(deployment) == []
    events = deployment.query("SELECT event FROM event_logs")
    dead_letters = deployment.query("SELECT path, message, issues::text FROM ops.dead_letters")
    assert events
    assert dead_letters
    assert "Chalmers" not in str(events) + str(dead_letters)


def test_deletions_in_landed_files_remove_rows_and_an_older_file_does_not_restore_them(
    deployment: Deployment, zone: LandingZone
) -> None:
    zone.put("a.ndjson", patient("a", DAY) + b"\n" + patient("b", DAY))
    assert land(deployment) == []
    entry = {
        "request": {"method": "DELETE", "url": "Patient/a"},
        "response": {"status": "204", "lastModified": "2024-02-01T00:00:00Z"},
    }
    zone.put("deleted.ndjson", json.dumps({"resourceType": "Bundle", "type": "transaction", "entry": [entry]}).encode())
    assert land(deployment) == []
    zone.put("old.ndjson", patient("a", DAY, version="0") + b"\n")
    assert land(deployment) == []
    assert deployment.query("SELECT id FROM fhir.patient") == [("b",)]
    assert deployment.query("SELECT id, deleted_at::date::text FROM fhir.resource WHERE resource IS NULL") == [
        ("a", "2024-02-01")
    ]
    outcomes = [
        deployment.ingestion().load_received(waiting, triggered_by="test")
        for waiting in deployment.ingestion().find_received()
    ]
    assert outcomes == []


def test_a_file_is_received_once_it_stopped_growing_or_has_a_done_file(deploy: Deploy, tmp_path: Path) -> None:
    zone = LandingZone(str(tmp_path / "landing"))
    zone.put("growing.ndjson", patient("a", DAY))
    zone.put("marked.ndjson", patient("b", DAY))
    zone.put("marked.ndjson.done", b"")
    deployment = deploy(fhir_landing_url=zone.url, fhir_resource_types=("Patient",))
    assert tick(deployment).run_requests
    assert files(deployment) == {"growing.ndjson": "arriving", "marked.ndjson": "ready"}
    zone.put("growing.ndjson", patient("a", DAY) + b"\n" + patient("c", DAY))
    tick(deployment)
    assert files(deployment)["growing.ndjson"] == "arriving"
    tick(deployment)
    assert files(deployment)["growing.ndjson"] == "ready"
    receive(deployment)
    assert load_received(deployment) == []
    assert deployment.count_loaded() == {"Patient": 3}


def test_an_unreadable_file_is_named_and_the_other_files_are_loaded(
    deploy: Deploy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zone = LandingZone(str(tmp_path / "landing"))
    zone.put("a.ndjson", patient("a", DAY))
    zone.put("gone.ndjson", patient("b", DAY))
    deployment = deploy(fhir_landing_url=zone.url, fhir_resource_types=("Patient",))
    tick(deployment)
    tick(deployment)
    (tmp_path / "landing" / "gone.ndjson").unlink()
    result = receive(deployment)
    assert result.success
    assert not check(result).passed
    assert files(deployment) == {"a.ndjson": "loaded", "gone.ndjson": "failed"}
    tick(deployment)
    assert files(deployment) == {"a.ndjson": "loaded"}


def test_a_missing_landing_zone_is_one_clear_error(deploy: Deploy, tmp_path: Path) -> None:
    deployment = deploy(fhir_landing_url=str(tmp_path / "none"), fhir_resource_types=("Patient",))
    with pytest.raises(Exception, match="does not exist"):
        tick(deployment)


def test_a_load_that_dies_before_it_records_the_file_is_repeated_without_duplicates(
    deployment: Deployment, zone: LandingZone, monkeypatch: pytest.MonkeyPatch
) -> None:
    zone.put("a.ndjson", patient("a", DAY))
    tick(deployment)
    tick(deployment)
    for module, name in ((received, "record"), (landing_files, "record_loaded")):
        with monkeypatch.context() as patched:

            def fail(*_: object, **__: object) -> None:
                raise RuntimeError("killed")

            patched.setattr(module, name, fail)
            assert not receive(deployment).success
        assert tick(deployment).run_requests
    assert receive(deployment).success
    assert load_received(deployment) == []
    assert deployment.query("SELECT sum(rows) FROM ops.received") == [(1,)]
    assert deployment.count_loaded() == {"Patient": 1}


def test_with_keys_files_that_the_api_lands_are_encrypted_and_still_identified_by_content(
    deploy: Deploy, tmp_path: Path
) -> None:
    (tmp_path / "landing").mkdir()
    deployment = deploy(
        fhir_landing_url=str(tmp_path / "landing"),
        fhir_resource_types=("Patient", "Encounter"),
        phi_encryption_keys=new_key(),
    )
    zone = build_landing_zone(deployment.settings)
    content = patient("a", DAY, name=[{"family": "Canary"}]) + b"\n"
    zone.put("ours.ndjson", content)
    (tmp_path / "landing" / "theirs.ndjson").write_bytes(patient("b", DAY) + b"\n")
    assert land(deployment) == []
    assert deployment.count_loaded() == {"Patient": 2}
    assert b"Canary" not in (tmp_path / "landing" / "ours.ndjson").read_bytes()
    zone.put("again.ndjson", content)
    zone.put("cut.ndjson", content)
    cut = tmp_path / "landing" / "cut.ndjson"
    cut.write_bytes(cut.read_bytes()[:-9])
    tick(deployment)
    assert tick(deployment).run_requests
    assert not check(receive(deployment)).passed
    with Warehouse(deployment.settings).connect() as conn:
        listed = {file["name"]: file for file in landing_reports.list_files(conn, zone.url)}
    again = listed["again.ndjson"]
    assert (again["status"], again["known_before"], again["error"]) == ("loaded", True, None)
    assert listed["cut.ndjson"]["status"] == "failed"
    assert "truncated" in listed["cut.ndjson"]["error"]
