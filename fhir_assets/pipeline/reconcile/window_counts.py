"""Reconciles windows: counts the resources of a window in each layer, and reports counts that do not match."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from fhir_assets.catalog import BY_NAME
from fhir_assets.fhir.record import MalformedResource, parse_stored, read_header
from fhir_assets.fhir.views import View
from fhir_assets.notices import Notice
from fhir_assets.pipeline.reconcile.posts_in_progress import (
    count_rows_to_load,
    has_recent_posts,
    without_waiting_posts,
)
from fhir_assets.privacy.encryption import Cipher
from fhir_assets.storage.blobs import LocalBlobs
from fhir_assets.storage.manifest import Manifest
from fhir_assets.storage.store import CONCURRENT_CALLS, CountedLines, Store, map_concurrently
from fhir_assets.warehouse.ops import checkpoints, corrections, dead_letter_resolution
from fhir_assets.warehouse.ops.dead_letters import DeadLetter
from fhir_assets.warehouse.postgres.db.connections import Session, cipher_of
from fhir_assets.warehouse.postgres.queries import reconciliation
from fhir_assets.warehouse.postgres.queries.reconciliation import AbsentCounts
from fhir_assets.warehouse.postgres.tables.encoding import NULL, UnstorableValue, escape_text

STAGES = ("transform", "load")
"""The stages whose dead letters explain why a valid resource is not in the tables."""


@dataclass(frozen=True, slots=True)
class WindowCounts:
    """The counts of one window of one resource type."""

    partition_key: str
    server_total: int | None
    """The source's own count over all fetches of the window; None if the source does not count."""
    matched: int
    """Resources that the source returned."""
    repeated: int
    """Returned resources that the partition had already."""
    rejected: int
    """Entries that became dead letters when they were fetched or received."""
    raw: int
    """Resources in the raw partition, counted in the files of the store."""
    validated: int
    """Resources that were validated."""
    valid: int
    """Resources that are valid and not withheld."""
    dead: int
    """Resources that became dead letters of stage ``validate``."""
    not_loaded: int
    """Dead letters of the stages ``transform`` and ``load``."""
    missing: int
    """Valid resources that are not in the tables, in this or a newer version, for no recorded reason."""
    withheld: int = 0
    """Valid resources that consent keeps out of the tables."""
    received: int = 0
    """Resources that were received through another channel than the source."""
    deleted: int = 0
    """Valid resources that the source has deleted since."""
    undated: int = 0
    """Resources without ``lastUpdated`` that were read without a filter, because the filters by window do not match
    them.
    """
    unreturned: int | None = 0
    """The number of resources that the source counts, but that none of its searches returns; None if it is unknown."""
    in_progress: bool = False
    """Whether posts that are being loaded were left out (see ``posts_in_progress``)."""
    versions: int | None = None
    """Distinct versions of the window in the tables; None if they were not counted."""
    notices: tuple[Notice, ...] = ()
    """The notices of the source during the fetches of the window. Those of severity ``error`` are faults."""
    lost: int = 0
    """Resources that validation rejected and that are neither a dead letter nor in the tables."""
    surplus: int = 0
    """The number of dead letters of stage ``validate`` in excess of those that the validated partition counts
    (``dead``).
    """
    other_parts: bool = False
    """Whether the validated parts are not those of the raw partition."""
    defects: tuple[str, ...] = ()
    """The defects of the files of the raw partition: parts that are missing, truncated, duplicated or unreadable."""

    @property
    def loaded(self) -> int:
        """How many distinct versions of the valid resources are in the tables."""
        accounted = self.valid - self.not_loaded - self.missing - self.deleted
        return accounted if self.versions is None else max(0, min(accounted, self.versions))

    @property
    def superseded(self) -> int:
        """The valid resources of which the tables have the same version from another line, or a newer version."""
        return self.valid - self.not_loaded - self.missing - self.deleted - self.loaded

    @property
    def faults(self) -> list[str]:
        """The counts that do not match, each with the action that corrects it; empty if the window reconciles."""
        faults = []
        action = f"materialize raw, validated and normalized of {self.partition_key} again"
        if self.server_total is not None and self.server_total != self.matched:
            faults.append(f"the server counts {self.server_total} but returned {self.matched}: {action}")
        arrived = self.matched + self.undated + self.received - self.repeated - self.rejected
        if self.raw != arrived:
            faults.append(f"{arrived} were received but raw holds {self.raw}: {action}")
        faults.extend(f"{defect}: restore it from a backup, or {action} with a full refresh" for defect in self.defects)
        if self.raw != self.validated and not self.defects:
            faults.append(f"raw holds {self.raw} but {self.validated} were validated: materialize validated again")
        elif self.other_parts:
            faults.append("the validated parts are not those of raw: materialize validated again")
        if self.validated != self.valid + self.dead + self.withheld:
            faults.append(
                f"{self.validated} were validated but {self.valid} are valid, {self.dead} dead and "
                f"{self.withheld} withheld: materialize validated again"
            )
        if self.unreturned:
            faults.append(
                f"the server counts {self.unreturned} resources that neither its searches by _lastUpdated nor a search "
                "without a filter return: rebuild its search index, or load an export; then materialize raw, "
                f"validated and normalized of {self.partition_key} again with a full refresh"
            )
        if self.lost:
            faults.append(
                f"{self.lost} invalid resources are in no table and no dead letter: materialize validated and "
                f"normalized of {self.partition_key} again"
            )
        if self.missing:
            faults.append(f"{self.missing} valid resources are not in the tables: materialize normalized again")
        faults.extend(notice.message for notice in self.notices if notice.severity == "error")
        return faults

    @property
    def warnings(self) -> list[str]:
        """The messages of the notices of severity ``warning``."""
        warnings = [notice.message for notice in self.notices if notice.severity == "warning"]
        if self.surplus:
            warnings.append(
                f"{self.surplus} more dead letters than the validated partition counts: a run is working on the "
                "window, or was killed; the next replay or complete validation resolves them"
            )
        if self.unreturned is None:
            warnings.append(
                "the server neither counts its resources nor returns them without a filter: whether it has resources "
                "that no search by _lastUpdated finds is unknown"
            )
        return warnings


def find_main_view(views: Sequence[View], resource_type: str) -> View | None:
    """Return the view that has a row for every resource of the type; None if there is no such view."""
    key = BY_NAME[resource_type].key
    main = next((view for view in views if view.name == key and view.resource_type == resource_type), None)
    return main if main and not main.definition.get("where") else None


def list_windows(store: Store, resource_type: str) -> list[str]:
    """Return the keys of the windows that have a raw or a validated partition, in order. Raises StoreError."""
    return sorted({key for layer in ("raw", "validated") for key in store.partition_keys(layer, resource_type)})


def reconcile(
    conn: Session,
    store: Store,
    resource_type: str,
    partition_keys: Sequence[str],
    *,
    main_view: View | None,
) -> list[WindowCounts]:
    """Return the counts of each window that has a raw or a validated partition.

    The ids of the validated partitions are compared in the database with ``fhir.resource``, and with ``main_view`` if
    every resource has a row in that view. The lines of the raw parts are counted in their files, so that a file that
    was lost or changed after its validation is a fault. If a window has fewer dead letters than its validated partition
    counts, each resource of its raw partition is looked up in the tables and among the dead letters. Posts that are
    being loaded are left out (see ``posts_in_progress``). Raises StoreError or DatabaseUnavailable.
    """
    # Validated first, so that raw has all parts that were validated.
    validated = {m.partition_key: m for m in store.manifests("validated", resource_type, partition_keys)}
    raw = {m.partition_key: m for m in store.manifests("raw", resource_type, partition_keys)}
    to_load = _count_posts_to_load(conn, resource_type, raw, validated)
    now = datetime.now(UTC)
    complete = raw
    raw = {key: without_waiting_posts(manifest, validated.get(key), now) for key, manifest in complete.items()}
    waiting = {key for key in raw if raw[key] != complete[key]}
    raw |= {key: _build_lost_manifest(manifest) for key, manifest in validated.items() if key not in raw}
    lines = _count_raw_lines(store, raw.values())
    not_loaded = reconciliation.count_unloaded(conn, resource_type, partition_keys)
    versions = reconciliation.count_versions(conn, resource_type, partition_keys)
    absent = _count_absent(conn, store, resource_type, list(validated.values()), main_view)
    rejected = {key: sum(m.validated.dead.values()) for key, m in validated.items() if m.validated}
    dead = dead_letter_resolution.count_dead(conn, resource_type, list(rejected))
    incomplete = [
        raw[key]
        for key, count in rejected.items()
        if dead.get(key, 0) < count and not _list_defects(raw[key], lines[key])
    ]
    lost = _count_lost(conn, store, resource_type, incomplete, absent)
    return [
        replace(
            _count(
                manifest,
                validated.get(key),
                not_loaded.get(key, 0),
                absent.get(key, AbsentCounts()).without(to_load.get(key, 0)),
                lines[key],
            ),
            in_progress=to_load.get(key, 0) > 0 or key in waiting,
            versions=versions.get(key, 0),
            lost=lost.get(key, 0),
            surplus=max(0, dead.get(key, 0) - rejected.get(key, 0)),
        )
        for key, manifest in raw.items()
    ]


def _count_posts_to_load(
    conn: Session, resource_type: str, raw: Mapping[str, Manifest], validated: Mapping[str, Manifest]
) -> dict[str, int]:
    """Return the numbers of validated resources that a load of posts is about to load, by partition key."""
    now = datetime.now(UTC)
    recent = [key for key in validated.keys() & raw.keys() if has_recent_posts(raw[key], now)]
    if not recent:
        return {}
    loaded = checkpoints.get_loaded_parts(conn, resource_type, recent)
    return {key: count_rows_to_load(validated[key], loaded) for key in recent}


def _build_lost_manifest(validated: Manifest) -> Manifest:
    """Return a raw partition without content for a validated one whose raw partition is not in the store."""
    return Manifest("raw", validated.resource_type, validated.partition_key, "", validated.written_at, ())


def _count_raw_lines(store: Store, raw: Collection[Manifest]) -> dict[str, list[CountedLines]]:
    """Return the counted lines of each part of the raw partitions, by partition key.

    Only the line feeds of a file are counted, which takes much less time than the comparison of the validated lines
    with the tables.
    """
    calls = 1 if isinstance(store.blobs, LocalBlobs) else CONCURRENT_CALLS
    counted = iter(map_concurrently(store.count_lines, (part for m in raw for part in m.parts), calls=calls))
    return {manifest.partition_key: [next(counted) for _ in manifest.parts] for manifest in raw}


def _count(
    raw: Manifest,
    validated: Manifest | None,
    not_loaded: int,
    absent: AbsentCounts,
    lines: Sequence[CountedLines],
) -> WindowCounts:
    fetches = raw.fetched.fetches if raw.fetched else ()
    totals = [fetch.server_total for fetch in fetches]
    known = [total for total in totals if total is not None]
    undated = [fetch.undated.found if fetch.undated else 0 for fetch in fetches]
    state = validated.validated if validated else None
    return WindowCounts(
        raw.partition_key,
        sum(known) if known and len(known) == len(totals) else None,
        sum(fetch.matched for fetch in fetches),
        sum(fetch.matched - fetch.new for fetch in fetches) + sum(undated),
        sum(fetch.dead for fetch in fetches) + sum(receipt.rejected for receipt in raw.receipts),
        sum(part.rows for part in lines),
        state.rows_in if state else 0,
        (validated.rows if validated else 0) - absent.withheld,
        sum(state.dead.values()) if state else 0,
        not_loaded,
        absent.missing,
        withheld=absent.withheld,
        received=sum(receipt.rows + receipt.rejected for receipt in raw.receipts),
        deleted=absent.deleted,
        notices=raw.fetched.notices if raw.fetched else (),
        undated=sum(undated),
        unreturned=raw.fetched.unreturned if raw.fetched else 0,
        other_parts=state is not None and state.raw_parts != {part.name for part in raw.parts},
        defects=_list_defects(raw, lines),
    )


def _list_defects(raw: Manifest, lines: Sequence[CountedLines]) -> tuple[str, ...]:
    """Return the defects of the files of a raw partition. Received parts are named, because no fetch restores them."""
    if not raw.run_id:
        return (f"raw/{raw.resource_type} of {raw.partition_key} is not in the store, although it was validated",)
    return tuple(
        counted.defect if part.origin is None else f"{counted.defect} (received from {part.origin})"
        for part, counted in zip(raw.parts, lines, strict=True)
        if counted.defect
    )


def _count_lost(
    conn: Session,
    store: Store,
    resource_type: str,
    raw: Sequence[Manifest],
    absent: Mapping[str, AbsentCounts],
) -> dict[str, int]:
    """Count by partition key the resources in raw that are not in the tables, not withheld and not dead letters.

    ``raw`` are the partitions that have fewer dead letters than their validated partition counts. Valid resources that
    are missing in the tables are left out, because ``_count_absent`` counts them.
    """
    if not raw:
        return {}
    lines = _build_raw_lines(store, raw, cipher_of(conn))
    unaccounted = reconciliation.count_unaccounted(conn, resource_type, lines)
    return {key: max(0, count - absent.get(key, AbsentCounts()).missing) for key, count in unaccounted.items()}


def _build_raw_lines(store: Store, raw: Sequence[Manifest], cipher: Cipher) -> Iterator[str]:
    """Yield the partition key, id, lastUpdated, arrival and fingerprint of each resource in raw, for COPY."""
    for manifest in raw:
        key = escape_text(manifest.partition_key)
        for batch in store.batches_with_arrivals(manifest.parts):
            for line, arrived in zip(batch.lines, batch.times(), strict=False):
                version = f"{NULL}\t{NULL}"
                with suppress(MalformedResource, UnstorableValue):
                    version = _format_version(line, dated=batch.dated, arrival_known=arrived is not None)
                fingerprint = _compute_fingerprint(manifest, "validate", line, cipher).hex()
                yield f"{key}\t{version}\t{arrived.isoformat() if arrived else NULL}\t\\\\x{fingerprint}\n"


def _count_absent(
    conn: Session, store: Store, resource_type: str, validated: Sequence[Manifest], main_view: View | None
) -> dict[str, AbsentCounts]:
    """Count by partition key the validated resources that are not in the tables and not dead letters."""
    if not any(manifest.parts for manifest in validated):
        return {}
    keys = [manifest.partition_key for manifest in validated]
    corrected = corrections.read_by_fingerprint(conn, resource_type, STAGES, keys)
    expected = _build_expected_rows(store, validated, corrected, cipher_of(conn))
    return reconciliation.count_absent(conn, resource_type, expected, main_view=main_view)


def _build_expected_rows(
    store: Store, validated: Sequence[Manifest], corrected: Mapping[str, Mapping[bytes, bytes]], cipher: Cipher
) -> Iterator[str]:
    """Yield the partition key, id, lastUpdated and arrival of each resource that the tables must contain, for COPY.

    Corrected resources are yielded with the values of their correction.
    """
    for manifest in validated:
        key = escape_text(manifest.partition_key)
        corrections_of_window = corrected.get(manifest.partition_key, {})
        for batch in store.batches_with_arrivals(manifest.parts):
            arrived = NULL
            at: datetime | None = None
            for line, moment_of_line in zip(batch.lines, batch.times(), strict=False):
                if moment_of_line is not at:
                    at = moment_of_line
                    arrived = at.isoformat() if at else NULL
                if corrections_of_window:
                    fingerprints = (_compute_fingerprint(manifest, stage, line, cipher) for stage in STAGES)
                    line = next((corrections_of_window[f] for f in fingerprints if f in corrections_of_window), line)
                version = _format_version(line, dated=batch.dated, arrival_known=at is not None)
                yield f"{key}\t{version}\t{arrived}\n"


def _format_version(line: bytes, *, dated: bool, arrival_known: bool) -> str:
    """Return the id and lastUpdated of a resource as columns for COPY. Raises MalformedResource or UnstorableValue."""
    header = read_header(line)
    text = header.meta.last_updated if header.meta else None
    moment = parse_stored(text, dated=dated, arrival_known=arrival_known)
    identity = NULL if header.id is None else escape_text(header.id)
    return f"{identity}\t{moment.isoformat() if moment else NULL}"


def _compute_fingerprint(manifest: Manifest, stage: str, line: bytes, cipher: Cipher) -> bytes:
    dead_letter = DeadLetter(manifest.resource_type, None, stage, "", "", "", line, manifest.partition_key)
    return dead_letter.fingerprint(cipher)
