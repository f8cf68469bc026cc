"""A view that extends another has its columns and further ones, under the same name or a new one."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fhir_assets.cli.main import app
from fhir_assets.deployment.views import build_views
from fhir_assets.fhir.views import ViewSet, load_views
from fhir_assets.fhir.views.compiled_views import CompiledViews
from fhir_assets.settings import load_settings

TWIN = {"name": "twin", "path": "multipleBirth.ofType(boolean)", "type": "boolean"}
BASE = {
    "name": "people",
    "resource": "Patient",
    "description": "People.",
    "constant": [{"name": "use", "valueString": "official"}],
    "select": [{"column": [{"name": "id", "path": "getResourceKey()", "type": "string"}]}],
}


def write(folder: Path, name: str, definition: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(definition))
    return path


def load(tmp_path: Path, **own: dict[str, Any]) -> ViewSet:
    write(tmp_path / "shipped", "people", BASE)
    for name, definition in own.items():
        write(tmp_path / "own", name, definition)
    return load_views([tmp_path / "shipped", tmp_path / "own"])


def names(views: ViewSet) -> dict[str, list[str]]:
    assert views.broken == ()
    return {view.name: [column.name for column in view.columns] for view in views.views}


def test_a_view_is_extended_under_its_name(tmp_path: Path) -> None:
    # The file is read before that of the view by name, and extends it nevertheless.
    views = load(tmp_path, a={"extends": "people", "select": [{"column": [TWIN]}]})
    assert names(views) == {"people": ["id", "twin"]}
    (view,) = views.views
    assert view.description == "People."
    [[row]] = CompiledViews([view]).rows({"resourceType": "Patient", "id": "a", "multipleBirthBoolean": True})
    assert row == ("a", True)
    assert pickle.loads(pickle.dumps(view)).columns == view.columns
    (before,) = load_views([tmp_path / "shipped"]).views
    assert before.fingerprint != view.fingerprint


def test_two_files_may_extend_one_view_and_one_may_do_so_under_a_new_name(tmp_path: Path) -> None:
    born = {"name": "born", "path": "birthDate", "type": "date"}
    views = load(
        tmp_path,
        a={"extends": "people", "select": [{"column": [TWIN]}]},
        b={"extends": "people", "select": [{"column": [born]}], "description": "Mine."},
        c={"extends": "people", "name": "men", "where": [{"path": "gender = 'male'"}]},
    )
    assert names(views) == {"people": ["id", "twin", "born"], "men": ["id", "twin", "born"]}
    assert {view.name: view.description for view in views.views}["people"] == "Mine."


@pytest.mark.parametrize(
    ("definition", "message"),
    [
        ({"extends": "peopel"}, "extends: there is no view 'peopel'"),
        ({"extends": 1}, "extends: there is no view 1"),
        ({"extends": "people", "resource": "Observation"}, "the view people is of Patient"),
        ({"extends": "people", "colums": []}, "colums: cannot be part of a view that extends another"),
        ({"extends": "people", "select": {}}, "select: is not an array"),
        ({"extends": "people", "select": [{"column": [{"name": "id", "path": "id"}]}]}, "two columns"),
        ({"extends": "people", "select": [{"column": [{"name": "x", "path": "genderr"}]}]}, "select[0].column[0].path"),
    ],
)
def test_an_extension_that_is_not_valid_leaves_the_view_as_it_was(
    tmp_path: Path, definition: dict[str, Any], message: str
) -> None:
    views = load(tmp_path, a=definition)
    assert [[column.name for column in view.columns] for view in views.views] == [["id"]]
    [broken] = views.broken
    assert broken.message.startswith(f"{tmp_path}/own/a.json: ")
    assert message in broken.message


def test_a_shipped_view_is_extended_in_the_folder_of_ones_own(tmp_path: Path) -> None:
    write(tmp_path / "own", "mine", {"extends": "patient", "select": [{"column": [TWIN]}]})
    views = build_views(load_settings(fhir_views=tmp_path / "own"))
    assert views.broken == ()
    [extended] = [view for view in views.views if view.name == "patient"]
    assert [column.name for column in extended.columns][-1] == "twin"
    assert len(views.views) == len(build_views(load_settings()).views)


def test_an_extension_whose_table_cannot_exist_leaves_the_shipped_view_as_it_was(tmp_path: Path) -> None:
    tag = {"name": "phi", "value": "scramble"}
    path = write(tmp_path / "own", "a", {"extends": "patient", "select": [{"column": [TWIN | {"tag": [tag]}]}]})
    write(tmp_path / "own", "b", {"extends": "patient", "select": [{"column": [TWIN | {"name": "twin_b"}]}]})
    views = build_views(load_settings(fhir_views=tmp_path / "own"))
    [broken] = views.broken
    assert (broken.path, "phi is scramble" in broken.message, str(path) in broken.message) == (path, True, True)
    [extended] = [view for view in views.views if view.name == "patient"]
    assert [column.name for column in extended.columns][-1] == "twin_b"
    assert "twin" not in {column.name for column in extended.columns}


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "own"
    folder.mkdir()
    monkeypatch.setenv("FHIR_VIEWS", str(folder))
    return folder


def check(*words: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["view", "check", *words], catch_exceptions=False)
    return done.exit_code, done.output


def test_a_file_that_extends_a_view_is_checked_with_it(own: Path) -> None:
    good = write(own, "good", {"extends": "patient", "select": [{"column": [TWIN]}]})
    assert check(str(good))[0] == 0
    bad = write(own, "bad", {"extends": "patient", "select": [{"column": [TWIN | {"path": "multipleBirthh"}]}]})
    code, output = check(str(bad))
    assert (code, "select[0].column[0].path" in output) == (1, True)


def test_a_file_of_a_relative_folder_is_checked_by_its_absolute_path(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(own.parent)
    monkeypatch.setenv("FHIR_VIEWS", own.name)
    good = write(own, "good", {"extends": "patient", "select": [{"column": [TWIN]}]})
    for path in (good, good.relative_to(own.parent)):
        code, output = check(str(path))
        assert code == 0, output


def test_all_views_of_a_folder_are_checked_at_once(own: Path) -> None:
    write(own, "a", {"extends": "patient", "select": [{"column": [TWIN]}]})
    write(own, "b", BASE)
    code, output = check("--all")
    assert (code, "2 views, 0 of them not valid" in output) == (0, True)
    write(own, "c", BASE)
    write(own, "d", BASE | {"name": "wrong", "resource": "Patiennt"})
    code, output = check("--all")
    assert code == 1
    assert "4 views, 2 of them not valid" in output
    assert '"people" is already the name of' in output
    assert 'R4 has no resource "Patiennt"' in output
    assert check(str(own))[0] == 1


def test_a_folder_without_views_is_an_error(own: Path) -> None:
    done = CliRunner().invoke(app, ["view", "check", "--all"])
    assert done.exit_code == 1
    assert "there is no ViewDefinition to check" in str(done.exception)
    assert CliRunner().invoke(app, ["view", "check"]).exit_code == 1
