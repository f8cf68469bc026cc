"""Each input has a limit that a setting names; at the limit and beyond it the memory is bounded and nothing is lost."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

from fhir_assets.fhir.intake.visits_csv import COLUMNS
from fhir_assets_tests.support.deployment import Deploy
from fhir_assets_tests.support.landing import load_received, receive, tick
from fhir_assets_tests.support.odd_files import LINE

slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "message"),
    [
        pytest.param("a Bundle on a line at the limit of values", None, marks=slow),
        ("a Bundle on a line beyond it", "more than 2,000,000 values"),
        ("an entry beyond it", "more than 2,000,000 values"),
        ("a line at the limit of bytes", "Record"),
        ("a line beyond it", "longer than the limit"),
        ("a document beyond it", "longer than the limit"),
        ("a row beyond it", "a line of more than"),
        ("a compressed file beyond the ratio", "more than 400 times as large"),
        pytest.param("compressed lines beyond the ratio", "more than 400 times as large", marks=slow),
        pytest.param("issues at the limit of values", "error", marks=slow),
    ],
)
def test_the_memory_for_an_input_at_or_beyond_a_limit_is_bounded(name: str, message: str | None) -> None:
    command = [sys.executable, "-m", "fhir_assets_tests.support.memory_at_limits", name]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    read = json.loads(result.stdout)
    assert read["mib"] < 700
    assert (message is None) == (read["items"] == {})
    assert all(message and message in item for item in read["items"])


def test_a_landed_file_beyond_a_limit_is_a_dead_letter_after_its_first_resources(
    deploy: Deploy, tmp_path: Path
) -> None:
    zone = tmp_path / "landing"
    zone.mkdir()
    (zone / "good.ndjson").write_bytes(LINE.replace(b"good", b"small"))
    (zone / "large.ndjson").write_bytes(LINE + b"\n" * (2 << 20))
    (zone / "large.json.gz").write_bytes(gzip.compress(b" " * (2 << 20)))
    deployment = deploy(fhir_landing_url=str(zone), fhir_resource_types=("Patient",), fhir_file_bytes=1 << 20)
    tick(deployment)
    tick(deployment)
    assert receive(deployment).success
    assert load_received(deployment) == []
    states = deployment.query("SELECT name, status, rejected FROM ops.landing_files ORDER BY name")
    assert states == [("good.ndjson", "loaded", 0), ("large.json.gz", "loaded", 1), ("large.ndjson", "loaded", 1)]
    messages = deployment.query("SELECT message FROM ops.dead_letters")
    assert len(messages) == 2
    assert all("FHIR_FILE_BYTES" in message for (message,) in messages)


def test_a_file_of_anything_else_is_not_kept_in_pieces_and_its_resources_are_loaded(
    deploy: Deploy, tmp_path: Path
) -> None:
    zone = tmp_path / "landing"
    zone.mkdir()
    (zone / "braces.json").write_bytes(b"{}" * 5000)
    (zone / "bundle.json").write_bytes(
        b'{"resourceType":"Bundle","type":"batch","entry":[%s]}' % b",".join([b'{"resource":{}}'] * 5000)
    )
    (zone / "lines.ndjson").write_bytes(b"{}\n" * 5000 + LINE)
    (zone / "rows.csv").write_bytes(",".join(COLUMNS).encode() + b"\n1" * 5000)
    deployment = deploy(fhir_landing_url=str(zone), fhir_file_dead_letters=10)
    tick(deployment)
    tick(deployment)
    assert receive(deployment).success
    assert load_received(deployment) == []
    states = deployment.query("SELECT name, status, rows, rejected FROM ops.landing_files ORDER BY name")
    assert [(name, status, rows, rejected <= 11) for name, status, rows, rejected in states] == [
        ("braces.json", "loaded", 0, True),
        ("bundle.json", "loaded", 0, True),
        ("lines.ndjson", "loaded", 1, True),
        ("rows.csv", "loaded", 0, True),
    ]
    counted = deployment.query("SELECT message FROM ops.dead_letters WHERE rule = 'too-many'")
    assert len(counted) == 4
    assert all(message.startswith("4,990 more parts") and "FHIR_FILE_DEAD_LETTERS" in message for (message,) in counted)
    assert deployment.count_loaded()["Patient"] == 1


def test_a_source_of_files_of_anything_else_has_as_few_dead_letters(deploy: Deploy, tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "Patient.ndjson").write_bytes(b"{}\n" * 5000 + LINE)
    (folder / "braces.json").write_bytes(b"{}" * 5000)
    deployment = deploy(
        fhir_base_url=str(folder), fhir_source="ndjson", fhir_resource_types=("Patient",), fhir_file_dead_letters=10
    )
    outcomes = deployment.ingest()
    assert deployment.count_loaded() == {"Patient": 1}
    assert deployment.count_dead_letters() == {"structure": 20, "too-many": 2}
    assert [text for outcome in outcomes for text in deployment.unreconciled(outcome)] == []
