"""The views of a deployment are read once in a process, and again when a file has changed."""

import json
from pathlib import Path

import pytest

from fhir_assets.deployment import views
from fhir_assets.deployment.views import build_views
from fhir_assets.settings import Settings, load_settings


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    write(tmp_path / "own.json", "own_one")
    return load_settings(fhir_views=tmp_path, fhir_assets_home=tmp_path / "home")


def write(path: Path, name: str) -> None:
    select = [{"column": [{"name": "id", "path": "getResourceKey()"}]}]
    unfinished = path.with_suffix(".new")
    unfinished.write_text(json.dumps({"name": name, "resource": "Patient", "status": "active", "select": select}))
    unfinished.replace(path)


def names(settings: Settings) -> set[str]:
    return {view.name for view in build_views(settings).views}


def test_views_are_read_once(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build_views(settings)
    monkeypatch.setattr(views, "load_views", None)
    assert build_views(settings) is first


def test_a_changed_file_is_read_again_even_if_it_has_the_same_size(settings: Settings, tmp_path: Path) -> None:
    assert "own_one" in names(settings)
    write(tmp_path / "own.json", "own_two")
    assert {"own_one", "own_two"} & names(settings) == {"own_two"}


def test_an_added_and_a_removed_file_are_noticed(settings: Settings, tmp_path: Path) -> None:
    before = names(settings)
    write(tmp_path / "more.json", "more")
    assert names(settings) == {*before, "more"}
    (tmp_path / "own.json").unlink()
    assert names(settings) == {*before, "more"} - {"own_one"}


def test_settings_that_change_the_views_count(settings: Settings) -> None:
    other = settings.model_copy(update={"fhir_base_url": "https://other.example/fhir"})
    bases = {view.reference_bases for view in build_views(settings).views}
    other_bases = {view.reference_bases for view in build_views(other).views}
    assert not bases & other_bases


def test_a_link_whose_target_was_exchanged_is_read_again(settings: Settings, tmp_path: Path) -> None:
    """Kubernetes changes files by a link to another folder."""
    for number in ("one", "two"):
        (tmp_path / number).mkdir()
        write(tmp_path / number / "linked.json", f"linked_{number}")
    (tmp_path / "linked.json").symlink_to(tmp_path / "one" / "linked.json")
    assert "linked_one" in names(settings)
    (tmp_path / "linked.json").unlink()
    (tmp_path / "linked.json").symlink_to(tmp_path / "two" / "linked.json")
    assert {"linked_one", "linked_two"} & names(settings) == {"linked_two"}
