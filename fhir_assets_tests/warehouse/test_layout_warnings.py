"""`fhir-assets view check` warns of tables that Postgres can have, but that readers or full rows cannot cope with."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fhir_assets.cli.main import app
from fhir_assets_tests.support.views import column


def check(folder: Path, *columns: dict[str, Any], **select: Any) -> tuple[int, str]:
    """Return the exit code and the output of `view check` for a view with these columns."""
    definition = {"resourceType": "ViewDefinition", "name": "own", "status": "draft", "resource": "Patient"}
    path = folder / "own.json"
    path.write_text(json.dumps({**definition, "select": [{"column": list(columns), **select}]}))
    done = CliRunner().invoke(app, ["view", "check", str(path)], catch_exceptions=False)
    return done.exit_code, done.output


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ([column("Born", "gender", "code"), column("born", "gender", "code")], "columns Born and born differ by upper"),
        ([column("partition_key", "gender", "code")], "replace column partition_key by the window"),
        ([column(f"c{n}", "gender", "code") for n in range(500)], "each of its 502 columns needs 91"),
    ],
)
def test_a_table_that_readers_or_full_rows_cannot_cope_with_is_a_warning(
    tmp_path: Path, columns: list[dict[str, Any]], words: str
) -> None:
    code, output = check(tmp_path, *columns)
    assert code == 0
    assert f"{tmp_path / 'own.json'}: warning: view own: " in output
    assert words in output


def test_a_usual_view_has_no_warning(tmp_path: Path) -> None:
    code, output = check(tmp_path, column("id", "getResourceKey()", "string"), column("born", "birthDate", "date"))
    assert (code, "warning" in output) == (0, False)


def test_a_path_that_cannot_be_compiled_is_an_error_of_view_and_column(tmp_path: Path) -> None:
    code, output = check(tmp_path, column("link", ".".join(["extension"] * 30) + ".url.first()", "uri"))
    assert code == 1
    assert "error: view own, column link: its path and the selects around it are nested too deeply" in output
