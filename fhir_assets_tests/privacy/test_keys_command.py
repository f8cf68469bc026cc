"""`fhir-assets keys`: a new key serves, and the status says what seals what."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fhir_assets.cli.main import app
from fhir_assets.warehouse.database import connect


def keys(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["keys", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def status() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(keys("status", "--json"))
    return found


def test_the_status_says_what_is_in_the_clear_and_what_a_new_key_is_to_seal(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DB_URL", database)
    monkeypatch.setenv("FHIR_ASSETS_HOME", str(tmp_path))
    with connect(database) as conn:
        conn.execute(
            "INSERT INTO fhir.resource (resource_type, id, as_of, partition_key, run_id, resource)"
            " VALUES ('Patient', 'p', now(), '2024-01-01', 'r', '{}')"
        )
    assert [(row["key"], row["resources"]) for row in status()] == [("in the clear", 1)]
    assert "in the clear" in keys("status")
    monkeypatch.setenv("PHI_ENCRYPTION_KEYS", keys("new").strip())
    newest, clear = status()
    assert (newest["set"], newest["newest"], newest["resources"]) == (True, True, 0)
    assert (clear["key"], clear["newest"], clear["resources"]) == ("in the clear", False, 1)
