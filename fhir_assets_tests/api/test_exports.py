"""Exports over HTTP name what they leave out."""

from pathlib import Path

import pytest

from fhir_assets_tests.support.api import Serve


@pytest.mark.parametrize("tables", [True, False])
def test_an_export_names_the_views_whose_tables_it_leaves_out(
    serve_in_threads: Serve, tmp_path: Path, tables: bool
) -> None:
    views = tmp_path / "views"
    views.mkdir()
    (views / "broken.json").write_text('{"resourceType": "ViewDefinition", "resource": "Patient"')
    api = serve_in_threads(fhir_views=str(views), fhir_export_url=str(tmp_path / "exports"))
    answer = api.post(f"/export/patient?include_normalized={str(tables).lower()}", role="operator")
    assert answer.status_code == 200, answer.text
    assert [each["file"] for each in answer.json()["broken_views"]] == (["broken.json"] if tables else [])
    names = [file["name"] for file in answer.json()["files"]]
    assert any(name.endswith(".parquet") for name in names) == tables
