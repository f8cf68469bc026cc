"""A process that receives a landing zone with hostile files, which change while it reads them.

A task has the files (a name, a kind, content), the changes, the folder and the database.
"""

import gzip
import os
import random
import socket
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fhir_assets.fhir.lines import FileLimits
from fhir_assets.pipeline.landing.step import LandingStep
from fhir_assets.pipeline.receive.receiver import Receiver
from fhir_assets.privacy.encryption import NO_ENCRYPTION
from fhir_assets.storage.landing_zone import FolderZone
from fhir_assets.storage.store import open_store
from fhir_assets.warehouse.postgres.db.connections import Session, connect
from fhir_assets.windows import Granularity, WindowScheme
from fhir_assets_tests.support.limited_process import answer_tasks

LINE = b'{"resourceType":"Patient","id":"p","meta":{"lastUpdated":"2024-01-05T10:00:00Z"}}\n'
CANARY = LINE.replace(b'"p"', b'"canary"')
LIMITS = FileLimits(bytes=16 << 20, ratio=50, rejected=20)

CONTENTS: dict[str, Callable[[], bytes]] = {
    "good": lambda: LINE,
    "empty": lambda: b"",
    "braces": lambda: b"{}" * 20_000,
    "brackets": lambda: b"[" * 300_000,
    "objects": lambda: b'{"a":' * 200_000,
    "string": lambda: b'{"resourceType":"Patient","id":"' + b"x" * (4 << 20),
    "long line": lambda: b"x" * (4 << 20) + b"\n" + LINE,
    "bad lines": lambda: b"x\n" * 20_000,
    "zeros": lambda: bytes(1 << 20),
    "bomb": lambda: gzip.compress(bytes(1 << 26)) * 4,
    "bomb of lines": lambda: gzip.compress(LINE * 400_000),
    "bomb in a bomb": lambda: gzip.compress(gzip.compress(bytes(1 << 26))),
    "cut": lambda: gzip.compress(os.urandom(9999))[:5000],
    "name without end": lambda: b"\x1f\x8b\x08\x08\0\0\0\0\0\0" + b"n" * (4 << 20),
    "bundle": lambda: b'{"resourceType":"Bundle","type":"batch","entry":[' + b"{}," * 200_000 + b"{}]}",
    "rows": lambda: b"visit_id,patient_id\n" + b'"1,\n' * 20_000,
    "zip": lambda: b"PK\x03\x04" + os.urandom(99),
    "surrogates": lambda: b'{"resourceType":"Patient","id":"\\ud800"}\n' * 9,
}
KINDS = ("file", "file", "file", "link", "loop", "pipe", "socket", "folder", "folder loop", "sparse", "outside")
CHANGES = ("grow", "shrink", "vanish", "to a link", "to a pipe", "to a folder")


def put(folder: Path, outside: Path, name: bytes, kind: str, content: str) -> None:
    """Put an odd file into a folder, unless there is one of its name."""
    path = os.fsencode(folder) + b"/" + name
    with suppress(FileExistsError, IsADirectoryError, NotADirectoryError):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if kind == "link":
            os.symlink(outside / "canary.ndjson", path)
        elif kind == "loop":
            os.symlink(path, path)
        elif kind == "outside":
            os.symlink(outside, path)
        elif kind == "folder loop":
            os.symlink(folder, path)
        elif kind == "pipe":
            os.mkfifo(path)
        elif kind == "folder":
            os.mkdir(path)
        elif kind == "socket":
            with suppress(OSError), socket.socket(socket.AF_UNIX) as listener:
                listener.bind(path)
        else:
            with open(path, "xb") as file:
                file.write(CONTENTS[content]())
                if kind == "sparse":
                    file.truncate(1 << 42)


def _change(folder: Path, outside: Path, changes: list[str], stopped: threading.Event) -> None:
    """Change files until the reader is done."""
    chosen = random.Random(str(changes))
    while changes and not stopped.wait(0.001):
        names = [name for name in os.listdir(folder) if name != "good.ndjson"]
        if not names:
            return
        path, change = folder / chosen.choice(names), chosen.choice(changes)
        with suppress(OSError):
            if change in ("grow", "shrink") and path.is_file() and not path.is_symlink():
                size = path.stat().st_size
                os.truncate(path, size + 5 if change == "grow" else size // 2)
            elif change not in ("grow", "shrink"):
                path.unlink()
                if change == "to a link":
                    path.symlink_to(outside / "canary.ndjson")
                elif change == "to a pipe":
                    os.mkfifo(path)
                elif change == "to a folder":
                    path.symlink_to(outside)


def run(task: dict[str, Any]) -> None:
    """Receive a landing zone, and check that only what is in it was read."""

    def open_session() -> Session:
        return connect(task["database"], cipher=NO_ENCRYPTION)

    with tempfile.TemporaryDirectory() as root:
        folder, outside = Path(root, "zone"), Path(root, "outside")
        folder.mkdir()
        outside.mkdir()
        (outside / "canary.ndjson").write_bytes(CANARY)
        (folder / "good.ndjson").write_bytes(LINE)
        for name, kind, content in task["files"]:
            put(folder, outside, name.encode("utf-8", "surrogateescape"), kind, content)
        store = open_store(str(Path(root, "store")), NO_ENCRYPTION)
        scheme = WindowScheme(Granularity.DAILY, datetime(2020, 1, 1, tzinfo=UTC), True)
        receiver = Receiver(store, open_session, scheme, ["Patient"])
        step = LandingStep(FolderZone(folder), receiver, open_session, max_bytes=1 << 20, file_limits=LIMITS)
        stopped = threading.Event()
        changer = threading.Thread(target=_change, args=(folder, outside, task["changes"], stopped))
        step.scan(assume_complete=True)
        changer.start()
        try:
            step.run("run")
            step.scan(assume_complete=True)
        finally:
            stopped.set()
            changer.join()
        for key in store.partition_keys("raw", "Patient"):
            manifest = store.manifest("raw", "Patient", key)
            assert manifest is not None
            assert not any(b"canary" in line for batch in store.batches(manifest.parts) for line in batch)
        with open_session() as conn:
            zone = (str(folder),)
            good = conn.execute("SELECT status FROM ops.landing_files WHERE zone = %s AND name = 'good.ndjson'", zone)
            assert good.fetchall() == [("loaded",)]
            assert conn.execute("SELECT FROM ops.dead_letters WHERE resource::text LIKE '%canary%'").fetchall() == []


if __name__ == "__main__":
    answer_tasks(run)
