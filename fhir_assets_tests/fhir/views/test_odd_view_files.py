"""Odd files in a folder of views: each is a broken view with its reason, and the others are loaded."""

import os
from pathlib import Path

from fhir_assets.fhir.views import load_views
from fhir_assets_tests.support.shipped_views import VIEWS


def test_odd_files_are_broken_views_and_the_others_are_loaded(tmp_path: Path) -> None:
    folder = tmp_path / "views"
    folder.mkdir()
    patient = (VIEWS / "patient.json").read_bytes()
    (tmp_path / "outside.json").write_bytes(patient)
    (folder / "good.json").write_bytes(patient)
    os.mkfifo(folder / "pipe.json")
    (folder / "folder.json").mkdir()
    (folder / "loop.json").symlink_to("loop.json")
    (folder / "nowhere.json").symlink_to("nothing")
    (folder / "zero.json").symlink_to("/dev/zero")
    (folder / "out.json").symlink_to(tmp_path / "outside.json")
    with (folder / "huge.json").open("wb") as file:
        file.truncate(1 << 34)
    Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9\x1b[2J.json")).write_bytes(b"{}")
    loaded = load_views([folder], leave_out={folder / "loop.json"})
    assert [view.name for view in loaded.views] == ["patient"]
    messages = {broken.path.name: broken.message for broken in load_views([folder]).broken}
    assert len(messages) == 8
    assert "a pipe" in messages["pipe.json"]
    assert all("link out of" in messages[name] for name in ("zero.json", "out.json"))
    assert "larger than" in messages["huge.json"]
    assert all(message.isprintable() for message in messages.values())


def test_links_within_the_folder_are_followed_as_kubernetes_mounts_files(tmp_path: Path) -> None:
    (tmp_path / "..2024").mkdir()
    (tmp_path / "..2024" / "patient.json").write_bytes((VIEWS / "patient.json").read_bytes())
    (tmp_path / "..data").symlink_to("..2024")
    (tmp_path / "patient.json").symlink_to("..data/patient.json")
    assert [view.name for view in load_views([tmp_path]).views] == ["patient"]
