"""`fhir-assets keys`: new keys, the status of keys, and rotations."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fhir_assets.cli.main import app
from fhir_assets.fhir.views import ViewSet
from fhir_assets.privacy.keys import new_key, parse_keys
from fhir_assets.warehouse.postgres.db.connections import connect
from fhir_assets_tests.support.key_rotation import VIEWS, load_people, lose_key, open_session

OLD, NEW = new_key(), new_key()
OLD_ID, NEW_ID = (key.id for key in parse_keys([OLD, NEW]))


@pytest.fixture
def deployment_url(database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of the database that the commands of a test use."""
    monkeypatch.setenv("DB_URL", database)
    monkeypatch.setenv("FHIR_ASSETS_HOME", str(tmp_path))
    monkeypatch.setattr("fhir_assets.cli.keys.build_views", lambda settings: ViewSet(VIEWS, ()))
    return database


def run_keys(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["keys", *arguments], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.output


def read_status() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(run_keys("status", "--json"))["keys"]
    return rows


def fill(url: str, *of_keys: str) -> None:
    with open_session(url, *of_keys) as conn:
        load_people(conn, range(20))


def test_the_status_counts_unencrypted_resources_that_a_rotation_encrypts(
    deployment_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with connect(deployment_url) as conn:
        conn.execute(
            """
            INSERT INTO fhir.resource (resource_type, id, as_of, partition_key, run_id, resource)
            VALUES ('Patient', 'p', now(), '2024-01-01', 'r', '{}')
            """
        )
        conn.execute(
            """
            INSERT INTO fhir.resource (resource_type, id, as_of, partition_key, run_id, deleted_at)
            VALUES ('Patient', 'gone', now(), '2024-01-01', 'r', now())
            """
        )
    assert [(row["key"], row["resources"]) for row in read_status()] == [("in the clear", 1)]
    assert "Patient data is stored in the clear" in run_keys("status")
    monkeypatch.setenv("PHI_ENCRYPTION_KEYS", run_keys("new").strip())
    newest, clear = read_status()
    assert (newest["set"], newest["newest"], newest["resources"]) == (True, True, 0)
    assert (clear["key"], clear["newest"], clear["resources"]) == ("in the clear", False, 1)
    assert "In the clear: 1 resources. `fhir-assets keys rotate` encrypts them." in run_keys("status")


def test_after_a_rotation_the_older_key_is_no_longer_needed(
    deployment_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(deployment_url, OLD)
    monkeypatch.setenv("PHI_ENCRYPTION_KEYS", f"{NEW},{OLD}")
    assert f"Key {OLD_ID} is still needed: `fhir-assets keys rotate`" in run_keys("status")
    output = run_keys("rotate")
    assert f"Encrypted with key {NEW_ID}: 20 resources." in output
    assert f"Key {OLD_ID} is no longer needed: remove it from PHI_ENCRYPTION_KEYS." in output
    assert output.splitlines()[-1] in run_keys("status")
    newest, older = read_status()
    assert (newest["needed"], older["needed"]) == (True, False)
    assert f"Last rotation: to key {NEW_ID}, 21 of 21 (100%), ended" in run_keys("status")
    monkeypatch.setenv("PHI_ENCRYPTION_KEYS", NEW)
    [only] = read_status()
    assert (only["resources"], only["secret"]) == (20, 1)
    assert "no longer" not in run_keys("status")


def test_a_rotation_reports_the_number_of_unencrypted_resources(
    deployment_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(deployment_url)
    monkeypatch.setenv("PHI_ENCRYPTION_KEYS", NEW)
    assert "Previously stored in the clear: 20 resources." in run_keys("rotate")
    assert "In the clear" not in run_keys("status")


def test_a_missing_key_is_reported_with_its_number_of_resources_and_the_remedy(
    deployment_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(deployment_url, OLD)
    with open_session(deployment_url, OLD) as conn:
        lose_key(conn, 3, "0badc0de")
    monkeypatch.setenv("PHI_ENCRYPTION_KEYS", f"{NEW},{OLD}")
    expected = "Key 0badc0de is missing: it encrypts 3 resources. Add it to the end of PHI_ENCRYPTION_KEYS, then run "
    assert expected in run_keys("status")
    assert expected in run_keys("rotate", code=1)


def test_a_wrong_key_is_refused_before_data_is_read(deployment_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(deployment_url, OLD)
    monkeypatch.setenv("PHI_ENCRYPTION_KEYS", NEW)
    for command in ("status", "rotate"):
        refused = CliRunner().invoke(app, ["keys", command])
        assert f"encrypted with key {OLD_ID}, which is not in PHI_ENCRYPTION_KEYS" in str(refused.exception)
        assert NEW not in str(refused.exception)


def test_a_rotation_without_keys_names_the_command_that_creates_one(deployment_url: str) -> None:
    refused = CliRunner().invoke(app, ["keys", "rotate"])
    assert "keys new" in str(refused.exception)
