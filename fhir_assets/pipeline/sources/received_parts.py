"""Moves or keeps the received parts of raw partitions when the fetched partitions of their source are set aside.

Received parts come from other channels than the source: landing files, the HTTP API, CSV visits, corrections. They are
kept when the fetched parts of a partition are set aside, and moved when the boundaries of windows change.
"""

from collections import Counter, defaultdict
from collections.abc import Container, Iterable
from contextlib import suppress
from datetime import datetime, timedelta

import msgspec

from fhir_assets.fhir.record import MalformedResource, parse_stored, read_header
from fhir_assets.storage.manifest import Manifest, Part, Receipt
from fhir_assets.storage.part_writer import PartWriter
from fhir_assets.storage.store import Store
from fhir_assets.warehouse.ops.received import ReceivedWindow
from fhir_assets.windows import WindowScheme

_Key = tuple[str, str]
"""A resource type and a partition key."""


def is_window(scheme: WindowScheme, key: str) -> bool:
    """Return whether ``key`` is the partition key of a window of the scheme."""
    try:
        window = scheme.window(key)
    except ValueError:
        return False
    return scheme.window_at(window.end - timedelta(microseconds=1)) == window


def keep_received(manifest: Manifest, dropped: Container[str]) -> Manifest:
    """Return the manifest with its received parts only, except those whose origins are in ``dropped``."""
    parts = tuple(part for part in manifest.parts if part.origin is not None and part.origin not in dropped)
    receipts = tuple(receipt for receipt in manifest.receipts if receipt.origin not in dropped)
    return msgspec.structs.replace(manifest, parts=parts, receipts=receipts, fetched=None)


def move_received(
    store: Store, manifests: Iterable[Manifest], scheme: WindowScheme
) -> tuple[dict[_Key, Manifest], dict[str, list[ReceivedWindow]]]:
    """Write the received parts of raw partitions again, into the windows of ``scheme``.

    Return the new partitions by resource type and key, and the windows of each origin for ``ops.received``. The given
    partitions are not changed. Raises StoreError.
    """
    partitions: dict[_Key, Manifest] = {}
    windows = defaultdict[str, list[ReceivedWindow]](list)
    for manifest in manifests:
        for receipt in manifest.receipts:
            parts = [part for part in manifest.parts if part.origin == receipt.origin]
            for key, moved in _write_to_windows(store, manifest.resource_type, receipt, parts, scheme).items():
                partition = (manifest.resource_type, key)
                rows = sum(part.rows for part in moved)
                rejected = receipt.rejected if key == scheme.window_at(receipt.at).key else 0
                new = Manifest(
                    "raw",
                    manifest.resource_type,
                    key,
                    manifest.run_id,
                    manifest.written_at,
                    moved,
                    receipts=(Receipt(receipt.origin, receipt.at, rows, rejected),),
                )
                partitions[partition] = _add(partitions.get(partition), new)
                windows[receipt.origin].append(
                    ReceivedWindow(*partition, tuple(part.name for part in moved), rows, rejected)
                )
    return partitions, {origin: _sum_windows(entries) for origin, entries in windows.items()}


def _write_to_windows(
    store: Store, resource_type: str, receipt: Receipt, parts: Iterable[Part], scheme: WindowScheme
) -> dict[str, tuple[Part, ...]]:
    with PartWriter(store, "raw") as writer:
        for batch in store.batches_with_arrivals(parts):
            for line, arrived in zip(batch.lines, batch.times(), strict=False):
                moment = _read_last_updated(line, dated=batch.dated, arrival_known=arrived is not None)
                window = scheme.window_at(min(moment or arrived or receipt.at, receipt.at))
                writer.add(resource_type, window.key, line, moment, arrived=arrived, dated=batch.dated)
        written = writer.finish()
    moved = {
        key: tuple(msgspec.structs.replace(part, origin=receipt.origin) for part in new)
        for (_, key), new in written.items()
    }
    if receipt.rejected:
        moved.setdefault(scheme.window_at(receipt.at).key, ())
    return moved


def _read_last_updated(line: bytes, *, dated: bool, arrival_known: bool) -> datetime | None:
    with suppress(MalformedResource):
        meta = read_header(line).meta
        return parse_stored(meta.last_updated if meta else None, dated=dated, arrival_known=arrival_known)
    return None


def _add(current: Manifest | None, new: Manifest) -> Manifest:
    """Add parts to a partition. Receipts of one origin that came from several old windows are merged."""
    if current is None:
        return new
    receipts = {receipt.origin: receipt for receipt in current.receipts}
    for receipt in new.receipts:
        if earlier := receipts.get(receipt.origin):
            receipt = msgspec.structs.replace(
                receipt, rows=receipt.rows + earlier.rows, rejected=receipt.rejected + earlier.rejected
            )
        receipts[receipt.origin] = receipt
    return msgspec.structs.replace(current, parts=(*current.parts, *new.parts), receipts=tuple(receipts.values()))


def _sum_windows(entries: Iterable[ReceivedWindow]) -> list[ReceivedWindow]:
    parts = defaultdict[_Key, tuple[str, ...]](tuple)
    rows, rejected = Counter[_Key](), Counter[_Key]()
    for entry in entries:
        key = entry.resource_type, entry.partition_key
        parts[key] += entry.parts
        rows[key] += entry.rows
        rejected[key] += entry.rejected
    return [ReceivedWindow(*key, names, rows[key], rejected[key]) for key, names in parts.items()]
