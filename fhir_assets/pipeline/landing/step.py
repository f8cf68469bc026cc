"""The landing zone: files that others put down, each content received once, nothing of theirs touched."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import BinaryIO
from uuid import uuid4

from fhir_assets.errors import FhirAssetsError, StoreError, TransientError
from fhir_assets.fhir.files import formats
from fhir_assets.fhir.files.formats import FileItem, LandedContent
from fhir_assets.fhir.intake.visits_csv import Visit
from fhir_assets.fhir.lines import decompress
from fhir_assets.fhir.record import Deletion, Record, RejectedInput
from fhir_assets.pipeline.landing import visit_resources
from fhir_assets.pipeline.receive.receiver import Received, Receiver
from fhir_assets.storage.landing_zone import DONE, FoundFile, Zone
from fhir_assets.warehouse.ops import landing_files
from fhir_assets.warehouse.ops import visits as ledger
from fhir_assets.warehouse.ops.landing_files import ReadyFile
from fhir_assets.warehouse.postgres.db.connections import OpenSession, Session

CHANNEL = "landing"
FILES_AT_ONCE = 1000
"""How many files one run takes."""

_CHUNK = 1 << 20
_DELETIONS = 5000
_BATCH_BYTES = 64 << 20


class _Changed(FhirAssetsError):
    """A file changed while it was read."""


@dataclass(slots=True)
class LandingResult:
    """What a run made of the files that waited."""

    files: int = 0
    failed: int = 0
    known_before: int = 0
    rows: int = 0
    rejected: int = 0
    deleted: int = 0


class LandingStep:
    """Looks at a zone, and receives what is complete in it."""

    def __init__(
        self,
        zone: Zone,
        receiver: Receiver,
        connect: OpenSession,
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

    def scan(self, *, assume_complete: bool = False) -> int:
        """Note what lies in the zone; returns how many files wait. With ``complete`` all are taken as complete, else
        those that did not change since the last look, or have a ``.done`` beside.
        """
        with self._connect() as conn, conn.transaction():
            landing_files.record_listing(conn, self._zone.url, self._files(assume_complete))
            return len(landing_files.find_ready(conn, self._zone.url, now=self._now(), limit=FILES_AT_ONCE))

    def run(self, run_id: str, *, on_received: Callable[[Received], None] = lambda _: None) -> LandingResult:
        """Receive the files that wait, the oldest first, those of visits together. One that cannot be read is noted,
        and the others go on.

        Raises DatabaseUnavailable.
        """
        landed = LandingResult()
        with self._connect() as conn:
            waiting = landing_files.find_ready(conn, self._zone.url, now=self._now(), limit=FILES_AT_ONCE)
        landed.files = len(waiting)
        for file in waiting:
            if not formats.is_visits_file(file.name):
                with self._noting(file, run_id, landed):
                    self._tell(self._receive(file, run_id, landed), on_received)
        for batch, files in self._batches([file for file in waiting if formats.is_visits_file(file.name)]):
            if received := self._receive_batch(batch, files, run_id, landed):
                self._tell(received, on_received)
        return landed

    def _tell(self, received: Received, on_received: Callable[[Received], None]) -> None:
        if not received.already_received:
            on_received(received)

    @contextmanager
    def _noting(self, file: ReadyFile, run_id: str, landed: LandingResult) -> Iterator[None]:
        """What goes wrong with a file is noted; what may go right the next time is raised."""
        try:
            yield
        except TransientError:
            raise
        except FhirAssetsError as error:
            landed.failed += 1
            with self._connect() as conn, conn.transaction():
                landing_files.record_failure(conn, self._zone.url, file, run_id=run_id, error=str(error))

    def _files(self, complete: bool) -> Iterator[tuple[FoundFile, bool]]:
        found = list(self._zone.files())
        done = {file.name for file in found if file.name.endswith(DONE)}
        for file in found:
            if file.name.lower().endswith(formats.SUFFIXES):
                yield file, complete or self._zone.whole or _is_done(file.name, done)

    def _receive(self, file: ReadyFile, run_id: str, landed: LandingResult) -> Received:
        buried = 0
        sha256 = self._sha256(file)
        origin = f"{CHANNEL}:{sha256}"

        def resources() -> Iterator[Record | RejectedInput]:
            nonlocal buried
            deletions: list[Deletion] = []
            for item in self._read(file, sha256):
                if isinstance(item, Deletion):
                    deletions.append(item)
                    if len(deletions) >= _DELETIONS:
                        buried += self._bury(deletions, origin)
                        deletions = []
                elif not isinstance(item, Visit):
                    yield item
            buried += self._bury(deletions, origin)

        received = self._receiver.receive(resources(), origin)
        counts = {"rows": received.rows, "rejected": received.rejected, "deleted": buried}
        self._settle(file, sha256, counts, received.already_received, run_id, landed, received.skipped)
        return received

    def _batches(self, files: Sequence[ReadyFile]) -> Iterator[tuple[str, list[ReadyFile]]]:
        """Files of visits that are received together: those of a batch that broke off as that batch, others anew."""
        broken_off: dict[str, list[ReadyFile]] = {}
        fresh: list[list[ReadyFile]] = []
        size = 0
        for file in files:
            if file.batch is not None:
                broken_off.setdefault(file.batch, []).append(file)
                continue
            size += file.size
            if not fresh or size > _BATCH_BYTES:
                fresh.append([])
                size = file.size
            fresh[-1].append(file)
        yield from broken_off.items()
        for together in fresh:
            batch = uuid4().hex
            with self._connect() as conn, conn.transaction():
                joined = landing_files.assign_batch(conn, self._zone.url, together, batch)
            if joined:
                yield batch, joined

    def _receive_batch(
        self, batch: str, files: Sequence[ReadyFile], run_id: str, landed: LandingResult
    ) -> Received | None:
        """Many small files as one origin: a manifest is written once for all of them, not once for each."""
        whole: dict[str, str] = {}
        for file in files:
            with self._noting(file, run_id, landed):
                whole[file.name] = self._sha256(file)
        rest = [file for file in files if file.name in whole]
        received_as = f"{CHANNEL}:batch-{batch}"
        at: ReadyFile | None = None

        def resources(conn: Session) -> Iterator[Record | RejectedInput]:
            nonlocal at
            for file in rest:
                at = file
                sha256 = whole[file.name]
                items = self._read(file, sha256)
                types = self._receiver.resource_types
                yield from visit_resources.read_new_resources(conn, items, f"{CHANNEL}:{sha256}", received_as, types)
            at = None

        received = None
        while rest and received is None:
            try:
                received = self._receiver.receive_in_transaction(resources, received_as)
            except FhirAssetsError as error:
                if at is None or isinstance(error, TransientError):
                    raise
                # Of one that broke nothing is in raw, nor of the others: they come again without it.
                rest = [file for file in rest if file is not at]
                with self._noting(at, run_id, landed):
                    raise
        with self._connect() as conn:
            known = ledger.find_files(conn, [f"{CHANNEL}:{whole[file.name]}" for file in rest])
        taken = set[str]()
        for file in rest:
            with self._noting(file, run_id, landed):
                sha256 = whole[file.name]
                if f"{CHANNEL}:{sha256}" not in known:
                    raise _Changed("it came into its batch when that was received already: it comes again by itself")
                came_as, brought = known[f"{CHANNEL}:{sha256}"]
                again = came_as != received_as or sha256 in taken
                taken.add(sha256)
                counts = {"rows": brought.rows, "rejected": brought.rejected, "deleted": 0}
                self._settle(file, sha256, counts, again, run_id, landed, {})
        return received

    def _sha256(self, file: ReadyFile) -> str:
        with self._zone.open(file.name) as stream:
            try:
                return hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]
            except EOFError:
                raise StoreError("a sealed file of the landing zone was cut off: post its content again") from None

    def _read(self, file: ReadyFile, sha256: str) -> Iterator[FileItem]:
        """What a file holds. Raises StoreError, and _Changed if it is not what its hash was made of."""
        with self._zone.open(file.name) as stream:
            hashed = _Hashed(stream)
            arrived = min(file.written, self._now())
            content = LandedContent(sha256[:12], decompress(hashed), arrived, self._max_bytes)  # type: ignore[arg-type]
            yield from formats.read(file.name, content)
            if hashed.whole() != sha256:
                raise _Changed("the file changed while it was read: it is taken when it is complete")

    def _settle(
        self,
        file: ReadyFile,
        sha256: str,
        counts: Mapping[str, int],
        again: bool,
        run_id: str,
        landed: LandingResult,
        skipped: Mapping[str, int],
    ) -> None:
        with self._connect() as conn, conn.transaction():
            landing_files.record_loaded(
                conn,
                self._zone.url,
                file,
                run_id=run_id,
                sha256=sha256,
                counts=counts,
                skipped=skipped,
                known_before=again,
            )
        landed.known_before += again
        if not again:
            landed.rows += counts["rows"]
            landed.rejected += counts["rejected"]
            landed.deleted += counts["deleted"]

    def _bury(self, deletions: list[Deletion], origin: str) -> int:
        if deletions:
            self._receiver.deletion_log.record(deletions, run_id=origin, actor=CHANNEL)
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
