"""With encryption keys, names of landed files, which may be those of patients, are readable with the keys only."""

import gzip
import os
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import boto3
import pytest
from typer.testing import CliRunner

from fhir_assets.cli.main import app
from fhir_assets.deployment.landing import build_landing_step
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.errors import EncryptionError
from fhir_assets.fhir.intake import visits_csv
from fhir_assets.privacy.keys import new_key
from fhir_assets.storage.landing_zone import LandingFile, open_zone
from fhir_assets.storage.s3 import Bucket
from fhir_assets.warehouse.ops import landing_files, landing_reports
from fhir_assets_tests.support.canaries import Canaries
from fhir_assets_tests.support.content import patient
from fhir_assets_tests.support.deployment import Deploy, Deployment
from fhir_assets_tests.support.key_rotation import build_reencrypt_step
from fhir_assets_tests.support.landing import LandingZone, land, load_received, receive, tick
from fhir_assets_tests.support.leak_scan import build_site, find_leaks
from fhir_assets_tests.support.visits import visit

DAY = datetime(2024, 1, 5, tzinfo=UTC)
OLD, NEW = new_key(), new_key()
TYPES = ("Patient", "Encounter")


@pytest.fixture
def canaries() -> Canaries:
    return Canaries()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "landing"
    folder.mkdir()
    return folder


def list_names(deployment: Deployment, label: str = "") -> list[str]:
    """Return the names of the files as the command prints them."""
    with Warehouse(deployment.settings).connect() as conn:
        zone = str(deployment.settings.fhir_landing_url)
        return sorted(file["name"] for file in landing_reports.list_files(conn, zone, label=label))


def stored_names(deployment: Deployment) -> list[str]:
    return [name for (name,) in deployment.query("SELECT name FROM ops.landing_files ORDER BY name")]


def test_with_keys_no_channel_shows_the_name_of_a_landed_file(
    deploy: Deploy, folder: Path, tmp_path: Path, canaries: Canaries, capfd: pytest.CaptureFixture[str]
) -> None:
    deployment = deploy(fhir_landing_url=str(folder), fhir_resource_types=TYPES, phi_encryption_keys=OLD)
    site, zone, mark = build_site(deployment, tmp_path), LandingZone(str(folder)), canaries.text
    zone.put(f"{mark('ndjson')}/{mark('name')}.ndjson", patient("a", DAY) + b"\n{")
    zone.put(f"{mark('json')}.json", patient("b", DAY))
    zone.put(f"{mark('gz')}.ndjson.gz", gzip.compress(patient("c", DAY) * 9)[:-20])
    zone.put(f"{mark('csv')}.csv", visits_csv.write([visit("1", "V1")]) + b"a,b\n")
    zone.put(f"{mark('empty')}.json", b"")
    zone.put(f"{mark('ignored')}.pdf", b"not FHIR")
    (folder / f"{mark('link')}.json").symlink_to(folder / "nowhere")
    (folder / f"{mark('closed')}.csv").mkdir()
    assert land(deployment) == []
    zone.put(f"{mark('again')}.json", patient("b", DAY))
    tick(deployment)
    tick(deployment)
    assert receive(deployment).success
    load_received(deployment)
    shown = CliRunner().invoke(
        app, ["dead-letters", "list", "--json"], env=deployment.environment() | {"COLUMNS": "500"}
    )
    (site.output / "dead letters").write_text(shown.output)
    (site.output / "this process").write_text("".join(capfd.readouterr()))
    assert find_leaks(site, canaries) == set()
    with Warehouse(deployment.settings).connect() as conn:
        listed = landing_reports.list_files(conn, str(folder))
    named = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    assert {file["name"] for file in listed} == {name for name in named if "." in name}
    assert sum(file["status"] == "loaded" for file in listed) == 6


def test_a_person_with_the_keys_sees_the_names_and_finds_the_one_of_a_label(deploy: Deploy, folder: Path) -> None:
    deployment = deploy(fhir_landing_url=str(folder), fhir_resource_types=TYPES, phi_encryption_keys=OLD)
    for name in ("Doe.json", "Roe.json"):
        (folder / name).write_bytes(patient(name[:1], DAY))
    tick(deployment)
    assert [len(name) for name in stored_names(deployment)] == [len("file-") + 32] * 2
    first, second = (list_names(deployment, label=label) for label in stored_names(deployment))
    assert sorted([*first, *second]) == ["Doe.json", "Roe.json"]
    env = {**deployment.environment(), "FHIR_LANDING_URL": str(folder), "PHI_ENCRYPTION_KEYS": OLD}
    shown = CliRunner().invoke(app, ["landing", "list", "--label", stored_names(deployment)[0], "--json"], env=env)
    assert shown.exit_code == 0
    assert [first[0] in shown.output, second[0] in shown.output] == [True, False]


def test_without_keys_the_names_stay_as_they_are(deploy: Deploy, folder: Path) -> None:
    deployment = deploy(fhir_landing_url=str(folder), fhir_resource_types=TYPES)
    (folder / "Doe.json").write_bytes(patient("a", DAY))
    assert land(deployment) == []
    assert stored_names(deployment) == ["Doe.json"] == list_names(deployment)
    assert deployment.query("SELECT encrypted_name, key_id FROM ops.landing_files") == [(None, None)]


@pytest.mark.parametrize("way", ["a scan", "a rotation"])
def test_names_of_a_database_without_keys_are_encrypted_and_their_files_are_not_received_again(
    deploy: Deploy, folder: Path, way: str
) -> None:
    plain = deploy(fhir_landing_url=str(folder), fhir_resource_types=TYPES, home="plain")
    for name in ("Doe.json", "bad.json"):
        (folder / name).write_bytes(patient("a", DAY) if name == "Doe.json" else b"{")
    assert land(plain) == []
    (folder / "Roe.json").write_bytes(patient("c", DAY))
    tick(plain)
    state = "SELECT status, sha256, rows, rejected, run_id, found_at FROM ops.landing_files ORDER BY found_at"
    before = plain.query(state)
    keyed = deploy(
        fhir_landing_url=str(folder),
        fhir_resource_types=TYPES,
        phi_encryption_keys=OLD,
        home="keyed",
        fhir_store_url=plain.settings.store_url,
    )
    if way == "a scan":
        tick(keyed)
        assert keyed.query(state)[:2] == before[:2]
    else:
        rotated = build_reencrypt_step(keyed.url, keyed.store, OLD, views=()).run()
        assert (rotated.encrypted["landing_files"], rotated.from_clear["landing_files"]) == (3, 3)
        assert rotated.usage.counts["landing_files"].keys() == {next(iter(rotated.usage.counts["secret"]))}
        assert keyed.query(state) == before
    assert all(name.startswith("file-") for name in stored_names(keyed))
    assert list_names(keyed) == ["Doe.json", "Roe.json", "bad.json"]
    tick(keyed)
    assert receive(keyed).success
    assert keyed.query(state)[:2] == before[:2]
    assert keyed.query("SELECT count(*) FROM ops.received") == [(3,)]
    tick(keyed)
    assert tick(keyed).run_requests == []


def test_a_rotation_encrypts_names_with_the_new_key_and_keeps_the_labels(deploy: Deploy, folder: Path) -> None:
    deployment = deploy(fhir_landing_url=str(folder), fhir_resource_types=TYPES, phi_encryption_keys=OLD)
    (folder / "Doe.json").write_bytes(patient("a", DAY))
    assert land(deployment) == []
    before = stored_names(deployment)
    rotated = build_reencrypt_step(deployment.url, deployment.store, NEW, OLD, views=()).run()
    assert (rotated.encrypted["landing_files"], rotated.refused) == (1, {})
    assert stored_names(deployment) == before
    with_new = deploy(fhir_landing_url=str(folder), fhir_resource_types=TYPES, phi_encryption_keys=NEW, home="new")
    assert list_names(with_new) == ["Doe.json"]
    (folder / "Doe.json").write_bytes(patient("b", DAY))
    tick(with_new)
    tick(with_new)
    assert stored_names(deployment) == before


def test_a_name_whose_key_is_lost_is_encrypted_again_by_the_next_scan(deploy: Deploy, folder: Path) -> None:
    deployment = deploy(fhir_landing_url=str(folder), fhir_resource_types=TYPES, phi_encryption_keys=OLD)
    (folder / "Doe.json").write_bytes(patient("a", DAY))
    tick(deployment)
    deployment.query(
        "UPDATE ops.landing_files SET key_id = '00000000:bound', encrypted_name = 'FS2'::bytea || decode('00000000',"
        " 'hex') || substring(encrypted_name FROM 8) RETURNING 1"
    )
    assert list_names(deployment) == stored_names(deployment)
    assert tick(deployment).run_requests
    assert list_names(deployment) == ["Doe.json"]


def test_the_name_of_another_row_is_refused(deploy: Deploy, folder: Path) -> None:
    deployment = deploy(fhir_landing_url=str(folder), fhir_resource_types=TYPES, phi_encryption_keys=OLD)
    for name in ("Doe.json", "Roe.json"):
        (folder / name).write_bytes(patient(name[:1], DAY))
    tick(deployment)
    tick(deployment)
    deployment.query(
        "UPDATE ops.landing_files f SET encrypted_name = o.encrypted_name FROM ops.landing_files o"
        " WHERE o.name <> f.name RETURNING 1"
    )
    assert list_names(deployment) == stored_names(deployment)
    with Warehouse(deployment.settings).connect() as conn, pytest.raises(EncryptionError, match="landing_files"):
        landing_files.find_ready(conn, str(folder), now=datetime.now(UTC), limit=9)


def test_files_of_the_same_time_are_received_in_the_order_of_their_names(deploy: Deploy, folder: Path) -> None:
    deployment = deploy(fhir_landing_url=str(folder), fhir_resource_types=TYPES, phi_encryption_keys=OLD)
    names = [f"{number:02}.json" for number in range(12)]
    for name in names:
        (folder / name).write_bytes(patient(name[:2], DAY))
        os.utime(folder / name, (DAY.timestamp(), DAY.timestamp()))
    step = build_landing_step(deployment.settings, Warehouse(deployment.settings))
    assert step.scan(assume_complete=True) == 12
    with Warehouse(deployment.settings).connect() as conn:
        found = landing_files.find_ready(conn, str(folder), now=datetime.now(UTC), limit=5)
    assert [file.name for file in found] == names[:5]


def test_a_file_that_two_processes_scan_and_receive_at_once_is_received_once(deploy: Deploy, folder: Path) -> None:
    plain = deploy(fhir_landing_url=str(folder), fhir_resource_types=TYPES, home="plain")
    for number in range(20):
        (folder / f"Doe{number}.json").write_bytes(patient(f"p{number}", DAY))
    tick(plain)
    deployment = deploy(fhir_landing_url=str(folder), fhir_resource_types=TYPES, phi_encryption_keys=OLD)
    for number in range(20, 30):
        (folder / f"Doe{number}.json").write_bytes(patient(f"p{number}", DAY))

    def load(number: int) -> int:
        step = build_landing_step(deployment.settings, Warehouse(deployment.settings))
        step.scan(assume_complete=True)
        return step.run(f"run {number}").failed

    with ThreadPoolExecutor(3) as pool:
        rotation = pool.submit(build_reencrypt_step(deployment.url, deployment.store, OLD, views=()).run)
        assert sum(pool.map(load, range(2))) == 0
        assert rotation.result().left_over == 0
    assert deployment.query("SELECT status, count(*) FROM ops.landing_files GROUP BY 1") == [("loaded", 30)]
    assert deployment.query("SELECT sum(rows) FROM ops.received") == [(30,)]
    assert list_names(deployment) == sorted(f"Doe{number}.json" for number in range(30))


def test_a_row_that_a_process_without_keys_records_beside_one_with_a_label_is_merged(
    deploy: Deploy, folder: Path
) -> None:
    deployment = deploy(fhir_landing_url=str(folder), fhir_resource_types=TYPES, phi_encryption_keys=OLD)
    (folder / "Doe.json").write_bytes(patient("a", DAY))
    assert land(deployment) == []
    deployment.query(
        "INSERT INTO ops.landing_files (zone, name, size, mark, written_at, status)"
        " SELECT zone, 'Doe.json', size, mark, written_at, 'ready' FROM ops.landing_files RETURNING 1"
    )
    rotated = build_reencrypt_step(deployment.url, deployment.store, OLD, views=()).run()
    assert rotated.left_over == 0
    assert deployment.query("SELECT status FROM ops.landing_files") == [("loaded",)]


@pytest.fixture
def zone_in_bucket(s3_url: str) -> LandingZone:
    return LandingZone(s3_url)


def test_an_object_that_cannot_be_read_is_not_named_in_the_reason(zone_in_bucket: LandingZone) -> None:
    zone = open_zone(zone_in_bucket.url, bucket=lambda url: Bucket(url, lambda limits: boto3.client("s3")))
    with pytest.raises(Exception, match="a file of the landing zone") as error:
        zone.open("Doe_John.ndjson")
    assert "Doe" not in str(error.value)


def test_the_names_of_a_long_listing_are_encrypted_as_they_come(deploy: Deploy, folder: Path) -> None:
    deployment = deploy(fhir_landing_url=str(folder), fhir_resource_types=TYPES, phi_encryption_keys=OLD)
    count = 10_000
    listing = ((LandingFile(f"{number:0100}.json", 1, "mark", DAY), True) for number in range(count))
    with Warehouse(deployment.settings).connect() as conn:
        tracemalloc.start()
        landing_files.record_listing(conn, str(folder), listing)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        found = landing_files.find_ready(conn, str(folder), now=datetime.now(UTC), limit=1)
    assert peak < 2 << 20
    assert [file.name for file in found] == [f"{0:0100}.json"]
