"""Download the files of a bulk export into the store: in parallel, and in groups that are each stored atomically."""

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from threading import Event, Lock

from fhir_assets.fhir.bulk.client import BulkClient
from fhir_assets.fhir.bulk.downloads import Downloads
from fhir_assets.fhir.bulk.file_lines import FileChanged
from fhir_assets.fhir.bulk.manifest import ExportFile, ExportManifest
from fhir_assets.notices import Notices
from fhir_assets.pipeline.fetch.bulk_lines import route_line, unpack_line
from fhir_assets.pipeline.fetch.bulk_outcomes import check_count
from fhir_assets.storage.manifest import Part
from fhir_assets.storage.part_writer import PartWriter
from fhir_assets.storage.store import Store
from fhir_assets.warehouse.ops.bulk_exports import BulkExport

LAYER = "bulk"
GROUP_RESOURCES = 200_000
"""A group ends at about this many resources. After a kill, at most one group is downloaded again."""

GROUP_FILES = 2_000
"""A group ends at this many files."""

PROGRESS_INTERVAL = 5.0
"""The seconds between two progress reports of a download."""

_GROUP_ATTEMPTS = 3
"""How often a group is downloaded. It is repeated if a file has its lines in another order after an interruption."""

BATCH_RESOURCES = 500
"""One thread downloads small files one after another, up to this many resources in total."""


class Download:
    """Downloads the output files of a bulk export manifest into layer ``bulk`` of the store.

    ``on_progress`` receives a line of text every few seconds.
    """

    def __init__(
        self,
        client: BulkClient,
        store: Store,
        export: BulkExport,
        manifest: ExportManifest,
        *,
        connections: int,
        notices: Notices,
        on_progress: Callable[[str], None],
    ) -> None:
        self._client = client
        self._store = store
        self._export = export
        self._notices = notices
        self._manifest = manifest
        self._connections = connections
        self._on_progress = on_progress

    def download_groups(self, done: Collection[int]) -> Iterator[tuple[Mapping[str, Sequence[Part]], Sequence[int]]]:
        """Download the files whose indexes are not in ``done``.

        Yield, for each group, its parts by resource type and the indexes of its files in the manifest. Raises
        ServerUnavailable, ServerRefused, NotFhir or StoreError; nothing of the current group is stored then.
        """
        pending = [(index, file) for index, file in enumerate(self._manifest.output) if index not in done]
        if unwanted := {file.resource_type for _, file in pending}.difference(self._export.resource_types):
            pending = [(index, file) for index, file in pending if file.resource_type not in unwanted]
            self._notices.add(
                "warning",
                "export-types",
                f"the server exports types that were not requested; they are not loaded: {', '.join(sorted(unwanted))}",
            )
        progress = _Progress(self._on_progress, len(self._manifest.output), len(done))
        with (
            self._client.open_downloads() as downloads,
            ThreadPoolExecutor(self._connections, thread_name_prefix="download") as pool,
        ):
            for group in _split_into_groups(pending):
                files = [file for _, file in group]
                for attempt in range(_GROUP_ATTEMPTS):
                    before = progress.position()
                    try:
                        stored = self._download_group(files, downloads, pool, progress)
                        break
                    except FileChanged:
                        # Nothing of the group is stored: all of its files are read again, so that no line is stored
                        # twice.
                        if attempt + 1 == _GROUP_ATTEMPTS:
                            raise
                        progress.reset(before)
                yield stored, [index for index, _ in group]
        progress.report()

    def _download_group(
        self, files: Sequence[ExportFile], downloads: Downloads, pool: ThreadPoolExecutor, progress: "_Progress"
    ) -> dict[str, Sequence[Part]]:
        """Download the files and store them. Return the parts by resource type."""
        with PartWriter(self._store, LAYER) as writer:
            download = _FileDownloader(
                self._client, downloads, writer, progress, self._export, self._manifest.needs_token
            )
            jobs = [pool.submit(download, batch) for batch in _split_into_batches(files)]
            try:
                progress.wait(jobs)
            finally:
                # After a failure or a cancellation the writer is discarded, so that no thread may write to it.
                if not all(job.done() for job in jobs):
                    download.stop.set()
                    for job in jobs:
                        job.cancel()
                    wait(jobs)
            for job in jobs:
                if not job.cancelled():
                    job.result()
            for file, count in download.counts:
                check_count(file, count, self._notices)
            return {name: parts for (name, _), parts in writer.finish().items()}


@dataclass(slots=True)
class _Progress:
    """The progress of a download: download threads add to it, the waiting thread reports it."""

    on_progress: Callable[[str], None]
    files: int
    done: int
    resources: int = 0
    size: int = 0
    lock: Lock = field(default_factory=Lock)
    reported_at: float = field(default_factory=time.monotonic)

    def add(self, lines: Sequence[bytes], *, files: int = 0) -> None:
        """Count downloaded lines and completed files."""
        with self.lock:
            self.resources += len(lines)
            self.size += sum(map(len, lines)) + len(lines)
            self.done += files

    def position(self) -> tuple[int, int, int]:
        """Return the counts, which ``reset`` can restore."""
        with self.lock:
            return self.done, self.resources, self.size

    def reset(self, position: tuple[int, int, int]) -> None:
        """Restore earlier counts, because the downloads since then are discarded."""
        with self.lock:
            self.done, self.resources, self.size = position

    def wait(self, jobs: Sequence[Future[None]]) -> None:
        """Wait until all jobs are done or one failed, and report the progress every few seconds."""
        pending = set(jobs)
        while pending:
            done, pending = wait(pending, timeout=PROGRESS_INTERVAL, return_when=FIRST_EXCEPTION)
            if any(job.exception() for job in done):
                return
            if time.monotonic() - self.reported_at >= PROGRESS_INTERVAL:
                self.report()

    def report(self) -> None:
        """Report the progress now."""
        self.reported_at = time.monotonic()
        mib = self.size / 2**20
        self.on_progress(
            f"downloaded {self.done:,} of {self.files:,} files, {self.resources:,} resources, {mib:,.1f} MiB"
        )


@dataclass(slots=True)
class _FileDownloader:
    """Downloads files of an export to the store; called by several threads, until ``stop`` is set."""

    client: BulkClient
    downloads: Downloads
    writer: PartWriter
    progress: _Progress
    export: BulkExport
    needs_token: bool
    lock: Lock = field(default_factory=Lock)
    stop: Event = field(default_factory=Event)
    counts: list[tuple[ExportFile, int]] = field(default_factory=list)
    """The number of lines of each file."""

    def __call__(self, files: Sequence[ExportFile]) -> None:
        with self.downloads.share_slot():
            for file in files:
                self._fetch(file)

    def _fetch(self, file: ExportFile) -> None:
        default = default_last_updated(self.export.until)
        file_type, requested = file.resource_type, self.export.resource_types
        count = 0
        for lines in self.client.read_lines(self.downloads, file, needs_token=self.needs_token):
            routes = [route_line(line, file_type, requested) for line in lines]
            with self.lock:
                if self.stop.is_set():
                    return
                for line, route in zip(lines, routes, strict=True):
                    unpacked = [(line, route)] if route else unpack_line(line, file_type, requested)
                    for body, (resource_type, moment) in unpacked:
                        self.writer.add(resource_type, self.export.id, body, moment or default)
            count += len(lines)
            self.progress.add(lines)
        self.counts.append((file, count))
        self.progress.add((), files=1)


def default_last_updated(transaction_time: datetime) -> datetime:
    """Return the time that resources without ``lastUpdated`` get: the last moment that the export covers."""
    return transaction_time - timedelta(milliseconds=1)


def _split_into_groups(files: Iterable[tuple[int, ExportFile]]) -> Iterator[list[tuple[int, ExportFile]]]:
    """Split files into groups of GROUP_RESOURCES resources or GROUP_FILES files."""
    group: list[tuple[int, ExportFile]] = []
    resources = 0
    for index, file in files:
        group.append((index, file))
        resources += file.count or GROUP_RESOURCES // 10
        if resources >= GROUP_RESOURCES or len(group) >= GROUP_FILES:
            yield group
            group, resources = [], 0
    if group:
        yield group


def _split_into_batches(files: Sequence[ExportFile]) -> Iterator[list[ExportFile]]:
    """Split files into batches for one thread each: one large file, or several small ones."""
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
