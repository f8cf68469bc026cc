"""Encrypts names of files of landing zones that were recorded without keys. A key rotation begins with them."""

from collections import Counter
from collections.abc import Sequence

from fhir_assets.warehouse.ops import landing_file_names
from fhir_assets.warehouse.postgres.db.connections import Session
from fhir_assets.warehouse.postgres.tables.reencryption_batches import BATCH_ROWS, BatchResult, RowKey


def find_rows(conn: Session, after: RowKey | None) -> list[RowKey]:
    """Return the next keys after ``after`` of rows whose names are in the clear."""
    return list(landing_file_names.find_clear(conn, after=after or ("", "", ""), limit=BATCH_ROWS))


def encrypt_rows(conn: Session, keys: Sequence[RowKey]) -> BatchResult:
    """Encrypt the names of rows that are still in the clear and not locked by another transaction."""
    count = landing_file_names.encrypt_clear(conn, [(*key,) for key in keys], skip_locked=True)
    return BatchResult(count, count, len(keys) - count, Counter())
