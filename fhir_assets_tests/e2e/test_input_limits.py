"""Each input has a limit that a setting names; at the limit and beyond it the memory is bounded and nothing is lost."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

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
