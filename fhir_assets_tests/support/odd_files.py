"""A folder with files as nobody should put them there."""

import os
import socket
from dataclasses import dataclass
from pathlib import Path

LINE = b'{"resourceType": "Patient", "id": "good", "meta": {"lastUpdated": "2024-01-05T10:00:00Z"}}\n'


@dataclass(frozen=True)
class OddFiles:
    """How many files can be read, how many only have a name that is not UTF-8, and how many cannot be read."""

    readable: int
    not_utf_8: int
    faulty: int


def put_odd_files(folder: Path) -> OddFiles:
    """Put a good file into a folder, and odd ones beside it."""
    (folder / "good.ndjson").write_bytes(LINE)
    readable = ["new\nline.ndjson", "escape\x1b[31m.ndjson", "n" * 240 + ".ndjson", "-rf.ndjson", " .ndjson"]
    for name in readable:
        (folder / name).write_bytes(LINE)
    with open(os.fsencode(folder) + b"/caf\xe9.ndjson", "wb") as file:
        file.write(LINE)
    (folder / "loop").symlink_to("loop")
    (folder / "self").symlink_to(".")
    (folder / "link.ndjson").symlink_to("good.ndjson")
    (folder / "broken.ndjson").symlink_to("nothing")
    (folder / "device.ndjson").symlink_to("/dev/zero")
    (folder / "folder.ndjson").mkdir()
    os.mkfifo(folder / "pipe.ndjson")
    # The path of a socket has at most 107 bytes.
    with socket.socket(socket.AF_UNIX) as listener:
        before = Path.cwd()
        os.chdir(folder)
        try:
            listener.bind("socket.ndjson")
        finally:
            os.chdir(before)
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "readme -> x").symlink_to("good.ndjson")
    (folder / "pipe").touch()
    return OddFiles(readable=len(readable), not_utf_8=1, faulty=8)
