"""Everything sealed anew with the newest key, while loads go on: the tables, what waits in ``ops``, and the store.

Resources are read, opened and sealed, and the rows of their views are made of them anew: that serves what another key
sealed, what was stored before there were keys, and columns that keys gave another type. What is done shows in the
data, so a rotation that was stopped, however, goes on where it was. Each batch is a transaction of its own.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from itertools import islice
from time import monotonic, sleep

import psycopg

from fhir_assets.errors import ConfigurationError, DatabaseUnavailable, EncryptionError
from fhir_assets.fhir.views import View
from fhir_assets.pipeline.load.row_builder import Batch, RowBuilder
from fhir_assets.privacy.audit import AuditRecord
from fhir_assets.privacy.encryption import Cipher
from fhir_assets.storage import reencrypt
from fhir_assets.storage.store import Store
from fhir_assets.warehouse.ops import audit_log, encryption_secret, key_rotations
from fhir_assets.warehouse.postgres.db import session_settings
from fhir_assets.warehouse.postgres.db.connections import Connection, OpenSession, Session, cipher_of
from fhir_assets.warehouse.postgres.resources import open_text
from fhir_assets.warehouse.postgres.tables import reencryption_batches, view_tables
from fhir_assets.warehouse.postgres.tables.loading import Loader

LOCK_TIMEOUT_MS = 500
"""Less than Postgres's deadlock_timeout: in a deadlock it is always the rotation that gives way."""

BUSY_TIMEOUT_SECONDS = 60.0
"""How long rows that a load holds are waited for, without any progress."""

RESOURCES = "resources"
ROWS = "rows"
PARTS = "parts"
SECRET = "secret"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class KeyUsage:
    """What is sealed by which key, counted: by place, then by the key's id; None: in the clear.

    Places: ``resources`` (fhir.resource), ``rows`` (of the views), ``withheld``, ``consents``, ``dead_letters``,
    ``corrections``, ``answers`` (ops.idempotency), ``parts`` (of the store), ``secret`` (of the hashes).
    """

    found: Mapping[str, Counter[str | None]]

    @property
    def keys(self) -> list[str | None]:
        """Every key that seals anything."""
        return list(dict.fromkeys(key for counts in self.found.values() for key, count in counts.items() if count))

    def count_by_location(self, key: str | None) -> dict[str, int]:
        """How many a key seals in each place."""
        return {place: counts[key] for place, counts in self.found.items()}

    def is_used(self, key: str | None) -> bool:
        """Whether anything is sealed by a key."""
        return any(self.count_by_location(key).values())


@dataclass(slots=True)
class ReencryptResult:
    """What a rotation did: ``sealed`` by place, ``from_clear`` those of them that nothing sealed before; ``refused``
    says why something could not be, and how often; ``busy`` counts what loads held to the last, by type or place;
    ``usage`` is what there is afterwards, of which ``left_over`` are not sealed by the newest key.
    """

    sealed: Counter[str] = field(default_factory=Counter)
    from_clear: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    busy: Counter[str] = field(default_factory=Counter)
    usage: KeyUsage = field(default_factory=lambda: KeyUsage({}))
    left_over: int = 0


def count_key_usage(conn: Connection, store: Store, views: Sequence[View]) -> KeyUsage:
    """Look through the whole database and the whole store. Raises StoreError."""
    found = reencryption_batches.count_rows_by_key(conn, views)
    found[PARTS] = Counter(key for _, key in reencrypt.sealed_parts(store))
    found[SECRET] = Counter(filter(None, [encryption_secret.key_of_secret(conn)]))
    return KeyUsage(found)


class ReencryptStep:
    """Rotates to the newest key of the connection. ``views`` are all there are; ``tell`` hears of each batch."""

    def __init__(
        self,
        connect: OpenSession,
        store: Store,
        views: Sequence[View],
        *,
        actor: str,
        on_progress: Callable[[key_rotations.Rotation], None] = lambda progress: None,
        busy_timeout: float = BUSY_TIMEOUT_SECONDS,
    ) -> None:
        self._connect = connect
        self._store = store
        self._views = views
        self._of_type = defaultdict[str, list[View]](list)
        for view in views:
            self._of_type[view.resource_type].append(view)
        self._actor = actor
        self._on_progress = on_progress
        self._busy_timeout = busy_timeout
        self._rotation = 0
        self.done = ReencryptResult()
        """What it did so far."""

    def run(self) -> ReencryptResult:
        """Seal everything with the newest key; what cannot be stays as it is, and is told.

        Raises ConfigurationError without keys, TransientError if a rotation is under way already, ViewError if a
        table does not fit its view, DatabaseUnavailable, or StoreError.
        """
        with self._connect() as conn, self._connect() as guard:
            cipher = cipher_of(conn)
            if not cipher.on:
                raise ConfigurationError(
                    "There are no keys to rotate to: make one with `fhir-assets keys new` and set PHI_ENCRYPTION_KEYS"
                )
            guard.autocommit = True
            with key_rotations.alone(guard):
                view_tables.ensure_tables(conn, self._views)
                before = count_key_usage(guard, self._store, self._views)
                self._rotation = key_rotations.begin(conn, self._actor, self._to_do(before, cipher))
                conn.commit()
                # A batch is a small stretch of an index. Tables that were not analyzed yet do not show it.
                session_settings.disable_sequential_scans(conn)
                self._all(conn, cipher)
                self._end(conn, count_key_usage(guard, self._store, self._views), cipher)
        return self.done

    def _all(self, conn: Session, cipher: Cipher) -> None:
        older = [key.id for key in cipher.keys[1:]]
        newest = cipher.keys[0].id
        for place in reencryption_batches.ENCRYPTED_TABLES:
            self._sweep(
                conn,
                place.name,
                place.name,
                partial(reencryption_batches.find_rows, conn, place, older),
                partial(reencryption_batches.reencrypt_rows, conn, place, older),
            )
        for resource_type in reencryption_batches.find_resource_types(conn):
            views = self._of_type[resource_type]
            there = reencryption_batches.find_tables_with_phi(conn, views)
            # Rows last: those of resources that are sealed already, by a load of some of the views.
            sources = [
                partial(reencryption_batches.find_resources, conn, resource_type, older),
                *(
                    partial(reencryption_batches.find_outdated_rows, conn, v.name, newest)
                    for v in views
                    if there.get(v.name)
                ),
            ]
            remake = partial(self._remake, conn, resource_type, RowBuilder(views, cipher))
            for source in sources:
                self._sweep(conn, RESOURCES, resource_type, source, remake)
        # What has no resource that it could be made of, or no view any more.
        for table, has_column in reencryption_batches.find_tables_with_phi(conn, ()).items():
            if has_column:
                left_over = partial(reencryption_batches.find_leftover_rows, conn, table, older)
                self._sweep(
                    conn, ROWS, table, left_over, partial(reencryption_batches.reencrypt_tokens, conn, table, older)
                )
        self._parts(conn, cipher)

    def _sweep(
        self,
        conn: Session,
        place: str,
        label: str,
        following: Callable[[reencryption_batches.RowKey | None], list[reencryption_batches.RowKey]],
        compress_and_encrypt: Callable[[list[reencryption_batches.RowKey]], reencryption_batches.BatchResult],
    ) -> None:
        """Batch after batch, from the first to the last; again while loads hold some of them."""
        progressed = monotonic()
        while True:
            after: reencryption_batches.RowKey | None = None
            held = 0
            refused = Counter[str]()
            while keys := following(after):
                conn.commit()
                batch = self._one(conn, place, label, partial(compress_and_encrypt, keys))
                after = keys[-1]
                held += batch.passed_over if batch else len(keys)
                if batch and batch.sealed:
                    progressed = monotonic()
                if batch:
                    refused += batch.refused
            conn.commit()
            if held and monotonic() - progressed < self._busy_timeout:
                sleep(min(1.0, self._busy_timeout / 10))
                continue
            # A resource that is refused comes once more with each of its tables.
            self.done.refused |= Counter({f"{label}: {why}": n for why, n in refused.items()})
            self.done.busy |= Counter({label: held})
            return

    def _one(
        self,
        conn: Session,
        place: str,
        label: str,
        compress_and_encrypt: Callable[[], reencryption_batches.BatchResult],
    ) -> reencryption_batches.BatchResult | None:
        """One batch and its record; None if somebody else held a lock that it needs."""
        try:
            with conn.transaction():
                session_settings.limit_lock_wait(conn, LOCK_TIMEOUT_MS)
                batch = compress_and_encrypt()
                self._note(conn, place, batch.sealed, batch.from_clear, label)
        except (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected, psycopg.errors.UniqueViolation):
            return None
        except DatabaseUnavailable:
            if conn.broken:
                raise
            return None
        except psycopg.OperationalError as error:
            raise DatabaseUnavailable(
                f"Postgres went away during the rotation ({type(error).__name__}): run `fhir-assets keys rotate` "
                "again, it goes on where it was"
            ) from None
        self.done.sealed[place] += batch.sealed
        self.done.from_clear[place] += batch.from_clear
        self._report(conn)
        return batch

    def _remake(
        self, conn: Session, resource_type: str, make: RowBuilder, keys: Sequence[reencryption_batches.RowKey]
    ) -> reencryption_batches.BatchResult:
        """Seal resources, and make the rows of all of their views anew; where that fails, the resources alone."""
        cipher = cipher_of(conn)
        rows, passed_over = reencryption_batches.lock_resources(conn, resource_type, keys)
        done = reencryption_batches.BatchResult(0, 0, passed_over, Counter())
        bodies = []
        sealed_with = {}
        for resource_id, key_id, text in rows:
            try:
                bodies.append(open_text(text, key_id, cipher))
            except EncryptionError as error:
                done.refused[str(error)] += 1
                continue
            sealed_with[resource_id] = key_id
        made = make(Batch(bodies, "", _EPOCH))
        loader = Loader(conn, resource_type, self._of_type[resource_type], run_id="", reencrypt=True)
        unloadable = loader.add_block(made.block, bodies, "")
        done.sealed = loader.finish().updated
        unloadable += loader.take_unloadable()
        ids = list(sealed_with)
        without_rows = {ids[each.position]: f"{each.path}: {each.message}" for each in made.rejected}
        without_rows |= {each.resource_id: f"{each.view or 'resource'}: {each.message}" for each in unloadable}
        done.refused.update(why for key, why in without_rows.items() if sealed_with[key] is None)
        newest = cipher.key_id
        alone = [
            (k, body) for k, body in zip(ids, bodies, strict=True) if k in without_rows and sealed_with[k] != newest
        ]
        done.sealed += reencryption_batches.encrypt_resources(conn, resource_type, alone)
        done.from_clear = min(list(sealed_with.values()).count(None), done.sealed)
        return done

    def _parts(self, conn: Session, cipher: Cipher) -> None:
        openable = {key.id for key in cipher.keys[1:]} | ({None} if self._store.cipher.on else set())
        to_do = (part for part in reencrypt.sealed_parts(self._store) if part[1] in openable)
        results = reencrypt.reencrypt(self._store, to_do, cipher)
        while group := list(islice(results, reencrypt.AT_ONCE)):
            good = [key for _, key, error in group if error is None]
            clear = good.count(None)
            with conn.transaction():
                self._note(conn, PARTS, len(good), clear, PARTS)
            self.done.sealed[PARTS] += len(good)
            self.done.from_clear[PARTS] += clear
            self.done.refused.update(str(error) for _, _, error in group if error is not None)
            self._report(conn)

    def _note(self, conn: Session, place: str, sealed: int, from_clear: int, label: str) -> None:
        key_rotations.advance(conn, self._rotation, label, sealed)
        detail = {"place": place, "key": cipher_of(conn).key_id, "from_clear": from_clear, "rotation": self._rotation}
        resource_type = label if place == RESOURCES else None
        audit_log.record(conn, AuditRecord("key rotation", self._actor, resource_type, count=sealed, detail=detail))

    def _report(self, conn: Connection) -> None:
        progress = key_rotations.latest(conn)
        conn.commit()
        if progress:
            self._on_progress(progress)

    def _end(self, conn: Session, found: KeyUsage, cipher: Cipher) -> None:
        """Say what is left. The secret comes last: until then nobody can take an older key away unnoticed."""
        needed = [
            key.id
            for key in cipher.keys[1:]
            if any(n for p, n in found.count_by_location(key.id).items() if p != SECRET)
        ]
        if not needed and encryption_secret.reencrypt(conn, cipher):
            self._note(conn, SECRET, 1, 0, SECRET)
            found = KeyUsage({**found.found, SECRET: Counter({cipher.key_id: 1})})
        left_over = self._to_do(found, cipher, rows=True)
        key_rotations.end(conn, self._rotation, left_over)
        conn.commit()
        self.done.usage = found
        self.done.left_over = left_over

    def _to_do(self, found: KeyUsage, cipher: Cipher, *, rows: bool = False) -> int:
        """How many the newest key is to seal still. Rows go with their resources, and are counted only if asked for."""
        left = 0
        for place, counts in found.found.items():
            clear_is_meant = place == PARTS and not self._store.cipher.on
            if place != ROWS or rows:
                left += sum(n for key, n in counts.items() if key != cipher.key_id and (key or not clear_is_meant))
        return left
