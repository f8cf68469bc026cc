"""Re-encrypts the tables, the encrypted tables of ``ops`` and the store with the newest key, while loads run.

Resources are decrypted and encrypted again, and the rows of their views are rebuilt. This covers data encrypted with
older keys, data that was stored before keys were set, and columns whose type depends on whether keys are set. Each
batch is a transaction of its own. Re-encrypted data is recognized by its key id, so that a rotation can be stopped and
continued.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from time import monotonic, sleep

import psycopg

from fhir_assets.errors import ConfigurationError, DatabaseUnavailable, EncryptionError
from fhir_assets.fhir.views import View
from fhir_assets.pipeline.load.row_builder import RowBuilder
from fhir_assets.pipeline.load.stored_rows import build_stored_rows
from fhir_assets.pipeline.reencrypt.key_usage import PARTS, SECRET, KeyUsage, count_key_usage
from fhir_assets.privacy.audit import AuditRecord
from fhir_assets.privacy.encryption import Cipher
from fhir_assets.storage import reencrypt
from fhir_assets.storage.store import Store
from fhir_assets.warehouse.ops import audit_log, encryption_secret, key_rotations
from fhir_assets.warehouse.postgres.db import session_settings
from fhir_assets.warehouse.postgres.db.connections import Connection, OpenSession, Session, cipher_of
from fhir_assets.warehouse.postgres.resources import decrypt_resource
from fhir_assets.warehouse.postgres.tables import clear_landing_names, reencryption_batches, view_tables
from fhir_assets.warehouse.postgres.tables.encrypted_tables import ENCRYPTED_TABLES
from fhir_assets.warehouse.postgres.tables.loading import Loader

LOCK_TIMEOUT_MS = 500
"""How long a rotation waits for a lock. The time is shorter than the deadlock_timeout of Postgres, so that a deadlock
fails the transaction of the rotation and not the one of a load.
"""

BUSY_TIMEOUT_SECONDS = 60.0
"""How long a rotation without progress waits for rows that loads have locked."""

RESOURCES = "resources"
ROWS = "rows"
LANDING_FILES = "landing_files"


@dataclass(frozen=True, slots=True)
class ReencryptResult:
    """The counts of a rotation, and the usage of keys afterwards."""

    encrypted: Counter[str] = field(default_factory=Counter)
    """Items encrypted with the newest key, by location."""
    from_clear: Counter[str] = field(default_factory=Counter)
    """Encrypted items that were in clear text before, by location."""
    refused: Counter[str] = field(default_factory=Counter)
    """Items that could not be re-encrypted, by reason."""
    busy: Counter[str] = field(default_factory=Counter)
    """Items that loads had locked until the end, by resource type or location."""
    usage: KeyUsage = field(default_factory=lambda: KeyUsage({}))
    """The usage of keys after the rotation."""
    left_over: int = 0
    """Items that are not encrypted with the newest key."""


class ReencryptStep:
    """Re-encrypts everything with the newest key of the session's cipher.

    ``views`` are all views of the deployment. ``on_progress`` is called after each batch.
    """

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
        self._views_by_type = defaultdict[str, list[View]](list)
        for view in views:
            self._views_by_type[view.resource_type].append(view)
        self._actor = actor
        self._on_progress = on_progress
        self._busy_timeout = busy_timeout
        self._rotation = 0
        self._result = ReencryptResult()

    def run(self) -> ReencryptResult:
        """Encrypt everything with the newest key. Items that cannot be re-encrypted stay unchanged and are reported.

        Raises ConfigurationError without keys, TransientError if another rotation is running, ViewError if a table does
        not match its view, DatabaseUnavailable, or StoreError.
        """
        with self._connect() as conn, self._connect() as guard:
            cipher = cipher_of(conn)
            if not cipher.encrypts:
                raise ConfigurationError(
                    "There are no keys to rotate to: create one by `fhir-assets keys new` and set PHI_ENCRYPTION_KEYS"
                )
            guard.autocommit = True
            with key_rotations.lock_rotation(guard):
                view_tables.ensure_tables(conn, self._views)
                before = count_key_usage(guard, self._store, self._views)
                self._rotation = key_rotations.begin(conn, self._actor, self._count_remaining(before, cipher))
                conn.commit()
                # A batch is a small range of an index, which the planner cannot know before the tables are analyzed.
                session_settings.disable_sequential_scans(conn)
                self._reencrypt_all(conn, cipher)
                return self._end(conn, count_key_usage(guard, self._store, self._views), cipher)

    def _reencrypt_all(self, conn: Session, cipher: Cipher) -> None:
        older = cipher.outdated_key_ids
        newest = cipher.key_id or ""
        self._reencrypt_batches(
            conn,
            LANDING_FILES,
            LANDING_FILES,
            partial(clear_landing_names.find_rows, conn),
            partial(clear_landing_names.encrypt_rows, conn),
        )
        for encrypted_table in ENCRYPTED_TABLES:
            self._reencrypt_batches(
                conn,
                encrypted_table.name,
                encrypted_table.name,
                partial(reencryption_batches.find_rows, conn, encrypted_table, older),
                partial(reencryption_batches.reencrypt_rows, conn, encrypted_table, older),
            )
        for resource_type in reencryption_batches.find_resource_types(conn):
            views = self._views_by_type[resource_type]
            tables = reencryption_batches.find_tables_with_phi(conn, views)
            # A load of only some views encrypts the resource with the newest key, but not the rows of other views.
            sources = [
                partial(reencryption_batches.find_resources, conn, resource_type, older),
                *(
                    partial(reencryption_batches.find_outdated_rows, conn, v.name, newest)
                    for v in views
                    if tables.get(v.name)
                ),
            ]
            rebuild = partial(self._rebuild, conn, resource_type, RowBuilder(views, cipher, conn.source))
            for source in sources:
                self._reencrypt_batches(conn, RESOURCES, resource_type, source, rebuild)
        # Rows without a resource from which they could be rebuilt, or in tables without a view.
        for table, has_column in reencryption_batches.find_tables_with_phi(conn, ()).items():
            if has_column:
                left_over = partial(reencryption_batches.find_leftover_rows, conn, table, older)
                self._reencrypt_batches(
                    conn, ROWS, table, left_over, partial(reencryption_batches.reencrypt_tokens, conn, table, older)
                )
        self._reencrypt_parts(conn, cipher)

    def _reencrypt_batches(
        self,
        conn: Session,
        location: str,
        step_name: str,
        find_next: Callable[[reencryption_batches.RowKey | None], list[reencryption_batches.RowKey]],
        reencrypt_batch: Callable[[list[reencryption_batches.RowKey]], reencryption_batches.BatchResult],
    ) -> None:
        """Re-encrypt all batches in the order of their keys, and repeat this while loads have locked some of the rows.

        ``find_next`` returns the keys of the batch after a key. ``step_name`` is the name of this step in the progress.
        """
        last_progress = monotonic()
        while True:
            after: reencryption_batches.RowKey | None = None
            locked = 0
            refused = Counter[str]()
            while keys := find_next(after):
                conn.commit()
                batch = self._reencrypt_batch(conn, location, step_name, partial(reencrypt_batch, keys))
                after = keys[-1]
                locked += batch.skipped if batch else len(keys)
                if batch and batch.encrypted:
                    last_progress = monotonic()
                if batch:
                    refused += batch.refused
            conn.commit()
            if locked and monotonic() - last_progress < self._busy_timeout:
                sleep(min(1.0, self._busy_timeout / 10))
                continue
            # This method is called for the resources of a type and for each of their tables, and a refused resource is
            # counted each time. The union of two Counters has the maximum of the counts: the number of resources.
            all_refused, busy = self._result.refused, self._result.busy
            all_refused |= Counter({f"{step_name}: {reason}": count for reason, count in refused.items()})
            busy |= Counter({step_name: locked})
            return

    def _reencrypt_batch(
        self,
        conn: Session,
        location: str,
        step_name: str,
        reencrypt_batch: Callable[[], reencryption_batches.BatchResult],
    ) -> reencryption_batches.BatchResult | None:
        """Re-encrypt one batch and record it. Return None if another transaction held a lock that it needs."""
        try:
            with conn.transaction():
                session_settings.limit_lock_wait(conn, LOCK_TIMEOUT_MS)
                batch = reencrypt_batch()
                self._record(conn, location, batch.encrypted, batch.from_clear, step_name)
        except (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected, psycopg.errors.UniqueViolation):
            return None
        except DatabaseUnavailable:
            if conn.broken:
                raise
            return None
        except psycopg.OperationalError as error:
            raise DatabaseUnavailable(
                f"the connection to Postgres was lost during the rotation ({type(error).__name__}): run "
                "`fhir-assets keys rotate` again, which continues the rotation"
            ) from None
        self._result.encrypted[location] += batch.encrypted
        self._result.from_clear[location] += batch.from_clear
        self._report(conn)
        return batch

    def _rebuild(
        self, conn: Session, resource_type: str, row_builder: RowBuilder, keys: Sequence[reencryption_batches.RowKey]
    ) -> reencryption_batches.BatchResult:
        """Re-encrypt resources and rebuild the rows of their views; if that fails, re-encrypt the resource only."""
        cipher = cipher_of(conn)
        rows, skipped = reencryption_batches.lock_resources(conn, resource_type, keys)
        result = reencryption_batches.BatchResult(0, 0, skipped, Counter())
        bodies = []
        key_ids = {}
        for resource_id, key_id, text in rows:
            try:
                bodies.append(decrypt_resource(conn, resource_type, resource_id, text, key_id))
            except EncryptionError as error:
                result.refused[str(error)] += 1
                continue
            key_ids[resource_id] = key_id
        built = build_stored_rows(conn, resource_type, row_builder, list(key_ids), bodies)
        loader = Loader(conn, resource_type, self._views_by_type[resource_type], run_id="", reencrypt=True)
        unloadable = loader.add_block(built.block, bodies, "")
        result.encrypted = loader.finish().updated
        unloadable += loader.take_unloadable()
        ids = list(key_ids)
        without_rows = {ids[line.position]: f"{line.path}: {line.message}" for line in built.rejected}
        without_rows |= {item.resource_id: f"{item.view or 'resource'}: {item.message}" for item in unloadable}
        result.refused.update(reason for key, reason in without_rows.items() if key_ids[key] is None)
        newest = cipher.key_id
        resources_only = [
            (k, body) for k, body in zip(ids, bodies, strict=True) if k in without_rows and key_ids[k] != newest
        ]
        result.encrypted += reencryption_batches.encrypt_resources(conn, resource_type, resources_only)
        result.from_clear = min(list(key_ids.values()).count(None), result.encrypted)
        return result

    def _reencrypt_parts(self, conn: Session, cipher: Cipher) -> None:
        readable_keys = {*cipher.outdated_key_ids, *([None] if self._store.cipher.encrypts else ())}
        outdated = (part for part in reencrypt.list_part_keys(self._store) if part[1] in readable_keys)
        results = reencrypt.reencrypt(self._store, outdated, cipher)
        while group := list(islice(results, reencrypt.BATCH_PARTS)):
            reencrypted = [key for _, key, error in group if error is None]
            from_clear = reencrypted.count(None)
            with conn.transaction():
                self._record(conn, PARTS, len(reencrypted), from_clear, PARTS)
            self._result.encrypted[PARTS] += len(reencrypted)
            self._result.from_clear[PARTS] += from_clear
            self._result.refused.update(str(error) for _, _, error in group if error is not None)
            self._report(conn)

    def _record(self, conn: Session, location: str, encrypted: int, from_clear: int, step_name: str) -> None:
        key_rotations.advance(conn, self._rotation, step_name, encrypted)
        detail: dict[str, str | int | bool | None] = {
            "place": location,
            "key": cipher_of(conn).keys[0].id,
            "from_clear": from_clear,
            "rotation": self._rotation,
        }
        resource_type = step_name if location == RESOURCES else None
        audit_log.record(conn, AuditRecord("key rotation", self._actor, resource_type, count=encrypted, detail=detail))

    def _report(self, conn: Connection) -> None:
        progress = key_rotations.get_latest(conn)
        conn.commit()
        if progress:
            self._on_progress(progress)

    def _end(self, conn: Session, usage: KeyUsage, cipher: Cipher) -> ReencryptResult:
        """Record the end of the rotation, and re-encrypt the secret of the hashes if no older key is needed any more.

        Every start checks the key of the secret, so an older key that is still needed cannot be removed unnoticed.
        """
        needed = [
            key.id
            for key in cipher.keys[1:]
            if any(n for location, n in usage.count_by_location(key.id).items() if location != SECRET)
        ]
        if not needed and encryption_secret.reencrypt(conn, cipher):
            self._record(conn, SECRET, 1, 0, SECRET)
            usage = KeyUsage({**usage.counts, SECRET: Counter({cipher.key_id: 1})})
        left_over = self._count_remaining(usage, cipher, rows=True)
        key_rotations.end(conn, self._rotation, left_over)
        conn.commit()
        return replace(self._result, usage=usage, left_over=left_over)

    def _count_remaining(self, usage: KeyUsage, cipher: Cipher, *, rows: bool = False) -> int:
        """Count the items that are not encrypted with the newest key. Rows are part of their resources by default."""
        remaining = 0
        for location, counts in usage.counts.items():
            cleartext_intended = location == PARTS and not self._store.cipher.encrypts
            if location != ROWS or rows:
                remaining += sum(
                    n for key, n in counts.items() if key != cipher.key_id and (key or not cleartext_intended)
                )
        return remaining
