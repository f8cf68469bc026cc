"""The source ``bulk``: chooses bulk exports (FHIR Bulk Data Access, ``$export``) for a load, and reads their files.

The first export of a type contains all of its resources; later exports contain those that were updated since. An export
that no load has read to its end is used by the next load, because a newer export may lack some of its contents:
resources without ``lastUpdated``, and lines that are not resources. Requesting exports is in ``bulk_export``,
downloading them in ``bulk_download``.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta

from fhir_assets.errors import ServerRefused, StoreError
from fhir_assets.fhir.bulk.file_lines import LONG_LINE
from fhir_assets.fhir.bulk.kick_off import ExportRefused
from fhir_assets.fhir.bulk.manifest import ExportRequest
from fhir_assets.fhir.client.http import FhirClient
from fhir_assets.fhir.record import MalformedResource, Record, RejectedInput, build_record, read_header
from fhir_assets.fhir.validation.primitives import is_id
from fhir_assets.notices import Notice
from fhir_assets.pipeline.fetch.bulk_download import default_last_updated
from fhir_assets.pipeline.fetch.bulk_export import ExportRunner
from fhir_assets.storage.manifest import Part
from fhir_assets.storage.store import Store
from fhir_assets.warehouse.ops import bulk_exports, checkpoints
from fhir_assets.warehouse.ops.bulk_exports import BulkExport, Scope
from fhir_assets.warehouse.ops.checkpoints import Checkpoint
from fhir_assets.warehouse.postgres import resources
from fhir_assets.warehouse.postgres.db.connections import OpenSession, Session
from fhir_assets.windows import Interval

_UNFINISHED_AGE = timedelta(days=1)
"""An export that no load has read to its end is used for this long after its download."""

_VERSIONS_PER_QUERY = 2000


class BulkSource:
    """Reads resources from the bulk exports of a FHIR server.

    Runs use an export that was requested less than ``reuse_within`` ago, or that is not loaded yet. Otherwise they
    request a new export of the resources that were updated since the start of their interval. Resources that are older
    than ``oldest`` are not loaded, even if an export contains them. ``overlap`` is the time before the end of the last
    load that the next load reads again. For the other options see ExportRunner.
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
        oldest: datetime | None = None,
        overlap: timedelta = timedelta(0),
        connections: int = 4,
        reuse_within: timedelta = timedelta(minutes=10),
        time_limit: timedelta = timedelta(days=30),
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        sleep: Callable[[float], None] = time.sleep,
        on_progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._scope = Scope(client.base_url, level, type_filter)
        self.notices = client.notices
        self._clock = client.clock
        self._store = store
        self._connect = connect
        self._oldest = oldest
        self._overlap = overlap
        self._reuse_within = reuse_within
        self._now = now
        self._chosen: dict[str, BulkExport] = {}
        self.refused: Mapping[str, ServerRefused] = {}
        self._runner = ExportRunner(
            client,
            store,
            connect,
            connections=connections,
            time_limit=time_limit,
            now=now,
            sleep=sleep,
            on_progress=on_progress,
        )

    def list_types(self) -> None:
        """Return None: an export contains every type that the server has."""

    def compute_state(self) -> None:
        """Return None: unlike files, a server has no state that shows whether everything must be read again."""

    def count(self, resource_type: str, interval: Interval) -> None:
        """Return None: an export has a count for each file, not for each window. The download checks these counts."""

    def find_extent(self, resource_types: Sequence[str]) -> Interval:
        """Return the interval from the oldest resource to the transaction time of an export of all resources.

        The export is requested if there is none that can be used. The load uses the same export, even if the download
        takes long.
        """
        now = self._now()
        chosen = self._choose({name: Interval(None, now) for name in resource_types})
        until = min(export.until for export in chosen.values())
        with self._connect() as conn:
            firsts = [
                part.first
                for export in _distinct(chosen.values())
                for name, part in bulk_exports.list_parts(conn, export.id)
                if part.first and name in chosen
            ]
        return Interval(min([*firsts, default_last_updated(until)]), until)

    def read_clock(self) -> datetime | None:
        """Return the time of the server's clock, from the Date headers of its answers; None before the first answer."""
        return self._clock.read()

    def complete_until(self, intervals: Mapping[str, Interval]) -> dict[str, datetime]:
        """Return the transaction time of the export of each type. Exports are requested where there are none to use."""
        self._chosen = self._choose(intervals)
        with self._connect() as conn:
            bulk_exports.mark_used(conn, {export.id for export in self._chosen.values()}, self._now())
        return {name: export.until for name, export in self._chosen.items()}

    def fetch(self, resource_types: Sequence[str], interval: Interval) -> Iterator[Record | RejectedInput]:
        """Yield the resources of the interval from the exports that ``complete_until`` chose.

        An export may contain resources outside of the requested time range. The interval that contains the transaction
        time yields them, with ``late`` set: resources that were updated after the transaction time, and earlier ones
        that the tables do not have, such as those of a patient who joined a Group.
        """
        chosen = self._chosen or self._choose(dict.fromkeys(resource_types, interval))
        for export in _distinct(chosen.values()):
            names = {name for name in resource_types if chosen.get(name) is export}
            with self._connect() as conn:
                parts = [item for item in bulk_exports.list_parts(conn, export.id) if item[0] in names]
            if default_last_updated(export.until) in interval:
                for notice in export.notices:
                    self.notices.add(notice.severity, notice.code, notice.message, notice.resource_type)
            try:
                yield from self._fetch_export(export, parts, interval)
            except StoreError:
                with self._connect() as conn:
                    bulk_exports.end(conn, export.id, "failed", error="a file of it in the store is damaged")
                raise

    def drain_notices(self) -> tuple[Notice, ...]:
        """Return the notices about the server's answers since the last call."""
        return self.notices.drain()

    def _fetch_export(
        self, export: BulkExport, parts: Iterable[tuple[str, Part]], interval: Interval
    ) -> Iterator[Record | RejectedInput]:
        arrived = default_last_updated(export.until)
        includes_late = arrived in interval
        covered = Interval(export.since, export.until)
        for resource_type, part in parts:
            if not includes_late and not _may_contain(part, interval):
                continue
            early: list[Record] = []
            for item in self._read(resource_type, part, arrived):
                moment = None if isinstance(item, RejectedInput) else item.last_updated
                if moment is not None and moment in covered:
                    if moment in interval:
                        yield item
                elif includes_late:
                    if isinstance(item, Record) and self._is_early(item, export):
                        early.append(item)
                    else:
                        yield _mark_late(item, export)
                    if len(early) >= _VERSIONS_PER_QUERY:
                        yield from self._find_unknown(resource_type, early)
                        early.clear()
            yield from self._find_unknown(resource_type, early)

    def _is_early(self, record: Record, export: BulkExport) -> bool:
        """Return whether a resource is older than the time range of the export, but not too old to be loaded."""
        moment = record.last_updated
        if moment is None or moment >= export.until:
            return False
        return self._oldest is None or moment >= self._oldest

    def _find_unknown(self, resource_type: str, early: Sequence[Record]) -> Iterator[Record]:
        """Yield the records of which the tables have neither this version nor a newer one."""
        if not early:
            return
        with self._connect() as conn:
            # A resource with an invalid id cannot be looked up: it is stored, and becomes a dead letter.
            stored = resources.find_versions(conn, resource_type, [record.id for record in early if is_id(record.id)])
        for record in early:
            known = stored.get(record.id)
            if known is None or known.last_updated is None or known.last_updated < record.as_of:
                yield replace(record, late=True)

    def _read(self, resource_type: str, part: Part, arrived: datetime) -> Iterator[Record | RejectedInput]:
        number = 0
        received = max(self._now(), arrived)
        for batch in self._store.batches([part]):
            for line in batch:
                number += 1
                location = f"{part.name.rpartition('/')[2]}:{number}"
                if line == LONG_LINE:
                    yield RejectedInput(resource_type, None, "json", location, LONG_LINE.decode(), arrived, b"")
                    continue
                try:
                    header = read_header(line)
                    if header.resource_type != resource_type:
                        raise MalformedResource(
                            "its resourceType is not the type in the export's manifest", "structure"
                        )
                    yield build_record(line, header, arrived, received=received)
                except MalformedResource as error:
                    yield RejectedInput(resource_type, None, error.rule, location, str(error), arrived, line)

    def _choose(self, intervals: Mapping[str, Interval]) -> dict[str, BulkExport]:
        """Return for each type a complete export of its interval. Exports are continued or requested where needed."""
        with self._connect() as conn, bulk_exports.lock_server(conn, self._scope.base_url):
            chosen: dict[str, BulkExport] = {}
            full = bulk_exports.find_fully_loaded_types(conn, self._scope, list(intervals))
            usable = bulk_exports.find_usable(conn, self._scope)
            loaded = checkpoints.get(conn, list(intervals))
            conn.commit()
            starts = {
                name: interval.start if name in full and not self._needs_full_export(interval, loaded[name]) else None
                for name, interval in intervals.items()
            }
            for export in usable:
                for name, interval in intervals.items():
                    until = loaded[name].loaded_until if name in loaded else None
                    covers = export.status == "done" and export.covers(name, starts[name])
                    if covers and name not in chosen and self._can_reuse(export, interval, until):
                        chosen[name] = export
            for export in usable:
                names = [name for name in intervals if name not in chosen and export.covers(name, starts[name])]
                if names and export.status != "done" and (done := self._runner.resume(conn, export)):
                    chosen |= dict.fromkeys(names, done)
            self.refused = self._request_missing(conn, starts, chosen)
            return chosen

    def _needs_full_export(self, interval: Interval, loaded: Checkpoint) -> bool:
        """Return whether a load of ``interval`` needs an export of all resources of a type.

        It does if it reads the current window from its start although a part of the window is already loaded. Only a
        full export contains again the resources that belong to no time range, such as those without ``lastUpdated``.
        """
        return (
            interval.start is not None
            and interval.start < loaded.loaded_until - self._overlap
            and interval.end > loaded.loaded_until
        )

    def _can_reuse(self, export: BulkExport, interval: Interval, loaded_until: datetime | None) -> bool:
        """Return whether a load of ``interval`` can use an export in the store."""
        now = self._now()
        if export.until >= min(interval.end, now) or now - export.requested_at < self._reuse_within:
            return True
        is_unfinished = export.used_at is None or (loaded_until is not None and loaded_until < export.until)
        return is_unfinished and export.finished_at is not None and now - export.finished_at < _UNFINISHED_AGE

    def _request_missing(
        self, conn: Session, starts: Mapping[str, datetime | None], chosen: dict[str, BulkExport]
    ) -> dict[str, ServerRefused]:
        """Request one export for all types whose export starts at the same time, and add the exports to ``chosen``.

        Return the types that the server refuses, with the reason of each. Raises ServerRefused if it refuses all.
        """
        missing: dict[datetime | None, list[str]] = {}
        for name, start in starts.items():
            if name not in chosen:
                missing.setdefault(start, []).append(name)
        refused: dict[str, ServerRefused] = {}
        for start, names in missing.items():
            while remaining := [name for name in names if name not in refused and name not in chosen]:
                request = ExportRequest(self._scope.level, tuple(remaining), start, self._scope.type_filter)
                try:
                    chosen |= dict.fromkeys(remaining, self._runner.request(conn, request))
                except ExportRefused as error:
                    refused |= dict.fromkeys(error.resource_types or remaining, error)
        if refused and not chosen:
            raise next(iter(refused.values()))
        return refused


def _distinct(exports: Iterable[BulkExport]) -> list[BulkExport]:
    return list({export.id: export for export in exports}.values())


def _mark_late(item: Record | RejectedInput, export: BulkExport) -> Record | RejectedInput:
    """Set ``late`` of a resource that was updated after the transaction time. Return any other item unchanged."""
    if isinstance(item, Record) and item.last_updated is not None and item.last_updated >= export.until:
        return replace(item, late=True)
    return item


def _may_contain(part: Part, interval: Interval) -> bool:
    if part.first is None or part.last is None:
        return True
    return part.first < interval.end and (interval.start is None or part.last >= interval.start)
