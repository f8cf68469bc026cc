"""The upgrade of a loaded deployment to views with more columns and tables, while readers read and a load runs."""

from pathlib import Path

import pytest

from fhir_assets_tests.support.databases import fresh_database
from fhir_assets_tests.support.older_version import upgrade

pytestmark = pytest.mark.slow


def test_an_upgrade_fills_new_columns_and_tables_beside_readers_and_a_load(
    postgres: str, database: str, tmp_path: Path
) -> None:
    with fresh_database(postgres) as fresh:
        done = upgrade(database, fresh, tmp_path, resources=2000)
    assert done.resources > 500
    assert done.loaded_meanwhile > done.resources / 20
    assert done.differing == []
    assert done.tables > 100
    assert done.lost_rows == []
    assert done.reads > 0
    types = {line.partition(":")[0] for line in done.progress}
    assert {"Patient", "Observation", "Encounter", "Condition"} <= types
    assert "could not" not in done.output
