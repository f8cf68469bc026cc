"""The files of an export into the store: several at once, in groups, each of which is kept or fetched again whole."""

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from threading import Event, Lock

from fhir_assets.fhir.bulk.client import BulkClient
from fhir_assets.fhir.bulk.downloads import Downloads
from fhir_assets.fhir.bulk.manifest import ExportFile, ExportManifest
from fhir_assets.fhir.record import MalformedResource, parse_instant, read_header
from fhir_assets.storage.manifest import Part
from fhir_assets.storage.part_writer import PartWriter
from fhir_assets.storage.store import Store

LAYER = "bulk"
GROUP_RESOURCES = 200_000
GROUP_FILES = 2_000
"""Files are stored in groups of about so many resources or files: at most one group is fetched again after a kill."""

SAY_EVERY = 5.0
"""Seconds between two lines about a download."""

BATCH_RESOURCES = 500
"""Small files are downloaded by one thread until they hold so many."""


class Download:
    """Downloads what an export's manifest lists; ``say`` hears now and then how far it is."""

    def __init__(
        self,
        client: BulkClient,
        store: Store,
        export_id: str,
        manifest: ExportManifest,
        *,
        connections: int,
        on_progress: Callable[[str], None],
    ) -> None:
        self._client = client
        self._store = store
        self._export_id = export_id
        self._manifest = manifest
        self._connections = connections
        self._on_progress = on_progress

    def groups(self, done: Collection[int]) -> Iterator[tuple[Mapping[str, Sequence[Part]], Sequence[int]]]:
        """Fetch the files but those that are ``done``, a group after the other: the parts in the store that hold it, by
        resource type, and which of the manifest's files these are.

        Raises ServerUnavailable, ServerRefused, NotFhir or StoreError; of the group under way nothing is kept then.
        """
        todo = [(n, file) for n, file in enumerate(self._manifest.output) if n not in done]
        progress = _Progress(self._on_progress, len(self._manifest.output), len(done))
        with (
            self._client.open_downloads() as downloads,
            ThreadPoolExecutor(self._connections, thread_name_prefix="download") as pool,
        ):
            for group in _groups(todo):
                with PartWriter(self._store, LAYER) as writer:
                    fetch = _Fetch(self._client, downloads, writer, progress, self._export_id, self._manifest)
                    jobs = [pool.submit(fetch, files) for files in _batches([file for _, file in group])]
                    try:
                        progress.wait(jobs)
                    finally:
                        # Whether one failed or somebody cancels the run: the writer is given up, nobody writes on.
                        if not all(job.done() for job in jobs):
                            fetch.stop.set()
                            for job in jobs:
                                job.cancel()
                            wait(jobs)
                    for job in jobs:
                        if not job.cancelled():
                            job.result()
                    stored = {name: parts for (name, _), parts in writer.finish().items()}
                yield stored, [n for n, _ in group]
        progress.tell()


@dataclass(slots=True)
class _Progress:
    """How far a download is. Several threads tell it what came; the one that waits for them says it, now and then."""

    on_progress: Callable[[str], None]
    files: int
    done: int
    resources: int = 0
    size: int = 0
    lock: Lock = field(default_factory=Lock)
    said: float = field(default_factory=time.monotonic)

    def came(self, lines: Sequence[bytes], *, files: int = 0) -> None:
        """So many lines, and so many files that are whole now."""
        with self.lock:
            self.resources += len(lines)
            self.size += sum(map(len, lines)) + len(lines)
            self.done += files

    def wait(self, jobs: Sequence[Future[None]]) -> None:
        """Wait until all are done, or one failed; meanwhile say every few seconds where it stands."""
        rest = set(jobs)
        while rest:
            done, rest = wait(rest, timeout=SAY_EVERY, return_when=FIRST_EXCEPTION)
            if any(job.exception() for job in done):
                return
            if time.monotonic() - self.said >= SAY_EVERY:
                self.tell()

    def tell(self) -> None:
        """Say where it stands."""
        self.said = time.monotonic()
        mib = self.size / 2**20
        self.on_progress(
            f"downloaded {self.done:,} of {self.files:,} files, {self.resources:,} resources, {mib:,.1f} MiB"
        )


@dataclass(slots=True)
class _Fetch:
    """Writes files of an export into the store, several at once, until it is told to stop."""

    client: BulkClient
    downloads: Downloads
    writer: PartWriter
    progress: _Progress
    export_id: str
    manifest: ExportManifest
    lock: Lock = field(default_factory=Lock)
    stop: Event = field(default_factory=Event)

    def __call__(self, files: Sequence[ExportFile]) -> None:
        with self.downloads.share_slot():
            for file in files:
                self._fetch(file)

    def _fetch(self, file: ExportFile) -> None:
        arrived = arrival(self.manifest.transaction_time)
        for lines in self.client.read_lines(self.downloads, file, needs_token=self.manifest.needs_token):
            dated = [(line, _moment(line) or arrived) for line in lines]
            with self.lock:
                if self.stop.is_set():
                    return
                for line, moment in dated:
                    self.writer.add(file.resource_type, self.export_id, line, moment)
            self.progress.came(lines)
        self.progress.came((), files=1)


def arrival(transaction_time: datetime | None) -> datetime:
    """When a resource without lastUpdated counts as updated: in the last moment that the export covers."""
    assert transaction_time is not None
    return transaction_time - timedelta(milliseconds=1)


def _groups(files: Iterable[tuple[int, ExportFile]]) -> Iterator[list[tuple[int, ExportFile]]]:
    group: list[tuple[int, ExportFile]] = []
    resources = 0
    for n, file in files:
        group.append((n, file))
        resources += file.count or GROUP_RESOURCES // 10
        if resources >= GROUP_RESOURCES or len(group) >= GROUP_FILES:
            yield group
            group, resources = [], 0
    if group:
        yield group


def _batches(files: Sequence[ExportFile]) -> Iterator[list[ExportFile]]:
    """Files for one thread after the other: a large one, or some small ones."""
    batch: list[ExportFile] = []
    resources = 0
    for file in files:
        batch.append(file)
        resources += file.count or BATCH_RESOURCES
        if resources >= BATCH_RESOURCES:
            yield batch
            batch, resources = [], 0
    if batch:
        yield batch


def _moment(line: bytes) -> datetime | None:
    with suppress(MalformedResource):
        meta = read_header(line).meta
        return parse_instant(meta.lastUpdated) if meta else None
    return None
