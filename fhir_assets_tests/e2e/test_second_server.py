"""Uploads and the connector write to another FHIR server: Medplum's FHIR router in Node.js (`make second-server`)."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from fhir_assets.sandbox.population import Population, write_population
from fhir_assets_tests.support.hospital import MRN, Hospital, hospital
from fhir_assets_tests.support.uploads import Upload, lines_of, patient, upload, write

__all__ = ["hospital", "upload"]

HERE = Path(__file__).parent / "second_server"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def medplum() -> Iterator[str]:
    """The base URL of a new server."""
    node = shutil.which("node")
    if node is None or not (HERE / "node_modules").exists():
        pytest.skip("the second server is not installed: make second-server")
    process = subprocess.Popen(
        [node, str(HERE / "server.mjs")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.communicate()


def content(resource: dict[str, Any]) -> dict[str, Any]:
    """Return a resource without ``versionId`` and ``lastUpdated``. Trailing zeros of numbers are ignored."""
    meta = {name: value for name, value in resource.get("meta", {}).items() if name not in ("versionId", "lastUpdated")}
    return {**{name: value for name, value in resource.items() if name != "meta"}, **({"meta": meta} if meta else {})}


def test_a_population_is_uploaded_completely(upload: Upload, medplum: str) -> None:
    write_population(upload.input, Population(2, 1))
    sent = {name: json.loads(body) for name, body in lines_of(upload.input).items()}
    summary = upload(url=medplum)
    assert summary["totals"]["failed"] == 0
    for name, resource in sent.items():
        held = requests.get(f"{medplum}/{name}", timeout=10).json()
        assert content(held) == content(resource), name
    again = upload("--skip-unchanged", url=medplum)["totals"]
    assert again["unchanged"] + again["updated"] == len(sent)
    assert again["unchanged"] > len(sent) / 2


def test_transactions_are_accepted(upload: Upload, medplum: str) -> None:
    write(upload.input / "p.ndjson", [patient(f"transacted-{n}") for n in range(25)])
    assert upload("--transaction", "--batch-size", "10", url=medplum)["totals"]["failed"] == 0
    for n in range(25):
        assert requests.get(f"{medplum}/Patient/transacted-{n}", timeout=10).status_code == 200


def test_the_connector_delivers_conditional_updates_and_deletes(hospital: Hospital, medplum: str) -> None:
    def list_patients() -> list[dict[str, Any]]:
        bundle = requests.get(f"{medplum}/Patient", params={"_count": "1000"}, timeout=10).json()
        resources = [entry["resource"] for entry in bundle.get("entry", [])]
        return [r for r in resources if any(i.get("system") == MRN for i in r.get("identifier", []))]

    stays = hospital.admit("1", "First")
    goes = hospital.admit("2", "Second")
    hospital.deliver(fhir_base_url=medplum)
    assert sorted(r["name"][0]["family"] for r in list_patients()) == ["First", "Second"]
    hospital.execute("UPDATE health.patient SET name_family = 'Changed' WHERE id = %s", stays)
    hospital.execute("DELETE FROM health.patient WHERE id = %s", goes)
    hospital.deliver(fhir_base_url=medplum)
    [remaining] = list_patients()
    assert remaining["name"][0]["family"] == "Changed"
    assert hospital.waiting() == 0
    assert hospital.dead() == []
