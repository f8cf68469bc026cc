"""The permissions of files and folders: private by default, FHIR_FILE_MODE for the lake and exports."""

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fhir_assets.deployment.store import build_blobs, build_store
from fhir_assets.errors import ConfigurationError
from fhir_assets.file_modes import create_folders, create_home
from fhir_assets.settings import load_settings
from fhir_assets.storage.landing_zone import FolderZone
from fhir_assets.storage.part_writer import PartWriter
from fhir_assets.storage.store import Store


@pytest.fixture(params=[0o000, 0o022, 0o077], ids=oct, autouse=True)
def umask(request: pytest.FixtureRequest) -> Iterator[None]:
    before = os.umask(request.param)
    yield
    os.umask(before)


def mode(path: Path) -> str:
    return oct(stat.S_IMODE(path.stat().st_mode))


def modes(folder: Path) -> set[str]:
    """Return the permissions of a folder and of everything in it."""
    return {mode(path) for path in (folder, *folder.rglob("*"))}


def write_store(root: Path) -> Store:
    store = build_store(load_settings(fhir_store_url=str(root)))
    with PartWriter(store, "raw") as parts:
        parts.add("Patient", "2024-01-05", b"{}", None)
        parts.finish()
    store.blobs.put("raw/patient/2024-01-05/manifest.json", b"{}")
    return store


def test_the_store_is_for_its_owner_only(tmp_path: Path) -> None:
    write_store(tmp_path / "new" / "store")
    assert modes(tmp_path / "new") == {"0o600", "0o700"}


def test_folders_of_an_earlier_store_are_narrowed_at_the_next_start(tmp_path: Path) -> None:
    root = tmp_path / "store"
    write_store(root)
    (root / "store.json").touch()
    root.chmod(0o2755)
    build_store(load_settings(fhir_store_url=str(root)))
    assert mode(root) == "0o2700"


def test_of_a_folder_with_other_content_only_the_folders_of_the_store_are_narrowed(tmp_path: Path) -> None:
    for name in ("raw", "validated", "notes"):
        (tmp_path / name).mkdir()
        (tmp_path / name).chmod(0o755)
    tmp_path.chmod(0o755)
    build_store(load_settings(fhir_store_url=str(tmp_path)))
    names = (".", "raw", "validated", "notes")
    assert [mode(tmp_path / name) for name in names] == ["0o755", "0o700", "0o700", "0o755"]


def test_files_written_to_the_landing_zone_are_for_their_owner_only(tmp_path: Path) -> None:
    FolderZone(tmp_path / "zone").put("posts/a.ndjson", b"{}")
    assert modes(tmp_path / "zone") == {"0o600", "0o700"}


@pytest.mark.parametrize(
    ("value", "of_files", "of_folders"),
    [(None, "0o600", "0o700"), ("0640", "0o640", "0o750"), ("644", "0o644", "0o755"), ("0o604", "0o604", "0o705")],
)
def test_the_lake_and_exports_have_the_permissions_of_the_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str | None, of_files: str, of_folders: str
) -> None:
    if value:
        monkeypatch.setenv("FHIR_FILE_MODE", value)
    lake = build_blobs(load_settings(), str(tmp_path / "new" / "lake"))
    spooled = lake.create_spooled(".parquet")
    assert (mode(spooled), mode(spooled.parent)) == ("0o600", "0o700")
    lake.put_file("patient/data.parquet", spooled)
    lake.put("patient/.state/a.json", b"{}")
    lake.put("patient/.state/a.json", b"{}")
    lake.remove_spool()
    files = [path for path in (tmp_path / "new").rglob("*") if path.is_file()]
    assert len(files) == 2
    assert {mode(path) for path in files} == {of_files}
    assert modes(tmp_path / "new") == {of_files, of_folders}


def test_new_folders_of_a_lake_keep_the_group_of_its_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o2750)
    build_blobs(load_settings(fhir_file_mode="0640"), str(tmp_path)).put("patient/a.parquet", b"")
    assert mode(tmp_path / "patient") == "0o2750"


def test_an_existing_folder_keeps_its_permissions(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    create_folders(tmp_path, mode=0o640)
    create_home(tmp_path)
    assert mode(tmp_path) == "0o755"


def test_a_file_in_the_place_of_a_parent_folder_is_named_as_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        create_folders(tmp_path / "file" / "a" / "b")
    with pytest.raises(FileExistsError):
        create_folders(tmp_path / "file")


def test_a_folder_that_another_process_removes_meanwhile_is_created_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mkdir = Path.mkdir
    removed: list[Path] = []

    def remove_parent_once(self: Path, mode: int) -> None:
        if self.name == "b" and self.parent.is_dir() and not removed:
            removed.append(self.parent)
            self.parent.rmdir()
        mkdir(self, mode)

    monkeypatch.setattr(Path, "mkdir", remove_parent_once)
    create_folders(tmp_path / "a" / "b")
    assert removed
    assert mode(tmp_path / "a" / "b") == "0o700"


@pytest.mark.parametrize("value", ["0666", "0755", "0400", "u=rw", "-1", "0o1600", "rw-------"])
def test_a_setting_that_lets_others_write_or_execute_is_refused(value: str) -> None:
    with pytest.raises(ConfigurationError, match="FHIR_FILE_MODE: it is an octal number: 0600 for the owner"):
        load_settings(fhir_file_mode=value)


def test_the_import_of_the_package_leaves_the_umask(tmp_path: Path) -> None:
    program = (
        "import os; before = os.umask(0o022); os.umask(before)\n"
        "import fhir_assets.cli.main, fhir_assets.definitions, fhir_assets.api.app\n"
        "after = os.umask(0); print(before == after)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"
