"""One bulk export: requests it, waits for it, downloads it into the store, and finishes it.

After a failed run the next run continues the same export: its status URL is stored in the database at the kick-off, and
stored files are not downloaded again. The export is cancelled only if a person cancels the run. Choosing exports for a
load is in ``bulk_source``.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from urllib.parse import urlsplit
from uuid import uuid4

from fhir_assets.errors import FhirAssetsError, NotFhir, ServerUnavailable
from fhir_assets.fhir.bulk.client import BulkClient, ExportFailed, ExportGone, ExportPending, LinkExpired
from fhir_assets.fhir.bulk.downloads import Downloads
from fhir_assets.fhir.bulk.manifest import ExportFile, ExportManifest, ExportRequest
from fhir_assets.fhir.bulk.transaction_time import bound_transaction_time, check_stale_export
from fhir_assets.fhir.client.http import FhirClient
from fhir_assets.notices import Notices
from fhir_assets.pipeline.deletions.deletion_log import DeletionLog
from fhir_assets.pipeline.fetch import bulk_outcomes
from fhir_assets.pipeline.fetch.bulk_download import LAYER, Download
from fhir_assets.storage.store import Store, partition_folder
from fhir_assets.warehouse.ops import bulk_exports, dead_letters
from fhir_assets.warehouse.ops.bulk_exports import BulkExport
from fhir_assets.warehouse.postgres.db.connections import Connection, OpenSession, Session

_MAX_AGE_IN_STORE = timedelta(days=1)
"""How long an export stays in the store for the runs that read it."""
_GONE_ATTEMPTS = 3
"""How many times one run requests an export that the server loses before it is downloaded."""
_log = logging.getLogger(__name__)


class ExportRunner:
    """Requests exports from one server and downloads them into the store.

    An export that takes longer than ``time_limit`` fails. ``on_progress`` receives the progress as text, in addition to
    the log.
    """

    def __init__(
        self,
        client: FhirClient,
        store: Store,
        connect: OpenSession,
        *,
        connections: int = 4,
        time_limit: timedelta = timedelta(days=30),
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        sleep: Callable[[float], None] = time.sleep,
        on_progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._base_url = client.base_url
        self._labels = client.labels
        self._client = BulkClient(client)
        self._store = store
        self._connect = connect
        self._connections = connections
        self._time_limit = time_limit
        self._now = now
        self._sleep = sleep
        self._on_progress = on_progress
        self._links_refused = False

    def request(self, conn: Session, request: ExportRequest) -> BulkExport:
        """Request an export and return it when it is complete. If the server loses the export, request another one.

        Raises ExportGone, ServerRefused, ServerUnavailable, NotFhir or StoreError.
        """
        for attempt in range(_GONE_ATTEMPTS):
            export = self._kick_off(conn, request)
            try:
                return self._complete(conn, export)
            except ExportGone as error:
                if attempt + 1 == _GONE_ATTEMPTS:
                    raise
                self._report(f"export: {error}")
        raise AssertionError("the last attempt returns or raises")

    def resume(self, conn: Session, export: BulkExport) -> BulkExport | None:
        """Continue an export and return it when it is complete; None if the server no longer has it.

        Raises ServerRefused, ServerUnavailable, NotFhir or StoreError.
        """
        try:
            return self._complete(conn, export)
        except ExportGone as error:
            self._report(f"export: {error}")
            return None

    def _complete(self, conn: Session, export: BulkExport) -> BulkExport:
        """Download the export into the store, apply its deletions, record its errors, and return the completed
        export.
        """
        try:
            export = self._download_with_new_links(conn, export)
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
        return replace(export, status="done", finished_at=self._now())

    def _report(self, text: str) -> None:
        _log.info(text)
        self._on_progress(text)

    def _kick_off(self, conn: Connection, request: ExportRequest) -> BulkExport:
        requested_at = self._now()
        accepted = self._client.kick_off(request)
        export = BulkExport(
            uuid4().hex[:12],
            self._base_url,
            accepted.status_url,
            "waiting",
            request.resource_types,
            request.since,
            requested_at,
            accepted.date,
        )
        bulk_exports.begin(conn, export, request)
        self._report(f"export {export.id}: the server has accepted the request")
        return export

    def _download_with_new_links(self, conn: Session, export: BulkExport) -> BulkExport:
        """Download everything. If links have expired, request new links from the status, once for each group of files.

        Raises ExportGone if the new links are refused too, so that a new export is requested. If the links of the new
        export are refused as well, the cause is not their age: LinkExpired is raised, and the export is kept for the
        next run.
        """
        if export.manifest is None:
            export = self._await_manifest(conn, export)
        renewed_with: frozenset[int] | None = None
        while True:
            manifest = export.manifest
            assert manifest is not None
            notices = Notices()
            try:
                self._download(conn, export, manifest, notices)
                self._check_content(conn, export, manifest)
                self._apply_deletions_and_errors(conn, export, manifest, notices)
                break
            except LinkExpired as error:
                conn.rollback()
                export = replace(export, files_done=bulk_exports.read_files_done(conn, export.id))
                if renewed_with == export.files_done:
                    if self._links_refused:
                        raise
                    self._links_refused = True
                    raise ExportGone(f"{error}, and new links are refused too: a new export is requested") from None
                renewed_with = export.files_done
                self._report(f"export {export.id}: {error}; the status is asked for new links")
                export = self._renew_links(conn, export, manifest)
        new_notices = notices.drain()
        bulk_exports.record_notices(conn, export.id, new_notices)
        return replace(export, notices=export.notices + new_notices)

    def _renew_links(self, conn: Session, export: BulkExport, old: ExportManifest) -> BulkExport:
        """Return the export with the links of its current manifest, and with those stored files that the manifest
        contains.
        """
        manifest = self._poll(export)
        paths = {_path(file): index for index, file in enumerate(manifest.output)}
        done = [paths.get(_path(old.output[index])) for index in export.files_done]
        same_snapshot = manifest.transaction_time == old.transaction_time and len(paths) == len(manifest.output)
        kept = frozenset(index for index in done if index is not None)
        if not same_snapshot or None in done:
            kept = frozenset()
        bulk_exports.renew_manifest(conn, export.id, manifest, kept)
        return self._with_manifest(conn, replace(export, files_done=kept), manifest)

    def _await_manifest(self, conn: Connection, export: BulkExport) -> BulkExport:
        return self._with_manifest(conn, export, self._poll(export))

    def _with_manifest(self, conn: Connection, export: BulkExport, manifest: ExportManifest) -> BulkExport:
        transaction_time = bound_transaction_time(
            manifest.transaction_time,
            since=export.since,
            requested_at=export.requested_at,
            kick_off_date=export.kick_off_date,
            answer_date=manifest.answered_at,
            now=self._now(),
        )
        bulk_exports.record_manifest(conn, export.id, manifest, transaction_time)
        return replace(export, manifest=manifest, transaction_time=transaction_time)

    def _poll(self, export: BulkExport) -> ExportManifest:
        """Poll the status until the export is complete. Return the manifest with all of its parts."""
        polls = 0
        reported = ""
        url = export.status_url
        manifest: ExportManifest | None = None
        parts = self._client.count_parts()
        while True:
            try:
                answer = self._client.poll(url, polls)
            except ServerUnavailable:
                self._check_limit(export)
                raise
            if not isinstance(answer, ExportPending):
                parts.add(url, answer)
                manifest = manifest.extend(answer) if manifest else answer
                if answer.next_url is None:
                    return manifest
                url = self._client.resolve(answer.next_url, url)
                continue
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

    def _download(self, conn: Connection, export: BulkExport, manifest: ExportManifest, notices: Notices) -> None:
        download = Download(
            self._client,
            self._store,
            export,
            manifest,
            connections=self._connections,
            notices=notices,
            on_progress=lambda text: self._report(f"export {export.id}: {text}"),
        )
        for parts, files in download.download_groups(export.files_done):
            bulk_exports.record_parts(conn, export.id, parts, files)

    def _check_content(self, conn: Connection, export: BulkExport, manifest: ExportManifest) -> None:
        lasts = [part.last for _, part in bulk_exports.list_parts(conn, export.id) if part.last]
        if export.since is None or lasts:
            check_stale_export(manifest.transaction_time, export.requested_at, max(lasts, default=None))

    def _apply_deletions_and_errors(
        self, conn: Session, export: BulkExport, manifest: ExportManifest, notices: Notices
    ) -> None:
        """Apply the deletions of the export, and record the server's errors as dead letters."""
        with self._client.open_downloads() as downloads:
            deleted = (
                line for file in manifest.deleted for line in self._read_lines(downloads, file, manifest, notices)
            )
            deletions = bulk_outcomes.read_deletions(
                deleted,
                manifest.transaction_time,
                export.id,
                lambda unreadable: dead_letters.record_now(self._connect, export.id, unreadable),
            )
            DeletionLog(self._store, self._connect).record(deletions, run_id=export.id, actor="bulk export")
            with conn.transaction():
                for file in manifest.errors:
                    lines = self._read_lines(downloads, file, manifest, notices)
                    failures = bulk_outcomes.read_errors(lines, export.id, notices)
                    dead_letters.record(conn, export.id, failures)

    def _read_lines(
        self, downloads: Downloads, file: ExportFile, manifest: ExportManifest, notices: Notices
    ) -> Iterator[bytes]:
        count = 0
        for lines in self._client.read_lines(downloads, file, needs_token=manifest.needs_token):
            count += len(lines)
            yield from lines
        bulk_outcomes.check_count(file, count, notices)

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


def _path(file: ExportFile) -> tuple[str, str]:
    """Return what the old and the new link of a file have in common: its type, and its address without the query."""
    return file.resource_type, urlsplit(file.url)._replace(query="", fragment="").geturl()
