"""Without keys `demo` and `dev` warn about unencrypted data; with PHI_REQUIRED=1 every command refuses to run."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from fhir_assets.cli.main import app
from fhir_assets.definitions import defs
from fhir_assets.errors import ConfigurationError
from fhir_assets.privacy.keys import new_key
from fhir_assets.warehouse.postgres.db.connections import connect
from fhir_assets.warehouse.postgres.db.schema_state import require_current

WARNING = "WARNING: patient data is stored in the clear: PHI_ENCRYPTION_KEYS is not set."


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FHIR_ASSETS_HOME", str(tmp_path))
    monkeypatch.setattr("fhir_assets.cli.dev.serve_ui", lambda *arguments, **options: None)
    monkeypatch.setattr("fhir_assets.cli.demo.load_due", lambda settings, triggered_by: [])


@pytest.mark.parametrize("command", [["dev"], ["demo", "--no-ui", "--patients", "1"]])
def test_a_warning_about_unencrypted_data_is_printed_once_and_only_without_keys(
    command: list[str], database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DB_URL", database)
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert (result.exit_code, result.output.count(WARNING)) == (0, 1)
    monkeypatch.setenv("PHI_ENCRYPTION_KEYS", new_key())
    assert WARNING not in CliRunner().invoke(app, command, catch_exceptions=False).output


@pytest.mark.parametrize(
    "command",
    [["dev"], ["demo", "--no-ui"], ["ingest"], ["migrate"], ["worker"], ["api"], ["export", "all", "--output", "x"]],
    ids=lambda command: command[0],
)
def test_every_command_refuses_to_run_if_required_keys_are_missing(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PHI_REQUIRED", "1")
    result = CliRunner().invoke(app, command)
    assert isinstance(result.exception, ConfigurationError), result.output
    assert "PHI_REQUIRED is set, but there are no keys" in str(result.exception)
    assert list(tmp_path.iterdir()) == []


def test_the_code_location_does_not_load_if_required_keys_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHI_REQUIRED", "1")
    with pytest.raises(ConfigurationError, match="PHI_REQUIRED is set, but there are no keys"):
        defs()


def test_the_demo_migrates_an_empty_database_of_db_url(empty_database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DB_URL", empty_database)
    result = CliRunner().invoke(app, ["demo", "--no-ui", "--patients", "1"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    with connect(empty_database) as conn:
        require_current(empty_database)
        assert conn.execute("SELECT count(*) FROM ops.ingestion_runs").fetchone() == (0,)
