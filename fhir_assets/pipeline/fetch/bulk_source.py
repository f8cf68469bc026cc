"""The source ``bulk``: one export of the server, downloaded into the store once, read from there window by window.

Whatever ends a run, the next one goes on with the same export: its status URL is kept from the first moment, and
files that are stored are not fetched again. Only who cancels a run cancels the export.
"""

import logging
import re
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
from fhir_assets.fhir.record import (
    Deletion,
    MalformedResource,
    Record,
    RejectedInput,
    build_record,
    parse_instant,
    read_header,
)
from fhir_assets.pipeline.deletions.deletion_log import DeletionLog
from fhir_assets.pipeline.fetch.bulk_download import LAYER, Download, arrival
from fhir_assets.storage.manifest import Part
from fhir_assets.storage.store import Store, folder
from fhir_assets.warehouse.ops import bulk_exports, dead_letters
from fhir_assets.warehouse.ops.bulk_exports import BulkExport
from fhir_assets.warehouse.ops.dead_letters import DeadLetter
from fhir_assets.warehouse.postgres.db.connections import Connection, OpenSession, Session
from fhir_assets.windows import Interval

_DELETED = re.compile(r"(?:^|/)(?P<type>[A-Za-z]+)/(?P<id>[A-Za-z0-9\-.]{1,64})$")
_KEPT = timedelta(days=1)
"""How long an export stays in the store, for runs that read it."""
_log = logging.getLogger(__name__)


class BulkSource:
    """Resources by ``$export``.

    An export that is younger than ``fresh`` serves every run; after that a new one is asked for, of what was updated
    since the interval begins. An export takes at most ``limit``.
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
        fresh: timedelta = timedelta(minutes=10),
        limit: timedelta = timedelta(days=30),
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        sleep: Callable[[float], None] = time.sleep,
        on_progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._base_url = client.base_url
        self._client = BulkClient(client)
        self._store = store
        self._connect = connect
        self._level = level
        self._type_filter = type_filter
        self._connections = connections
        self._fresh = fresh
        self._limit = limit
        self._now = now
        self._sleep = sleep
        self._chosen: BulkExport | None = None
        self.on_progress = on_progress
        """Hears how far an export is, besides the log."""

    def offered(self) -> None:
        """Nothing: what an export lacks is not there."""

    def state(self) -> None:
        """Nothing: a server is asked by interval."""

    def count(self, resource_type: str, interval: Interval) -> None:
        """Nothing: the manifest's counts are of files, and were held against them when these were stored."""

    def extent(self, resource_types: Sequence[str]) -> Interval | None:
        """From the oldest resource to the export's transaction time. Exports everything if that was not done yet."""
        export = self._export(resource_types, None, self._now())
        with self._connect() as conn:
            firsts = [part.first for _, part in bulk_exports.parts(conn, export.id) if part.first]
        assert export.transaction_time is not None
        return Interval(min(firsts), export.transaction_time) if firsts else None

    def until(self, resource_types: Sequence[str], interval: Interval) -> datetime:
        """The transaction time of the export that serves the interval; it is made if there is none."""
        export = self._chosen = self._export(resource_types, interval.start, min(interval.end, self._now()))
        assert export.transaction_time is not None
        return export.transaction_time

    def fetch(self, resource_types: Sequence[str], interval: Interval) -> Iterator[Record | RejectedInput]:
        """The resources of the interval, out of the export that ``until`` found."""
        export = self._chosen or self._export(resource_types, interval.start, min(interval.end, self._now()))
        with self._connect() as conn:
            stored = bulk_exports.parts(conn, export.id)
        for resource_type, part in stored:
            if resource_type in resource_types and _may_hold(part, interval):
                for item in self._read(resource_type, part, arrival(export.transaction_time)):
                    if (item.as_of if isinstance(item, Record) else item.arrived) in interval:
                        yield item

    def _read(self, resource_type: str, part: Part, arrived: datetime) -> Iterator[Record | RejectedInput]:
        number = 0
        for batch in self._store.batches([part]):
            for line in batch:
                number += 1
                place = f"{part.name.rpartition('/')[2]}:{number}"
                try:
                    header = read_header(line)
                    if header.resourceType != resource_type:
                        raise MalformedResource(
                            "a resource of another type than the export's manifest says", "structure"
                        )
                    yield build_record(line, header, arrived)
                except MalformedResource as error:
                    yield RejectedInput(resource_type, None, error.rule, place, str(error), arrived, line)

    def _export(self, resource_types: Sequence[str], since: datetime | None, until: datetime) -> BulkExport:
        """An export that holds the types, all that was updated since; found, taken up or asked for."""
        request = ExportRequest(self._level, tuple(resource_types), since, self._type_filter)
        with self._connect() as conn, bulk_exports.alone(conn, self._base_url):
            if found := bulk_exports.find(conn, self._base_url, request, ["done"], until=until):
                return found
            recent = bulk_exports.find(conn, self._base_url, request, ["done"])
            if recent and self._now() - recent.requested_at < self._fresh:
                return recent
            export = bulk_exports.find(conn, self._base_url, request, ["waiting", "downloading"])
            for last in (False, False, True):
                try:
                    return self._finished(conn, export or self._asked_for(conn, request))
                except ExportGone as error:
                    if last:
                        raise
                    self._tell(f"export: {error}")
                    export = None
            raise AssertionError("the last try returns or raises")

    def _tell(self, text: str) -> None:
        _log.info(text)
        self.on_progress(text)

    def _asked_for(self, conn: Connection, request: ExportRequest) -> BulkExport:
        at = self._now()
        status_url = self._client.kick_off(request)
        export = bulk_exports.begin(conn, uuid4().hex[:12], self._base_url, request, status_url, at)
        self._tell(f"export {export.id}: the server has taken it")
        return export

    def _finished(self, conn: Session, export: BulkExport) -> BulkExport:
        """The export, in the store as a whole."""
        try:
            manifest = export.manifest or self._awaited(conn, export)
            self._download(conn, export, manifest)
            self._apply(conn, export, manifest)
        except (ExportFailed, NotFhir) as error:
            conn.rollback()
            bulk_exports.end(conn, export.id, "failed", error=str(error))
            if not isinstance(error, ExportGone):
                self._forget(export)
            raise
        except Exception:
            raise  # the next run takes it up
        except BaseException:
            # Cancelled by a person: nobody is going to take it up.
            conn.rollback()
            bulk_exports.end(conn, export.id, "cancelled")
            self._forget(export)
            raise
        bulk_exports.end(conn, export.id, "done")
        self._forget(export)
        self._clear(conn)
        return replace(export, status="done", manifest=manifest, transaction_time=manifest.transaction_time)

    def _awaited(self, conn: Connection, export: BulkExport) -> ExportManifest:
        tried = 0
        said = ""
        while True:
            try:
                found = self._client.poll(export.status_url, tried)
            except ServerUnavailable:
                self._check_limit(export)
                raise
            if not isinstance(found, ExportPending):
                bulk_exports.ready(conn, export.id, found)
                return found
            if found.progress and found.progress != said:
                said = found.progress
                self._tell(f"export {export.id}: {said}")
            self._check_limit(export)
            tried += 1
            self._sleep(found.seconds)

    def _check_limit(self, export: BulkExport) -> None:
        if self._now() - export.requested_at > self._limit:
            raise ExportFailed(
                f"the server has not had the export ready for {self._limit / timedelta(days=1):g} days "
                "(FHIR_BULK_DAYS), so it is given up: ask its administrator what became of it, and run again to ask "
                "for a new one"
            )

    def _download(self, conn: Connection, export: BulkExport, manifest: ExportManifest) -> None:
        download = Download(
            self._client,
            self._store,
            export.id,
            manifest,
            connections=self._connections,
            on_progress=lambda text: self._tell(f"export {export.id}: {text}"),
        )
        for parts, files in download.groups(export.files_done):
            bulk_exports.store_parts(conn, export.id, parts, files)

    def _apply(self, conn: Session, export: BulkExport, manifest: ExportManifest) -> None:
        """What the export says besides: deletions, and the server's own errors."""
        with self._client.open_downloads() as downloads:
            gone = (line for file in manifest.deleted for line in self._all_lines(downloads, file, manifest))
            tombstones = DeletionLog(self._store, self._connect)
            tombstones.record(_deletions(gone, manifest.transaction_time), run_id=export.id, actor="bulk export")
            with conn.transaction():
                for file in manifest.errors:
                    lines = self._all_lines(downloads, file, manifest)
                    dead_letters.record(conn, export.id, (_letter(line, export.id) for line in lines))

    def _all_lines(self, downloads: Downloads, file: ExportFile, manifest: ExportManifest) -> Iterator[bytes]:
        for lines in self._client.read_lines(downloads, file, needs_token=manifest.needs_token):
            yield from lines

    def _forget(self, export: BulkExport) -> None:
        with suppress(FhirAssetsError):
            self._client.delete_export(export.status_url)

    def _clear(self, conn: Connection) -> None:
        """Take away what nobody reads any more."""
        for export_id in bulk_exports.outdated(conn, self._base_url, self._now() - _KEPT):
            types = {resource_type for resource_type, _ in bulk_exports.parts(conn, export_id)}
            for resource_type in types:  # with what a kill left there between a part and its being noted
                for name in list(self._store.blobs.names(folder(LAYER, resource_type, export_id))):
                    self._store.blobs.delete(name)
            bulk_exports.forget_parts(conn, export_id)


def _may_hold(part: Part, interval: Interval) -> bool:
    if part.first is None or part.last is None:
        return True
    return part.first < interval.end and (interval.start is None or part.last >= interval.start)


def _deletions(lines: Iterable[bytes], at: datetime) -> Iterator[Deletion]:
    """The deletions of transaction Bundles, a line each. Raises NotFhir."""
    for line in lines:
        try:
            bundle = orjson.loads(line)
            moment = parse_instant((bundle.get("meta") or {}).get("lastUpdated")) or at
            for entry in bundle.get("entry", ()):
                if entry["request"]["method"] == "DELETE":
                    found = _DELETED.search(entry["request"]["url"])
                    if found is None:
                        raise ValueError
                    yield Deletion(found["type"], found["id"], moment)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise NotFhir("a file of deletions in the export is not of Bundles as Bulk Data Access has them") from None


def _letter(line: bytes, export_id: str) -> DeadLetter:
    """The server's own complaint. What it says may quote a patient: it is kept with the letter, not in its message."""
    codes: list[str] = []
    with suppress(ValueError, KeyError, TypeError, AttributeError):
        codes = [str(issue["code"])[:40] for issue in islice(orjson.loads(line)["issue"], 5)]
    said = f"the server could not export something ({', '.join(codes) or 'no code'}): ask its administrator"
    return DeadLetter("OperationOutcome", None, "export", "export-error", f"export {export_id}", said, line, "")
