"""Folders of others are read without following links, and without waiting for pipes, whatever changes meanwhile."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

from fhir_assets import local_files
from fhir_assets.delivery.upload.files import Folder
from fhir_assets.errors import ConfigurationError, NotFhir
from fhir_assets.fhir.files.ndjson import NdjsonSource
from fhir_assets.fhir.record import Record
from fhir_assets.fhir.views.resource_files import read_resources
from fhir_assets.settings import load_settings
from fhir_assets_tests.support.odd_files import LINE, put_odd_files


def open_file(root: Path, name: str) -> bytes:
    with local_files.open_file(root, name, OSError) as stream:
        return stream.read()


def to_link(path: Path, outside: Path) -> None:
    path.unlink()
    path.symlink_to(outside / "secret.ndjson")


def to_pipe(path: Path, outside: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def to_linked_folder(path: Path, outside: Path) -> None:
    path.rename(path.with_name("other"))
    path.parent.rename(path.parent.with_name("elsewhere"))
    path.parent.symlink_to(outside)


@pytest.mark.parametrize("change", [to_link, to_pipe, to_linked_folder])
def test_what_takes_the_place_of_a_file_after_the_listing_is_not_read(
    change: Callable[[Path, Path], None], tmp_path: Path
) -> None:
    outside, zone = tmp_path / "outside", tmp_path / "zone"
    outside.mkdir()
    (outside / "secret.ndjson").write_bytes(LINE)
    (zone / "below").mkdir(parents=True)
    (zone / "below" / "secret.ndjson").write_bytes(LINE)
    (found,) = local_files.walk_files(zone)
    assert open_file(zone, found.name) == LINE
    change(zone / found.name, outside)
    with pytest.raises(OSError, match=r"link|pipe|directory"):
        open_file(zone, found.name)


@pytest.mark.parametrize("name", ["../outside.ndjson", "/etc/passwd", "below/../../outside.ndjson", "", "below/"])
def test_no_name_leads_out_of_the_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / "outside.ndjson").write_bytes(LINE)
    (tmp_path / "zone" / "below").mkdir(parents=True)
    with pytest.raises(OSError, match="not the name of a file"):
        open_file(tmp_path / "zone", name)


@pytest.mark.parametrize("size", [10, 1 << 20])
def test_a_file_that_grows_or_shrinks_while_it_is_read_is_an_error_and_has_an_end(size: int, tmp_path: Path) -> None:
    path = tmp_path / "a.ndjson"
    path.write_bytes(b"x" * (1 << 19))
    with local_files.open_file(tmp_path, "a.ndjson", OSError) as stream:
        assert stream.read(5) == b"xxxxx"
        with path.open("r+b") as writer:
            writer.truncate(size)
        with pytest.raises(OSError, match="changed while it was read"):
            stream.read()


def test_a_source_of_files_reads_odd_names_and_reports_what_it_does_not_read(tmp_path: Path) -> None:
    odd = put_odd_files(tmp_path)
    source = NdjsonSource(str(tmp_path))
    assert source.compute_state() == source.compute_state()
    read = [item.id for item in source.fetch_all("Patient") if isinstance(item, Record)]
    assert read == ["good"] * (1 + odd.readable + odd.not_utf_8)
    notices = source.drain_notices()
    assert len(notices) == odd.faulty
    assert {notice.severity for notice in notices} == {"error"}
    assert all(notice.message.isprintable() for notice in notices)


def test_an_upload_sends_odd_names_and_reports_what_it_does_not_read(tmp_path: Path) -> None:
    odd = put_odd_files(tmp_path)
    folder = Folder(tmp_path)
    refused: list[str] = []
    counts = [folder.count(name, lambda unusable: refused.append(unusable.message)) for name in folder.names]
    assert folder.state()
    assert counts.count({"Patient": 1}) == 1 + odd.readable + odd.not_utf_8
    assert len(refused) == odd.faulty


@pytest.mark.parametrize("content", [b"FHIR_BASE_URL=\xff\n", None])
def test_a_file_of_settings_that_cannot_be_read_is_named(
    content: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(".env").write_bytes(content)
    else:
        Path(".env").touch()

        def refuse(*_: object, **__: object) -> NoReturn:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("dotenv.main.open", refuse, raising=False)
    with pytest.raises(ConfigurationError, match=r"\.env in this folder cannot be read"):
        load_settings()


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_pipe_in_a_folder_that_a_command_reads_is_named_and_not_waited_for(kind: str, tmp_path: Path) -> None:
    (tmp_path / "good.ndjson").write_bytes(LINE)
    if kind == "pipe":
        os.mkfifo(tmp_path / "odd.ndjson")
    else:
        (tmp_path / "odd.ndjson").symlink_to("/dev/zero")
    with pytest.raises(NotFhir, match=r"odd.ndjson: cannot be read: it is a pipe, a device"):
        list(read_resources([tmp_path]))
