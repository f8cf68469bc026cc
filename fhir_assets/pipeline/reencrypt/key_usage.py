"""Counts how many items in the database and in the store each encryption key encrypts."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fhir_assets.fhir.views import View
from fhir_assets.privacy.encryption import BOUND
from fhir_assets.storage import reencrypt
from fhir_assets.storage.store import Store
from fhir_assets.warehouse.ops import encryption_secret
from fhir_assets.warehouse.postgres.db.connections import Connection
from fhir_assets.warehouse.postgres.tables import reencryption_batches

PARTS = "parts"
SECRET = "secret"


@dataclass(frozen=True, slots=True)
class KeyUsage:
    """The number of stored items by location and stored key id; key None counts items in clear text.

    Locations: ``resources`` (fhir.resource), ``rows`` (of the views), ``withheld``, ``consents``, ``dead_letters``,
    ``corrections``, ``landing_files`` (their names), ``answers`` (ops.idempotency), ``parts`` (of the store),
    ``secret`` (of the hashes).
    """

    counts: Mapping[str, Counter[str | None]]

    @property
    def keys(self) -> list[str | None]:
        """The ids of all keys in use; None if anything is in clear text."""
        stored = [key for by_key in self.counts.values() for key, count in by_key.items() if count]
        return list(dict.fromkeys(key and key.removesuffix(BOUND) for key in stored))

    def count_by_location(self, key: str | None) -> dict[str, int]:
        """Return how many items of each location use a key, bound to their places or not."""
        if key is None:
            return {location: by_key[None] for location, by_key in self.counts.items()}
        return {location: by_key[key] + by_key[key + BOUND] for location, by_key in self.counts.items()}

    def count_unbound(self) -> dict[str, int]:
        """Return how many encrypted items of each location are not bound to their places, by an earlier release."""
        return {
            location: sum(count for key, count in by_key.items() if key and not key.endswith(BOUND))
            for location, by_key in self.counts.items()
        }

    def is_used(self, key: str | None) -> bool:
        """Return whether any item uses a key."""
        return any(self.count_by_location(key).values())


def count_key_usage(conn: Connection, store: Store, views: Sequence[View]) -> KeyUsage:
    """Count the keys of everything that is encrypted in the database and in the store. Raises StoreError."""
    counts = reencryption_batches.count_rows_by_key(conn, views)
    counts[PARTS] = Counter(key for _, key in reencrypt.list_part_keys(store))
    counts[SECRET] = Counter(filter(None, [encryption_secret.get_key_id(conn)]))
    return KeyUsage(counts)
