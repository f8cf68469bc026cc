"""With encryption keys, names of files of the source ``ndjson``, which may be those of patients, are shown nowhere."""

import gzip
import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fhir_assets.cli.main import app
from fhir_assets.pipeline.refresh import Refresh
from fhir_assets.privacy.keys import new_key
from fhir_assets_tests.support.canaries import Canaries
from fhir_assets_tests.support.content import patient
from fhir_assets_tests.support.deployment import Deploy
from fhir_assets_tests.support.leak_scan import build_site, find_leaks

DAY = datetime(2024, 1, 5, tzinfo=UTC)
START = {"fhir_last_updated_gte": "2024-01-01", "fhir_resource_types": ("Patient",), "fhir_source": "ndjson"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "input"
    folder.mkdir()
    return folder


def put_files(folder: Path, canaries: Canaries) -> None:
    """Put files with marked names there: a good one, and one of each kind that becomes a dead letter or a notice."""

    def path(element: str, suffix: str) -> Path:
        return folder / f"{canaries.text(element)}{suffix}"

    bundle = {
        "resourceType": "Bundle",
        "type": "batch",
        "entry": [{"request": {"method": "DELETE", "url": "Patient/x"}}],
    }
    path("good", ".ndjson").write_bytes(patient("a", DAY))
    path("bad line", ".ndjson").write_bytes(patient("b", DAY) + b'\n{"resourceType": "Patient", "id": \n')
    path("deletion", ".json").write_text(json.dumps(bundle))
    path("not JSON", ".json").write_bytes(b'{"resourceType": "Patient", ')
    path("cut", ".ndjson.gz").write_bytes(gzip.compress(patient("c", DAY) * 99)[:-20])
    path("link", ".ndjson").symlink_to(folder / "nowhere")
    inner = path("folder", "")
    inner.mkdir()
    (inner / f"{canaries.text('file in a folder')}.jsonl").write_bytes(b"[]")


def test_with_keys_no_channel_shows_the_name_of_a_source_file(
    deploy: Deploy, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    canaries = Canaries()
    put_files(folder, canaries)
    key = new_key()
    deployment = deploy(fhir_base_url=str(folder), phi_encryption_keys=key, **START)
    site = build_site(deployment, tmp_path)
    deployment.ingest()
    deployment.ingest()
    env = {**deployment.environment(), "PHI_ENCRYPTION_KEYS": key}
    shown = CliRunner().invoke(app, ["dead-letters", "list", "--json"], env=env)
    (site.output / "dead letters").write_text(shown.output)
    (site.output / "this process").write_text("".join(capfd.readouterr()))
    paths = [path for (path,) in deployment.query("SELECT path FROM ops.dead_letters WHERE stage = 'fetch'")]
    assert len(paths) >= 3
    assert all(path.startswith("file-") for path in paths)
    assert find_leaks(site, canaries) == set()

    label = paths[0].partition(":")[0]
    resolved = CliRunner().invoke(app, ["sources", "files", "--label", label, "--json"], env=env)
    [file] = json.loads(resolved.output)
    assert (folder / file["name"]).exists()
    assert file["label"] == label


def test_without_keys_dead_letters_name_their_files(deploy: Deploy, folder: Path) -> None:
    (folder / "Doe.ndjson").write_bytes(b"[]\n")
    deployment = deploy(fhir_base_url=str(folder), **START)
    deployment.ingest()
    assert deployment.query("SELECT path FROM ops.dead_letters") == [("Doe.ndjson:1",)]
    shown = CliRunner().invoke(app, ["sources", "files", "--json"], env=deployment.environment())
    assert json.loads(shown.output) == [{"name": "Doe.ndjson", "label": "Doe.ndjson"}]


def test_dead_letters_of_an_earlier_release_have_labels_after_a_full_refresh(deploy: Deploy, folder: Path) -> None:
    (folder / "Doe.ndjson").write_bytes(b"[]\n")
    deployment = deploy(fhir_base_url=str(folder), phi_encryption_keys=new_key(), **START)
    deployment.ingest()
    deployment.query("UPDATE ops.dead_letters SET path = 'Doe.ndjson:1' RETURNING 1")
    deployment.ingest(refresh=Refresh.FULL)
    [(path,)] = deployment.query("SELECT path FROM ops.dead_letters")
    assert path.startswith("file-")


def test_a_server_has_no_files(deploy: Deploy) -> None:
    deployment = deploy(fhir_base_url="http://127.0.0.1:9/fhir")
    shown = CliRunner().invoke(app, ["sources", "files"], env=deployment.environment())
    assert shown.exit_code != 0
    assert "set FHIR_SOURCE=ndjson" in shown.output + str(shown.exception)
