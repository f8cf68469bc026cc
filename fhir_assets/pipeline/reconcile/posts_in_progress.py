"""Posts that are being loaded while their window is reconciled.

Posts arrive at any moment, and the post loader loads them within a second. Without this module, the check
``reconciles`` of the present window would fail whenever it is evaluated between the receipt and the load of a post. A
post that is not loaded after GRACE counts like every other resource.
"""

from collections.abc import Mapping
from datetime import datetime

import msgspec

from fhir_assets.storage.manifest import Manifest, Receipt
from fhir_assets.warehouse.ops.post_loader import GRACE

_CHANNELS = ("api:", "landing:batch-")
"""The beginnings of the origins of posted records, and of batches of posted lists of visits."""


def has_recent_posts(raw: Manifest, now: datetime) -> bool:
    """Return whether the raw partition received posts less than GRACE ago."""
    return any(_is_recent(receipt, now) for receipt in raw.receipts)


def without_waiting_posts(raw: Manifest, validated: Manifest | None, now: datetime) -> Manifest:
    """Return the raw partition without recent posts that are not validated yet.

    ``validated`` must have been read from the store before ``raw``.
    """
    done = validated.validated.raw_parts if validated and validated.validated else frozenset()
    recent = {receipt.origin for receipt in raw.receipts if _is_recent(receipt, now)}
    waiting = {part.origin for part in raw.parts if part.origin in recent and part.name not in done}
    if not waiting:
        return raw
    return msgspec.structs.replace(
        raw,
        parts=tuple(part for part in raw.parts if part.origin not in waiting),
        receipts=tuple(receipt for receipt in raw.receipts if receipt.origin not in waiting),
    )


def count_rows_to_load(validated: Manifest, loaded: Mapping[str, frozenset[str]]) -> int:
    """Return the number of resources in the parts of a validated partition that are not loaded yet.

    ``loaded`` are the names of the loaded parts by partition key.
    """
    names = loaded.get(validated.partition_key, frozenset())
    return sum(part.rows for part in validated.parts if part.name not in names)


def _is_recent(receipt: Receipt, now: datetime) -> bool:
    return receipt.origin.startswith(_CHANNELS) and receipt.at > now - GRACE
