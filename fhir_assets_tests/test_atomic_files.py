"""A file that is replaced has its earlier content or its complete new content, and nothing else appears beside it."""

import os
import resource
import stat
import threading
from pathlib import Path

import pytest

from fhir_assets.atomic_files import replace_content, replace_file


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "result"
    path.write_bytes(b"before")
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_content_appears_when_the_block_ends(file: Path) -> None:
    with replace_file(file) as out:
        out.write(b"after")
        out.flush()
        assert file.read_bytes() == b"before"
        [unfinished] = [name for name in names(file.parent) if name != "result"]
        assert unfinished.startswith(".")
        assert unfinished.endswith(".tmp")
    assert file.read_bytes() == b"after"
    assert names(file.parent) == ["result"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_failure_leaves_the_earlier_content_and_no_other_file(file: Path, error: type[BaseException]) -> None:
    def fail() -> None:
        with replace_file(file) as out:
            out.write(b"half")
            raise error

    with pytest.raises(error):
        fail()
    assert file.read_bytes() == b"before"
    assert names(file.parent) == ["result"]


def test_a_failure_leaves_no_new_file(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), replace_file(tmp_path / "new"):
        raise RuntimeError
    assert names(tmp_path) == []


def test_a_full_disk_leaves_the_earlier_content_and_no_other_file(file: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            replace_content(file, b"x" * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_bytes() == b"before"
    assert names(file.parent) == ["result"]


def test_an_existing_file_keeps_its_permissions_and_a_new_one_is_for_its_owner_only(file: Path) -> None:
    file.chmod(0o640)
    new, executable = (file.with_name(name) for name in ("new", "executable"))
    for path in (file, new):
        replace_content(path, b"x")
    replace_content(executable, b"x", mode=0o700)
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    assert stat.S_IMODE(new.stat().st_mode) == 0o600
    assert stat.S_IMODE(executable.stat().st_mode) == 0o700


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
def test_an_existing_file_keeps_its_owner(file: Path) -> None:
    os.chown(file, 12345, 12346)
    replace_content(file, b"x")
    assert (file.stat().st_uid, file.stat().st_gid) == (12345, 12346)


def test_a_file_that_is_protected_against_writing_is_an_error(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write to every file
    with pytest.raises(PermissionError):
        replace_content(file, b"after")
    assert file.read_bytes() == b"before"
    assert names(file.parent) == ["result"]


@pytest.mark.parametrize("exists", [True, False])
def test_a_symbolic_link_stays_and_its_target_is_replaced(tmp_path: Path, exists: bool) -> None:
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / "target", tmp_path / "link"
    if exists:
        target.write_bytes(b"before")
    link.symlink_to("elsewhere/target")
    replace_content(link, b"after")
    assert link.is_symlink()
    assert target.read_bytes() == b"after"
    assert names(target.parent) == ["target"]


def test_a_named_pipe_is_written_directly(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    received: list[bytes] = []
    reader = threading.Thread(target=lambda: received.append(pipe.read_bytes()))
    reader.start()
    replace_content(pipe, b"content")
    reader.join(30)
    assert received == [b"content"]
    assert pipe.is_fifo()


def test_a_full_device_is_an_error_and_stays_a_device() -> None:
    with pytest.raises(OSError, match="No space left"):
        replace_content(Path("/dev/full"), b"x")
    assert Path("/dev/full").is_char_device()


def test_an_open_descriptor_is_written_where_it_is(file: Path) -> None:
    with file.open("ab") as out:
        replace_content(Path(f"/dev/fd/{out.fileno()}"), b" and after")
    assert file.read_bytes() == b"before and after"


def test_a_folder_or_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        replace_content(tmp_path, b"x")
    with pytest.raises(FileNotFoundError):
        replace_content(tmp_path / "absent" / "file", b"x")
    assert names(tmp_path) == []


def test_a_name_of_the_maximum_length_can_be_replaced(tmp_path: Path) -> None:
    path = tmp_path / ("ä" * 127)
    replace_content(path, b"x")
    assert path.read_bytes() == b"x"
