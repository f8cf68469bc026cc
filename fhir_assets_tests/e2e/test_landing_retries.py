"""What commands and ticks say of files that could not be read and wait for their next attempt."""

import json
from pathlib import Path

import dagster as dg
import pytest
from typer.testing import CliRunner

from fhir_assets.cli.main import app
from fhir_assets.deployment.landing import build_landing_zone
from fhir_assets.orchestration.jobs import LOAD_LANDING
from fhir_assets.privacy.keys import new_key
from fhir_assets_tests.support.deployment import Deploy, Deployment
from fhir_assets_tests.support.landing import definitions

SENTENCE = "1 file that could not be read waits for its next attempt, from 20"


@pytest.fixture
def deployment(deploy: Deploy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Deployment:
    """A deployment with a file in its landing zone that was truncated."""
    zone = tmp_path / "landing"
    zone.mkdir()
    values = {"fhir_landing_url": str(zone), "fhir_resource_types": "Patient", "phi_encryption_keys": new_key()}
    deployment = deploy(**values)
    build_landing_zone(deployment.settings).put("cut.ndjson", b'{"resourceType": "Patient", "id": "a"}\n')
    (zone / "cut.ndjson").write_bytes((zone / "cut.ndjson").read_bytes()[:-9])
    for name, value in {**deployment.environment(), **values}.items():
        monkeypatch.setenv(name.upper(), value)
    return deployment


def skip_message(deployment: Deployment) -> str | None:
    repository = definitions(deployment.settings).get_repository_def()
    context = dg.build_sensor_context(instance=deployment.instance, repository_def=repository)
    return repository.get_sensor_def(LOAD_LANDING).evaluate_tick(context).skip_message


def test_a_file_that_waits_for_its_retry_is_named_by_the_command_and_by_the_tick(deployment: Deployment) -> None:
    for files in (1, 0):
        result = CliRunner().invoke(app, ["landing", "load"])
        assert result.exit_code == 1
        assert f"{files} files, {files} failed" in result.output
        assert SENTENCE in result.output
    message = skip_message(deployment)
    assert message is not None
    assert message.startswith(f"no complete file is waiting; {SENTENCE}")
    printed = json.loads(CliRunner().invoke(app, ["landing", "load", "--json"]).stdout)
    ((due,),) = deployment.query("SELECT tried_at + interval '1 minute' FROM ops.landing_files")
    assert (printed["retries"], printed["retry_at"][:19]) == (1, due.isoformat()[:19])
    Path(deployment.settings.fhir_landing_url, "cut.ndjson").unlink()
    result = CliRunner().invoke(app, ["landing", "load"])
    assert (result.exit_code, "next attempt" in result.output) == (0, False)
