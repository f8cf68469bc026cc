"""Receives the files of the landing zone. Files with the same content are received once; files are not changed."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import BinaryIO
from uuid import uuid4

from fhir_assets.errors import FhirAssetsError, TransientError
from fhir_assets.fhir.files import formats
from fhir_assets.fhir.files.formats import FileItem, LandedContent
from fhir_assets.fhir.files.rejected_parts import limit_rejected
from fhir_assets.fhir.intake.visits_csv import Visit
from fhir_assets.fhir.json_size import MAX_VALUES
from fhir_assets.fhir.lines import DEFAULT_LIMITS, FileLimits, decompress
from fhir_assets.fhir.record import Deletion, Record, RejectedInput
from fhir_assets.local_files import BY_NAME, EMPTY_FOLDER
from fhir_assets.pipeline.landing import visit_resources
from fhir_assets.pipeline.receive.receiver import Received, Receiver
from fhir_assets.storage.landing_zone import DONE, ENCRYPTED, ContentHash, LandingFile, Zone, hash_content
from fhir_assets.warehouse.ops import landing_files, post_loader
from fhir_assets.warehouse.ops import visits as ledger
from fhir_assets.warehouse.ops.landing_files import ReadyFile
from fhir_assets.warehouse.postgres.db.connections import OpenSession, Session

CHANNEL = "landing"
"""The ingestion channel in the origins of landed resources."""

MAX_FILES_PER_RUN = 1000
"""The maximum number of files that one run receives."""

_CHUNK_BYTES = 1 << 20
_DELETIONS_PER_BATCH = 5000
_BATCH_BYTES = 64 << 20


class _FileChanged(FhirAssetsError):
    """A file changed while it was read, or was added to its batch too late. A later run receives it."""


@dataclass(frozen=True, slots=True)
class LandingResult:
    """The counts of a run."""

    files: int
    """Files that were waiting."""
    failed: int
    """Files that could not be read."""
    known_before: int
    """Files whose content was received before."""
    rows: int
    """Resources that were written to raw."""
    rejected: int
    """Entries that became dead letters."""
    deleted: int
    """Deletions that were recorded."""


@dataclass(slots=True)
class _Totals:
    """The counts of LandingResult while the run adds to them."""

    files: int = 0
    failed: int = 0
    known_before: int = 0
    rows: int = 0
    rejected: int = 0
    deleted: int = 0

    def to_result(self) -> LandingResult:
        return LandingResult(self.files, self.failed, self.known_before, self.rows, self.rejected, self.deleted)


class LandingStep:
    """Receives the complete files of a landing zone. ``scan`` finds the files, ``run`` receives them."""

    def __init__(
        self,
        zone: Zone,
        receiver: Receiver,
        connect: OpenSession,
        *,
        max_bytes: int,
        max_values: int = MAX_VALUES,
        file_limits: FileLimits = DEFAULT_LIMITS,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """Create the step. ``max_bytes`` and ``max_values`` limit one resource, ``file_limits`` one file."""
        self._zone = zone
        self._receiver = receiver
        self._connect = connect
        self._max_bytes = max_bytes
        self._max_values = max_values
        self._file_limits = file_limits
        self._hashed_bytes = file_limits.bytes + _CHUNK_BYTES  # of a larger file, the rest is not read
        self._now = now

    def scan(self, *, assume_complete: bool = False) -> int:
        """Record the files of the zone in the database. Return the number of files that are ready to be received.

        A file is complete if it did not change since the last scan or has a ``.done`` marker file. With
        ``assume_complete`` every file counts as complete. Posts that are reserved for the post loader are not counted.
        Raises StoreError or DatabaseUnavailable.
        """
        now = self._now()
        with self._connect() as conn, conn.transaction():
            landing_files.record_listing(conn, self._zone.url, self._list_files(assume_complete))
            reserved_since = post_loader.find_reserved_since(conn, now)
            return landing_files.count_ready(conn, self._zone.url, now=now, reserved_since=reserved_since)

    def run(self, run_id: str, *, on_received: Callable[[Received], None] = lambda _: None) -> LandingResult:
        """Receive the waiting files: oldest first, then the visit files in batches.

        ``on_received`` is called for each file or batch that was not received before. A file that cannot be read is
        recorded as failed, and the others are received.

        Raises DatabaseUnavailable and other transient errors.
        """
        self._receiver.check()
        with self._connect() as conn:
            waiting = landing_files.find_ready(conn, self._zone.url, now=self._now(), limit=MAX_FILES_PER_RUN)
        return self._receive_files(waiting, run_id, on_received)

    def run_posted(self, run_id: str) -> LandingResult:
        """Receive the posted files that wait, and no others. Raises as ``run``."""
        self._receiver.check()
        with self._connect() as conn:
            waiting = landing_files.find_posted(conn, self._zone.url, limit=MAX_FILES_PER_RUN)
        return self._receive_files(waiting, run_id, lambda _: None)

    def _receive_files(
        self, waiting: Sequence[ReadyFile], run_id: str, on_received: Callable[[Received], None]
    ) -> LandingResult:
        totals = _Totals(len(waiting))
        for file in waiting:
            if not _is_visits_file(file):
                with self._record_failures(file, run_id, totals):
                    self._notify(self._receive(file, run_id, totals), on_received)
        for batch, files in self._assign_batches([file for file in waiting if _is_visits_file(file)]):
            if received := self._receive_batch(batch, files, run_id, totals):
                self._notify(received, on_received)
        return totals.to_result()

    def _notify(self, received: Received, on_received: Callable[[Received], None]) -> None:
        if not received.already_received:
            on_received(received)

    @contextmanager
    def _record_failures(self, file: ReadyFile, run_id: str, totals: _Totals) -> Iterator[None]:
        """Record a permanent error as the failure of the file. Transient errors are raised."""
        try:
            yield
        except TransientError:
            raise
        except FhirAssetsError as error:
            totals.failed += 1
            with self._connect() as conn, conn.transaction():
                landing_files.record_failure(conn, self._zone.url, file, run_id=run_id, error=str(error))

    def _list_files(self, assume_complete: bool) -> Iterator[tuple[LandingFile, bool | None]]:
        files: Iterable[LandingFile] = self._zone.files()
        done: set[str] = set()
        if not (assume_complete or self._zone.atomic):
            files = list(files)
            done = {file.name for file in files if file.name.endswith(DONE)}
        for file in files:
            has_suffix = _strip_suffix(file.name).lower().endswith(formats.SUFFIXES)
            if file.fault and (has_suffix or file.fault not in BY_NAME):
                yield file, False
            elif file.fault == EMPTY_FOLDER:
                continue
            elif has_suffix:
                yield file, assume_complete or self._zone.atomic or _is_done(file.name, done)
            elif not file.name.endswith(DONE):
                yield file, None

    def _receive(self, file: ReadyFile, run_id: str, totals: _Totals) -> Received:
        deleted = 0
        sha256 = hash_content(self._zone, file.name, self._hashed_bytes)
        origin = f"{CHANNEL}:{sha256}"

        def resources() -> Iterator[Record | RejectedInput]:
            nonlocal deleted
            deletions: list[Deletion] = []
            for item in self._read(file, sha256):
                if isinstance(item, Deletion):
                    deletions.append(item)
                    if len(deletions) >= _DELETIONS_PER_BATCH:
                        deleted += self._record_deletions(deletions, origin)
                        deletions = []
                elif not isinstance(item, Visit):
                    yield item
            deleted += self._record_deletions(deletions, origin)

        received = self._receiver.receive(resources(), origin, run_id=run_id)
        counts = {"rows": received.rows, "rejected": received.rejected, "deleted": deleted}
        self._record_loaded(file, sha256, counts, received.already_received, run_id, totals, received.skipped)
        return received

    def _assign_batches(self, files: Sequence[ReadyFile]) -> Iterator[tuple[str, list[ReadyFile]]]:
        """Assign visit files to batches, and yield each batch with its files. An interrupted batch is yielded again."""
        interrupted: dict[str, list[ReadyFile]] = {}
        new_batches: list[list[ReadyFile]] = []
        size = 0
        for file in files:
            if file.batch is not None:
                interrupted.setdefault(file.batch, []).append(file)
                continue
            size += file.size
            if not new_batches or size > _BATCH_BYTES:
                new_batches.append([])
                size = file.size
            new_batches[-1].append(file)
        yield from interrupted.items()
        for group in new_batches:
            batch = uuid4().hex
            with self._connect() as conn, conn.transaction():
                joined = landing_files.assign_batch(conn, self._zone.url, group, batch)
            if joined:
                yield batch, joined

    def _receive_batch(self, batch: str, files: Sequence[ReadyFile], run_id: str, totals: _Totals) -> Received | None:
        """Receive many small files as one origin, so that manifests are written once for all of them."""
        hashes: dict[str, str] = {}
        for file in files:
            with self._record_failures(file, run_id, totals):
                hashes[file.name] = hash_content(self._zone, file.name, self._hashed_bytes)
        remaining = [file for file in files if file.name in hashes]
        received_as = f"{CHANNEL}:batch-{batch}"
        current: ReadyFile | None = None

        def resources(conn: Session) -> Iterator[Record | RejectedInput]:
            nonlocal current
            for file in remaining:
                current = file
                sha256 = hashes[file.name]
                items = self._read(file, sha256)
                types = self._receiver.resource_types
                yield from visit_resources.read_new_resources(conn, items, f"{CHANNEL}:{sha256}", received_as, types)
            current = None

        received = None
        while remaining and received is None:
            try:
                received = self._receiver.receive_in_transaction(
                    resources, received_as, posted=all(file.posted for file in remaining), run_id=run_id
                )
            except FhirAssetsError as error:
                if current is None or isinstance(error, TransientError):
                    raise
                # Nothing of the batch is in raw: receive the other files without the failed one.
                remaining = [file for file in remaining if file is not current]
                with self._record_failures(current, run_id, totals):
                    raise
        with self._connect() as conn:
            known = ledger.find_files(conn, [f"{CHANNEL}:{hashes[file.name]}" for file in remaining])
        received_hashes = set[str]()
        for file in remaining:
            with self._record_failures(file, run_id, totals):
                sha256 = hashes[file.name]
                if f"{CHANNEL}:{sha256}" not in known:
                    raise _FileChanged(
                        "the file joined its batch after the batch was received: a later run receives it"
                    )
                known_origin, file_counts = known[f"{CHANNEL}:{sha256}"]
                known_before = known_origin != received_as or sha256 in received_hashes
                received_hashes.add(sha256)
                counts = {"rows": file_counts.rows, "rejected": file_counts.rejected, "deleted": 0}
                self._record_loaded(file, sha256, counts, known_before, run_id, totals, {})
        return received

    def _read(self, file: ReadyFile, sha256: str) -> Iterator[FileItem]:
        """Yield the items of a file. Raises StoreError, or _FileChanged if its content does not have the hash."""
        with self._zone.open(file.name) as stream:
            reader = _HashingReader(stream, self._hashed_bytes)
            now = self._now()
            content = LandedContent(
                sha256[:12],
                decompress(reader, self._file_limits),  # type: ignore[arg-type]
                min(file.written, now),
                self._max_bytes,
                received=now,
                reopen=lambda: self._read_again(file),
                max_values=self._max_values,
            )
            yield from limit_rejected(formats.read(_strip_suffix(file.name), content), self._file_limits)
            if reader.read_rest() != sha256:
                raise _FileChanged("the file changed while it was read: it is received when it is complete")

    def _read_again(self, file: ReadyFile) -> Iterator[bytes]:
        with self._zone.open(file.name) as stream:
            yield from decompress(stream, self._file_limits)

    def _record_loaded(
        self,
        file: ReadyFile,
        sha256: str,
        counts: Mapping[str, int],
        known_before: bool,
        run_id: str,
        totals: _Totals,
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
                known_before=known_before,
            )
        totals.known_before += known_before
        if not known_before:
            totals.rows += counts["rows"]
            totals.rejected += counts["rejected"]
            totals.deleted += counts["deleted"]

    def _record_deletions(self, deletions: list[Deletion], origin: str) -> int:
        if deletions:
            self._receiver.deletion_log.record(deletions, run_id=origin, actor=CHANNEL, origin=origin)
        return len(deletions)


class _HashingReader:
    """A stream that computes the ContentHash of the bytes that are read from it."""

    def __init__(self, stream: BinaryIO, limit: int) -> None:
        self._stream = stream
        self._hash = ContentHash(limit)
        self._goes_on = True

    def read(self, count: int) -> bytes:
        """Read up to ``count`` bytes."""
        chunk = self._stream.read(count)
        self._goes_on = self._hash.update(chunk)
        return chunk

    def read_rest(self) -> str:
        """Read the rest of the stream, up to the limit, and return the hash in hexadecimal."""
        while self._goes_on:
            self.read(_CHUNK_BYTES)
        return self._hash.hexdigest()


def _strip_suffix(name: str) -> str:
    """Return the name of a file without the suffix of encrypted files; its end is that of the file's format."""
    return name.removesuffix(ENCRYPTED)


def _is_visits_file(file: ReadyFile) -> bool:
    return formats.is_visits_file(_strip_suffix(file.name))


def _is_done(name: str, done: set[str]) -> bool:
    """Return whether the marker ``x.ndjson.done`` or ``x.done`` of the file ``x.ndjson`` exists."""
    stem = name
    while True:
        if stem + DONE in done:
            return True
        shorter = stem.rpartition(".")[0]
        if not shorter or "/" in stem[len(shorter) :]:
            return False
        stem = shorter
