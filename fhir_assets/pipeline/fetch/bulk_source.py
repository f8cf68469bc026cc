"""The source ``bulk``: download a bulk export (FHIR Bulk Data Access, ``$export``) into the store, and read it there.

After a failed run the next run continues the same export: its status URL is stored in the database at the kick-off, and
stored files are not downloaded again. The export is cancelled only if a person cancels the run.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import islice
from uuid import uuid4

import orjson

from fhir_assets.errors import FhirAssetsError, NotFhir, ServerUnavailable
from fhir_assets.fhir.bulk.client import BulkClient, ExportFailed, ExportGone, ExportPending
from fhir_assets.fhir.bulk.downloads import Downloads
from fhir_assets.fhir.bulk.manifest import ExportFile, ExportManifest, ExportRequest
from fhir_assets.fhir.client.http import FhirClient
from fhir_assets.fhir.deletions import read_deleted_entries
from fhir_assets.fhir.record import (
    Deletion,
    MalformedResource,
    Record,
    RejectedInput,
    build_record,
    read_header,
)
from fhir_assets.notices import Notice
from fhir_assets.pipeline.dead_letter_buffer import DeadLetterBuffer
from fhir_assets.pipeline.deletions.deletion_log import DeletionLog
from fhir_assets.pipeline.fetch.bulk_download import LAYER, Download, default_last_updated
from fhir_assets.storage.manifest import Part
from fhir_assets.storage.store import Store, partition_folder
from fhir_assets.warehouse.ops import bulk_exports, dead_letters
from fhir_assets.warehouse.ops.bulk_exports import BulkExport
from fhir_assets.warehouse.ops.dead_letters import DeadLetter
from fhir_assets.warehouse.postgres.db.connections import Connection, OpenSession, Session
from fhir_assets.windows import Interval

_MAX_AGE_IN_STORE = timedelta(days=1)
"""How long an export stays in the store for the runs that read it."""
_log = logging.getLogger(__name__)


class BulkSource:
    """Reads resources from a bulk export of a FHIR server.

    Runs use an export that was requested less than ``reuse_within`` ago. Otherwise they request a new export of the
    resources that were updated since the start of their interval. An export that takes longer than ``time_limit``
    fails. ``on_progress`` receives the progress of an export as text, in addition to the log.
    """

    name = "bulk"
    one_pass = True

    def __init__(
        self,
        client: FhirClient,
        store: Store,
        connect: OpenSession,
        *,
        level: str = "system",
        type_filter: str = "",
        connections: int = 4,
        reuse_within: timedelta = timedelta(minutes=10),
        time_limit: timedelta = timedelta(days=30),
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        sleep: Callable[[float], None] = time.sleep,
        on_progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._base_url = client.base_url
        self._labels = client.labels
        self.notices = client.notices
        self._client = BulkClient(client)
        self._store = store
        self._connect = connect
        self._level = level
        self._type_filter = type_filter
        self._connections = connections
        self._reuse_within = reuse_within
        self._time_limit = time_limit
        self._now = now
        self._sleep = sleep
        self._chosen: BulkExport | None = None
        self._on_progress = on_progress

    def list_types(self) -> None:
        """Return None: an export has all types of the server, so that no type has to be left out."""

    def compute_state(self) -> None:
        """Return None: unlike files, a server has no state that shows whether everything must be read again."""

    def count(self, resource_type: str, interval: Interval) -> None:
        """Return None: an export counts the resources of files, not of windows. The download checks these counts."""

    def find_extent(self, resource_types: Sequence[str]) -> Interval | None:
        """Return the interval from the oldest resource to the transaction time of the export, or None if it is empty.

        A new export is requested if there is no recent one.
        """
        export = self._get_export(resource_types, None, self._now())
        with self._connect() as conn:
            firsts = [part.first for _, part in bulk_exports.list_parts(conn, export.id) if part.first]
        assert export.transaction_time is not None
        return Interval(min(firsts), export.transaction_time) if firsts else None

    def complete_until(self, resource_types: Sequence[str], interval: Interval) -> datetime:
        """Return the transaction time of the export. A new export is requested if there is no recent one."""
        export = self._chosen = self._get_export(resource_types, interval.start, min(interval.end, self._now()))
        assert export.transaction_time is not None
        return export.transaction_time

    def fetch(self, resource_types: Sequence[str], interval: Interval) -> Iterator[Record | RejectedInput]:
        """Yield the resources of the interval from the export that ``complete_until`` chose."""
        export = self._chosen or self._get_export(resource_types, interval.start, min(interval.end, self._now()))
        with self._connect() as conn:
            stored = bulk_exports.list_parts(conn, export.id)
        for resource_type, part in stored:
            if resource_type in resource_types and _may_contain(part, interval):
                for item in self._read(resource_type, part, default_last_updated(export.transaction_time)):
                    if (item.as_of if isinstance(item, Record) else item.arrived) in interval:
                        yield item

    def drain_notices(self) -> tuple[Notice, ...]:
        """Return the notices about the server's answers since the last call."""
        return self.notices.drain()

    def _read(self, resource_type: str, part: Part, arrived: datetime) -> Iterator[Record | RejectedInput]:
        number = 0
        received = max(self._now(), arrived)
        for batch in self._store.batches([part]):
            for line in batch:
                number += 1
                location = f"{part.name.rpartition('/')[2]}:{number}"
                try:
                    header = read_header(line)
                    if header.resourceType != resource_type:
                        raise MalformedResource(
                            "its resourceType is not the type in the export's manifest", "structure"
                        )
                    yield build_record(line, header, arrived, received=received)
                except MalformedResource as error:
                    yield RejectedInput(resource_type, None, error.rule, location, str(error), arrived, line)

    def _get_export(self, resource_types: Sequence[str], since: datetime | None, until: datetime) -> BulkExport:
        """Return a complete export of the resources since ``since``. Continue or request an export if needed."""
        request = ExportRequest(self._level, tuple(resource_types), since, self._type_filter)
        with self._connect() as conn, bulk_exports.lock_server(conn, self._base_url):
            if export := bulk_exports.find(conn, self._base_url, request, ["done"], until=until):
                return export
            recent = bulk_exports.find(conn, self._base_url, request, ["done"])
            if recent and self._now() - recent.requested_at < self._reuse_within:
                return recent
            export = bulk_exports.find(conn, self._base_url, request, ["waiting", "downloading"])
            for last_attempt in (False, False, True):
                try:
                    return self._complete(conn, export or self._kick_off(conn, request))
                except ExportGone as error:
                    if last_attempt:
                        raise
                    self._report(f"export: {error}")
                    export = None
            raise AssertionError("the last attempt returns or raises")

    def _report(self, text: str) -> None:
        _log.info(text)
        self._on_progress(text)

    def _kick_off(self, conn: Connection, request: ExportRequest) -> BulkExport:
        requested_at = self._now()
        status_url = self._client.kick_off(request)
        export = bulk_exports.begin(conn, uuid4().hex[:12], self._base_url, request, status_url, requested_at)
        self._report(f"export {export.id}: the server has accepted the request")
        return export

    def _complete(self, conn: Session, export: BulkExport) -> BulkExport:
        """Download the export into the store, apply its deletions, record its errors, and return it as done."""
        try:
            manifest = export.manifest or self._await_manifest(conn, export)
            self._download(conn, export, manifest)
            self._apply_deletions_and_errors(conn, export, manifest)
        except (ExportFailed, NotFhir) as error:
            conn.rollback()
            bulk_exports.end(conn, export.id, "failed", error=str(error))
            if not isinstance(error, ExportGone):
                self._delete_on_server(export)
            raise
        except Exception:
            raise  # the next run continues the export
        except BaseException:
            # A person cancelled the run: no later run continues the export.
            conn.rollback()
            bulk_exports.end(conn, export.id, "cancelled")
            self._delete_on_server(export)
            raise
        bulk_exports.end(conn, export.id, "done")
        self._delete_on_server(export)
        self._remove_outdated(conn)
        return replace(export, status="done", manifest=manifest, transaction_time=manifest.transaction_time)

    def _await_manifest(self, conn: Connection, export: BulkExport) -> ExportManifest:
        polls = 0
        reported = ""
        while True:
            try:
                answer = self._client.poll(export.status_url, polls)
            except ServerUnavailable:
                self._check_limit(export)
                raise
            if not isinstance(answer, ExportPending):
                bulk_exports.record_manifest(conn, export.id, answer)
                return answer
            if answer.progress and answer.progress != reported:
                reported = answer.progress
                self._report(f"export {export.id}: {reported}")
            self._check_limit(export)
            polls += 1
            self._sleep(answer.seconds)

    def _check_limit(self, export: BulkExport) -> None:
        if self._now() - export.requested_at > self._time_limit:
            raise ExportFailed(
                f"the server has not had the export ready for {self._time_limit / timedelta(days=1):g} days "
                f"(see {self._labels.export_days}), so the export was abandoned: ask its administrator, and run "
                "again to request a new one"
            )

    def _download(self, conn: Connection, export: BulkExport, manifest: ExportManifest) -> None:
        download = Download(
            self._client,
            self._store,
            export.id,
            manifest,
            connections=self._connections,
            on_progress=lambda text: self._report(f"export {export.id}: {text}"),
        )
        for parts, files in download.download_groups(export.files_done):
            bulk_exports.record_parts(conn, export.id, parts, files)

    def _apply_deletions_and_errors(self, conn: Session, export: BulkExport, manifest: ExportManifest) -> None:
        """Apply the deletions of the export, and record the server's errors as dead letters."""
        with self._client.open_downloads() as downloads:
            deleted = (line for file in manifest.deleted for line in self._read_lines(downloads, file, manifest))
            deletion_log = DeletionLog(self._store, self._connect)
            deletions = self._read_deletions(deleted, export, manifest.transaction_time)
            deletion_log.record(deletions, run_id=export.id, actor="bulk export")
            with conn.transaction():
                for file in manifest.errors:
                    lines = self._read_lines(downloads, file, manifest)
                    dead_letters.record(conn, export.id, (_build_dead_letter(line, export.id) for line in lines))

    def _read_deletions(self, lines: Iterable[bytes], export: BulkExport, at: datetime) -> Iterator[Deletion]:
        """Yield the deletions of the ``deleted`` files. A line with an unreadable deletion becomes a dead letter."""

        def write(letters: Sequence[DeadLetter]) -> None:
            dead_letters.record_now(self._connect, export.id, letters)

        unreadable = DeadLetterBuffer(write)
        for line in lines:
            is_readable = True
            for deletion in read_deleted_entries(line, at):
                if deletion is not None:
                    yield deletion
                elif is_readable:
                    is_readable = False
                    unreadable.add(_build_deletion_dead_letter(line, export.id))
        unreadable.flush()

    def _read_lines(self, downloads: Downloads, file: ExportFile, manifest: ExportManifest) -> Iterator[bytes]:
        for lines in self._client.read_lines(downloads, file, needs_token=manifest.needs_token):
            yield from lines

    def _delete_on_server(self, export: BulkExport) -> None:
        with suppress(FhirAssetsError):
            self._client.delete_export(export.status_url)

    def _remove_outdated(self, conn: Connection) -> None:
        """Delete exports from the store that are older than _MAX_AGE_IN_STORE."""
        for export_id in bulk_exports.find_expired(conn, self._base_url, self._now() - _MAX_AGE_IN_STORE):
            types = {resource_type for resource_type, _ in bulk_exports.list_parts(conn, export_id)}
            for resource_type in types:  # also parts that a killed process wrote but did not record
                for name in list(self._store.blobs.names(partition_folder(LAYER, resource_type, export_id))):
                    self._store.blobs.delete(name)
            bulk_exports.remove_parts(conn, export_id)


def _may_contain(part: Part, interval: Interval) -> bool:
    if part.first is None or part.last is None:
        return True
    return part.first < interval.end and (interval.start is None or part.last >= interval.start)


def _build_deletion_dead_letter(line: bytes, export_id: str) -> DeadLetter:
    message = (
        "a line of a `deleted` file that is not a Bundle of deletions, or that has a deletion of no single resource: "
        "load with --full-refresh to remove what the server deleted"
    )
    return DeadLetter("Bundle", None, "export", "export-deletion", f"export {export_id}", message, line, "")


def _build_dead_letter(line: bytes, export_id: str) -> DeadLetter:
    """Build the dead letter of an OperationOutcome.

    Its message contains the issue codes, but no text of the server, which may contain patient data.
    """
    codes: list[str] = []
    with suppress(ValueError, KeyError, TypeError, AttributeError):
        codes = [str(issue["code"])[:40] for issue in islice(orjson.loads(line)["issue"], 5)]
    message = f"the server could not export a resource ({', '.join(codes) or 'no code'}): ask its administrator"
    return DeadLetter("OperationOutcome", None, "export", "export-error", f"export {export_id}", message, line, "")
