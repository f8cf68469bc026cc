"""A landing zone with odd names, links, pipes and files that change: each is listed, the rest is loaded."""

import os
import pwd
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import pytest

from fhir_assets.storage.landing_zone import BucketZone, FolderZone
from fhir_assets.storage.s3 import Bucket, ListedObject
from fhir_assets_tests.support.deployment import Deploy
from fhir_assets_tests.support.landing import LandingZone, load_received, receive, tick
from fhir_assets_tests.support.odd_files import LINE, put_odd_files


def test_a_folder_with_odd_files_loads_the_others_and_lists_the_odd_ones(deploy: Deploy, tmp_path: Path) -> None:
    zone = tmp_path / "landing"
    zone.mkdir()
    odd = put_odd_files(zone)
    deployment = deploy(fhir_landing_url=str(zone), fhir_resource_types=("Patient",))
    tick(deployment)
    assert tick(deployment).run_requests
    result = receive(deployment)
    assert result.success
    assert load_received(deployment) == []
    assert deployment.count_loaded() == {"Patient": 1}
    states = deployment.query("SELECT status, error, attempts, tried_at FROM ops.landing_files ORDER BY name")
    failed = [state for state in states if state[0] == "failed"]
    assert sum(state[0] == "loaded" for state in states) == 1 + odd.readable
    assert len(failed) == odd.faulty + odd.not_utf_8
    assert all(error and (attempts, tried_at) == (0, None) for _, error, attempts, tried_at in failed)
    (evaluation,) = result.get_asset_check_evaluations()
    assert not evaluation.passed
    tick(deployment)
    assert tick(deployment).run_requests == []

    for name in ("link.ndjson", "pipe.ndjson"):
        (zone / name).unlink()
    (zone / "link.ndjson").write_bytes(LINE)
    tick(deployment)
    tick(deployment)
    assert receive(deployment).success
    names = "'link.ndjson', 'pipe.ndjson'"
    assert deployment.query(f"SELECT name, status, error FROM ops.landing_files WHERE name IN ({names})") == [
        ("link.ndjson", "loaded", None)
    ]


def test_two_odd_names_that_are_shown_alike_are_one_bad_file_and_a_long_path_is_another(
    deploy: Deploy, tmp_path: Path
) -> None:
    zone = tmp_path / "landing"
    zone.mkdir()
    (zone / "good.ndjson").write_bytes(LINE)
    (zone / "caf\\udce9.ndjson").write_bytes(LINE)
    for name in (b"caf\xe9.ndjson", b"\xff.ndjson"):
        with open(os.fsencode(zone) + b"/" + name, "wb") as file:
            file.write(LINE)
    deep = zone.joinpath(*["d" * 200] * 6)
    deep.mkdir(parents=True)
    (deep / "a.ndjson").write_bytes(LINE)
    deployment = deploy(fhir_landing_url=str(zone), fhir_resource_types=("Patient",))
    tick(deployment)
    tick(deployment)
    assert receive(deployment).success
    states = deployment.query("SELECT status, count(*) FROM ops.landing_files GROUP BY 1 ORDER BY 1")
    assert states == [("failed", 2), ("loaded", 2)]


def test_a_folder_without_permission_is_listed() -> None:
    with tempfile.TemporaryDirectory() as folder:
        zone = Path(folder, "zone")
        (zone / "closed").mkdir(mode=0, parents=True)
        Path(folder).chmod(0o755)
        zone.chmod(0o755)
        user = os.geteuid()
        if user == 0:
            os.seteuid(pwd.getpwnam("nobody").pw_uid)  # root may read every folder
        try:
            (file,) = FolderZone(zone).files()
        finally:
            os.seteuid(user)
    assert (file.name, file.fault) == ("closed", "Permission denied")


def test_keys_that_clients_resolve_differently_are_bad_files(monkeypatch: pytest.MonkeyPatch) -> None:
    written = datetime(2024, 1, 5, tzinfo=UTC)
    names = ["good.ndjson", "../out.ndjson", "a/./x.ndjson", "", "a/", ".hidden.ndjson", "n" * 1020 + ".ndjson"]
    entries = [ListedObject(name, 1, written, "e") for name in names]
    bucket = Bucket("s3://bucket", lambda limits: None)
    monkeypatch.setattr(bucket, "listing", lambda prefix="": iter(entries))
    files = list(BucketZone(bucket).files())
    assert [file.name[:12] for file in files if file.fault] == ["../out.ndjson"[:12], "a/./x.ndjson", "n" * 12]
    assert [file.name for file in files if not file.fault] == ["good.ndjson"]


@pytest.mark.slow
def test_a_bucket_with_odd_keys_loads_the_others_and_lists_the_odd_ones(deploy: Deploy, s3_url: str) -> None:
    zone = LandingZone(s3_url)
    loaded = ["good.ndjson", "esc\x1b.ndjson", "n" * 300 + ".ndjson", "a//b.ndjson", "é.ndjson"]
    for name in (*loaded, "folder.ndjson/"):
        zone.put(name, LINE)
    deployment = deploy(fhir_landing_url=s3_url, fhir_resource_types=("Patient",))
    tick(deployment)
    tick(deployment)
    assert receive(deployment).success
    states = deployment.query("SELECT name, status FROM ops.landing_files")
    assert {name for name, status in states if status == "loaded"} == set(loaded)
    assert all(status == "loaded" for _, status in states)
