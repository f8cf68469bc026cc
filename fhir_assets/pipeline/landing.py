"""The landing zone: files that others put down, each content received once, nothing of theirs touched."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import BinaryIO

from fhir_assets.errors import FhirAssetsError, TransientError
from fhir_assets.fhir import landing_formats
from fhir_assets.fhir.intake.visits_csv import Visit
from fhir_assets.fhir.landing_formats import LandedContent
from fhir_assets.fhir.lines import unpacked
from fhir_assets.fhir.record import Deletion, Record, Rejected
from fhir_assets.pipeline import visits
from fhir_assets.pipeline.receive import Received, Receiver
from fhir_assets.store.zone import DONE, FoundFile, Zone
from fhir_assets.warehouse import landing_files
from fhir_assets.warehouse.database import Connection
from fhir_assets.warehouse.landing_files import ReadyFile

DOOR = "landing"
FILES_AT_ONCE = 1000
"""How many files one run takes."""

_CHUNK = 1 << 20
_DELETIONS = 5000


class _Changed(FhirAssetsError):
    """A file changed while it was read."""


@dataclass(slots=True)
class Landed:
    """What a run made of the files that waited."""

    files: int = 0
    failed: int = 0
    known_before: int = 0
    rows: int = 0
    rejected: int = 0
    deleted: int = 0


class Landing:
    """Looks at a zone, and receives what is complete in it."""

    def __init__(
        self,
        zone: Zone,
        receiver: Receiver,
        connect: Callable[[], Connection],
        *,
        max_bytes: int,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """``max_bytes``: the size of one resource."""
        self._zone = zone
        self._receiver = receiver
        self._connect = connect
        self._max_bytes = max_bytes
        self._now = now

    def look(self, *, complete: bool = False) -> int:
        """Note what lies in the zone; returns how many files wait. With ``complete`` all are taken as complete, else
        those that did not change since the last look, or have a ``.done`` beside.
        """
        with closing(self._connect()) as conn, conn.transaction():
            landing_files.see(conn, self._zone.url, self._files(complete))
            return len(landing_files.ready(conn, self._zone.url, now=self._now(), limit=FILES_AT_ONCE))

    def receive(self, run_id: str, *, listen: Callable[[Received], None] = lambda _: None) -> Landed:
        """Receive the files that wait, the oldest first. One that cannot be read is noted, and the others go on.

        Raises DatabaseUnavailable.
        """
        landed = Landed()
        with closing(self._connect()) as conn:
            waiting = landing_files.ready(conn, self._zone.url, now=self._now(), limit=FILES_AT_ONCE)
        for file in waiting:
            landed.files += 1
            try:
                received = self._receive(file, run_id, landed)
            except FhirAssetsError as error:
                if isinstance(error, TransientError):
                    raise
                landed.failed += 1
                with closing(self._connect()) as conn, conn.transaction():
                    landing_files.failed(conn, self._zone.url, file, run_id=run_id, error=str(error))
                continue
            if not received.again:
                listen(received)
        return landed

    def _files(self, complete: bool) -> Iterator[tuple[FoundFile, bool]]:
        found = list(self._zone.files())
        done = {file.name for file in found if file.name.endswith(DONE)}
        for file in found:
            if file.name.lower().endswith(landing_formats.SUFFIXES):
                yield file, complete or self._zone.whole or _is_done(file.name, done)

    def _receive(self, file: ReadyFile, run_id: str, landed: Landed) -> Received:
        with self._zone.open(file.name) as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]
        buried = 0

        def content_of() -> Iterator[Record | Rejected | Visit]:
            nonlocal buried
            deletions: list[Deletion] = []
            with self._zone.open(file.name) as stream:
                hashed = _Hashed(stream)
                arrived = min(file.written, self._now())
                content = LandedContent(sha256[:12], unpacked(hashed), arrived, self._max_bytes)  # type: ignore[arg-type]
                for item in landing_formats.read(file.name, content):
                    if isinstance(item, Deletion):
                        deletions.append(item)
                        if len(deletions) >= _DELETIONS:
                            buried += self._bury(deletions, origin)
                            deletions = []
                    else:
                        yield item
                if hashed.whole() != sha256:
                    raise _Changed("the file changed while it was read: it is taken when it is complete")
            buried += self._bury(deletions, origin)

        origin = f"{DOOR}:{sha256}"
        received = self._receiver.receive_within(
            lambda conn: visits.resources_of(conn, content_of(), origin, self._receiver.resource_types), origin
        )
        with closing(self._connect()) as conn, conn.transaction():
            landing_files.loaded(
                conn,
                self._zone.url,
                file,
                run_id=run_id,
                sha256=sha256,
                counts={"rows": received.rows, "rejected": received.rejected, "deleted": buried},
                skipped=received.skipped,
                known_before=received.again,
            )
        landed.known_before += received.again
        if not received.again:
            landed.rows += received.rows
            landed.rejected += received.rejected
            landed.deleted += buried
        return received

    def _bury(self, deletions: list[Deletion], origin: str) -> int:
        if deletions:
            self._receiver.tombstones.bury(deletions, run_id=origin, actor=DOOR)
        return len(deletions)


class _Hashed:
    """A stream that knows the hash of what was read of it."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._hash = hashlib.sha256()

    def read(self, count: int) -> bytes:
        piece = self._stream.read(count)
        self._hash.update(piece)
        return piece

    def whole(self) -> str:
        """The hash of all of it."""
        while self.read(_CHUNK):
            pass
        return self._hash.hexdigest()


def _is_done(name: str, done: set[str]) -> bool:
    """``x.ndjson.done`` or ``x.done`` beside ``x.ndjson``."""
    stem = name
    while True:
        if stem + DONE in done:
            return True
        shorter = stem.rpartition(".")[0]
        if not shorter or "/" in stem[len(shorter) :]:
            return False
        stem = shorter
