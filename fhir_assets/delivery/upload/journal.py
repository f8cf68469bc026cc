"""The journal of an upload: a SQLite file that survives a kill and uses a constant amount of memory.

A commit is on disk when it returns. Batches that were in flight at a kill are sent again, which is harmless because an
update (PUT) is idempotent. If there are keys, resources and outcomes are encrypted, and files have numbers in place of
their names, which may be those of patients.
"""

import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import orjson

from fhir_assets.delivery.upload.files import Unusable, rename_location
from fhir_assets.errors import ConfigurationError, StoreError, StoreForbidden, StoreFull
from fhir_assets.fhir.bundles import BundleEntry, EntryResult, ReferenceTarget, find_references
from fhir_assets.file_modes import PRIVATE, create_folders
from fhir_assets.privacy.encryption import Cipher
from fhir_assets.privacy.places import undelivered_place

_SCHEMA = """
    CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT);
    CREATE TABLE batches (
        resource_type TEXT, file TEXT, lane INTEGER, number INTEGER,
        created INTEGER, updated INTEGER, unchanged INTEGER, PRIMARY KEY (resource_type, file, lane, number)
    ) WITHOUT ROWID;
    CREATE TABLE held (
        n INTEGER PRIMARY KEY AUTOINCREMENT, resource_type TEXT, id TEXT, place TEXT, body BLOB, status INTEGER,
        outcome BLOB, own_type INTEGER, first_pass INTEGER, UNIQUE (resource_type, id)
    );
    CREATE TABLE failures (
        n INTEGER PRIMARY KEY, resource_type TEXT, id TEXT, place TEXT, body BLOB, status INTEGER, outcome BLOB,
        message TEXT
    );
    CREATE INDEX IF NOT EXISTS failures_by_id ON failures (resource_type, id);
    CREATE TEMP TABLE edges (source INTEGER, target INTEGER, PRIMARY KEY (source, target)) WITHOUT ROWID;
"""
_ROWS_PER_QUERY = 100
_PRIMARY_CODE = 0xFF
"""The bits of an error code of SQLite that name the error, without its cause (https://sqlite.org/rescode.html)."""


@dataclass(frozen=True, slots=True)
class BatchKey:
    """The key of a batch: resources of one type and one file that the same lane sends, numbered from 0."""

    resource_type: str
    file: str
    lane: int
    number: int


@dataclass(slots=True)
class BatchResult:
    """The results of the entries of a batch."""

    created: int = 0
    updated: int = 0
    unchanged: int = 0
    acknowledged: list[BundleEntry] = field(default_factory=list)
    held: list[tuple[BundleEntry, EntryResult]] = field(default_factory=list)
    failed: list[tuple[BundleEntry, EntryResult]] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class HeldEntry:
    """An entry that waits for another attempt.

    ``first_pass`` is the HTTP status of its delivery without circular references; 0 if there was none.
    """

    n: int
    entry: BundleEntry
    result: EntryResult
    first_pass: int


@dataclass(frozen=True, slots=True)
class Failure:
    """A resource that was not delivered: its location in the input, the HTTP status (0: none) and the reason."""

    resource_type: str
    id: str | None
    location: str
    body: bytes
    status: int
    outcome: bytes
    message: str

    @property
    def line(self) -> bytes:
        """The failure as a line of ``upload_failures.ndjson``."""
        head = orjson.dumps({"status": self.status or None, "reason": self.message, "place": self.location})[:-1]
        resource = self.body if _is_json(self.body) else orjson.dumps(self.body.decode("utf-8", "replace"))
        return b'%b,"outcome":%b,"resource":%b}\n' % (head, self.outcome or b"null", resource)


class Journal:
    """The state of one upload, for use by one thread. If ``path`` is None, a temporary file stores it."""

    def __init__(self, path: Path | None = None, *, cipher: Cipher) -> None:
        self._cipher = cipher
        self._numbers: dict[str, str] = {}
        self._names: dict[str, str] = {}
        if path is not None:
            create_folders(path.parent)
            path.touch(PRIVATE)
        self.path = path
        self._db = sqlite3.connect("" if path is None else path, isolation_level=None, timeout=0)
        # An exclusive lock keeps other uploads out and saves system calls: one write and one fsync for each commit.
        self._db.execute("PRAGMA locking_mode = EXCLUSIVE")
        try:
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.create_function("reason", 6, self._reason, deterministic=True)
            self._db.executescript(_SCHEMA.replace("CREATE TABLE", "CREATE TABLE IF NOT EXISTS"))
        except sqlite3.OperationalError as error:
            self._db.close()
            if error.sqlite_errorcode & _PRIMARY_CODE == sqlite3.SQLITE_BUSY:
                raise ConfigurationError(
                    "another upload of this input to this server is running: wait until it ends, or stop it"
                ) from None
            raise self._build_error(error) from None
        self._any_open = self.held_count() + self.failed_count() > 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.close()
        if isinstance(error, sqlite3.OperationalError):
            raise self._build_error(error) from None

    def _build_error(self, error: sqlite3.OperationalError) -> StoreError:
        code = (error.sqlite_errorcode or 0) & _PRIMARY_CODE
        kind = StoreForbidden if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM) else StoreFull
        # The message of SQLite, such as "database or disk is full", contains no data.
        return kind(
            f"the journal of the upload, {self.path}, cannot be written: {error}. Free space, then run the same "
            "command with --resume"
        )

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def hide_names(self, names: Sequence[str]) -> None:
        """Write numbers in place of the names of the files, if there are keys. A resumed upload has the same files."""
        if self._cipher.encrypts:
            self._numbers = {name: str(number) for number, name in enumerate(names)}
            self._names = {number: name for name, number in self._numbers.items()}

    def hide(self, location: str) -> str:
        """Return a location, ``file:line`` or ``file``, as this journal has it."""
        return rename_location(location, lambda name: self._numbers.get(name, name))

    def show(self, location: str) -> str:
        """Reverse ``hide``. Names that an earlier release wrote are returned unchanged."""
        return rename_location(location, lambda name: self._names.get(name, name))

    def read_facts(self) -> dict[str, str]:
        """Return the facts about the whole upload by name."""
        return dict(self._db.execute("SELECT name, value FROM facts"))

    def begin(self, count: Callable[[Callable[[Unusable], None]], dict[str, str]]) -> None:
        """Begin a new upload and delete the state of the previous one.

        ``count`` reads the input, passes each unusable line to its argument and returns the facts of the upload.
        """
        with self._db:
            self._db.execute("BEGIN")
            for table in ("facts", "batches", "held", "failures"):
                self._db.execute(f"DELETE FROM {table}")  # noqa: S608
            self._db.executemany("INSERT INTO facts VALUES (?, ?)", count(self._refuse).items())
        self._any_open = self.failed_count() > 0

    def _refuse(self, line: Unusable) -> None:
        location = self.hide(line.location)
        self._db.execute(
            """
            INSERT INTO failures (resource_type, id, place, body, status, outcome, message)
            VALUES (?, NULL, ?, ?, 0, x'', ?)
            """,
            (
                line.resource_type,
                location,
                self._cipher.compress_and_encrypt(
                    line.body, undelivered_place("body", line.resource_type, None, location)
                ),
                line.message,
            ),
        )

    def resume(self, facts: dict[str, str]) -> None:
        """Resume the upload: update its facts and hold failed entries for another attempt."""
        with self._db:
            self._db.execute("BEGIN")
            self._db.executemany("INSERT OR REPLACE INTO facts VALUES (?, ?)", facts.items())
            self._db.execute("""
                INSERT OR IGNORE INTO held (resource_type, id, place, body, status, outcome, own_type, first_pass)
                SELECT resource_type, id, place, body, status, outcome, 0, 0
                FROM failures
                WHERE id IS NOT NULL
            """)
            self._db.execute("DELETE FROM failures WHERE id IS NOT NULL")
        self._any_open = self.held_count() + self.failed_count() > 0

    def is_done(self, key: BatchKey) -> bool:
        """Return whether a batch was sent and its results are committed."""
        query = "SELECT 1 FROM batches WHERE resource_type = ? AND file IN (?, ?) AND lane = ? AND number = ?"
        params = (key.resource_type, self.hide(key.file), key.file, key.lane, key.number)
        return self._db.execute(query, params).fetchone() is not None

    def commit(self, key: BatchKey, done: BatchResult) -> None:
        """Write the results of a batch to disk."""
        with self._db:
            self._db.execute("BEGIN")
            self._count(key, done)
            self._hold(done.held)
            self._db.executemany(
                """
                INSERT INTO failures (resource_type, id, place, body, status, outcome, message)
                VALUES (?, ?, ?, ?, ?, ?, ?)
                """,
                ((*self._row(entry, result), result.reason) for entry, result in done.failed),
            )
            if self._any_open:
                # An accepted line is the newest of its resource: an older line must not be sent after it.
                names = [(entry.resource_type, entry.id) for entry in done.acknowledged]
                self._db.executemany("DELETE FROM held WHERE resource_type = ? AND id = ?", names)
                self._db.executemany("DELETE FROM failures WHERE resource_type = ? AND id = ?", names)
        self._any_open = self._any_open or bool(done.held or done.failed)

    def _count(self, key: BatchKey, done: BatchResult) -> None:
        self._db.execute(
            "INSERT INTO batches VALUES (?, ?, ?, ?, ?, ?, ?)",
            (key.resource_type, self.hide(key.file), key.lane, key.number, done.created, done.updated, done.unchanged),
        )

    def _hold(self, held: Iterable[tuple[BundleEntry, EntryResult]]) -> None:
        self._db.executemany(
            """
            INSERT INTO held (resource_type, id, place, body, status, outcome, own_type, first_pass)
            VALUES (?, ?, ?, ?, ?, ?, ?, 0)
            ON CONFLICT DO UPDATE SET
                place = excluded.place,
                body = excluded.body,
                status = excluded.status,
                outcome = excluded.outcome
            """,
            (
                (
                    *self._row(entry, result),
                    any(name == entry.resource_type for name, _ in find_references(entry.body)),
                )
                for entry, result in held
            ),
        )  # fmt: skip

    def next_number(self) -> int:
        """Return the first free number for batches of retried entries, which belong to no file."""
        query = "SELECT coalesce(max(number) + 1, 0) FROM batches WHERE file = ''"
        return int(self._db.execute(query).fetchone()[0])

    def held_count(self, *, own_type_of: str | None = None) -> int:
        """Count the held entries; with ``own_type_of`` only those of that type which refer to their own type."""
        if own_type_of is None:
            return int(self._db.execute("SELECT count(*) FROM held").fetchone()[0])
        query = "SELECT count(*) FROM held WHERE resource_type = ? AND own_type"
        return int(self._db.execute(query, (own_type_of,)).fetchone()[0])

    def held_entries(self, *, own_type_of: str | None = None) -> Iterator[HeldEntry]:
        """Yield the held entries in the order in which they were held, reading a few at a time."""
        after = 0
        condition = "" if own_type_of is None else "AND resource_type = :type AND own_type"
        query = f"""
            SELECT n, resource_type, id, place, body, status, outcome, first_pass
            FROM held
            WHERE n > :after {condition}
            ORDER BY n
            LIMIT :limit
        """  # noqa: S608
        parameters = {"type": own_type_of, "limit": _ROWS_PER_QUERY}
        while rows := self._db.execute(query, {"after": after, **parameters}).fetchall():
            for n, name, resource_id, location, body, status, outcome, first_pass in rows:
                after = n
                key = (name, resource_id, location)
                yield HeldEntry(
                    n,
                    BundleEntry(name, resource_id, self._decrypt("body", key, body), self.show(location)),
                    EntryResult(status, self._decrypt("outcome", key, outcome)),
                    first_pass,
                )

    def record_first_pass(self, accepted: Iterable[tuple[HeldEntry, EntryResult]]) -> None:
        """Record the entries that the server accepted without their circular references."""
        with self._db:
            self._db.execute("BEGIN")
            self._db.executemany(
                "UPDATE held SET first_pass = ? WHERE n = ?", ((result.status, held.n) for held, result in accepted)
            )

    def find_circular_references(self) -> int:
        """Find the held entries whose references form cycles, and return their number."""
        self._db.execute("DELETE FROM edges")
        for held in self.held_entries():
            self._db.executemany(
                "INSERT OR IGNORE INTO edges SELECT ?, n FROM held WHERE resource_type = ? AND id = ? AND n <> ?",
                ((held.n, *target, held.n) for target in find_references(held.entry.body)),
            )
        # An entry without incoming or outgoing references is in no cycle. Its removal can leave other such entries.
        while self._db.execute("""
            DELETE FROM edges
            WHERE source NOT IN (SELECT target FROM edges)
            OR target NOT IN (SELECT source FROM edges)
        """).rowcount:
            pass
        return int(self._db.execute("SELECT count(DISTINCT source) FROM edges").fetchone()[0])

    def circular_entries(self) -> Iterator[tuple[HeldEntry, set[ReferenceTarget]]]:
        """Yield the entries that ``find_circular_references`` found, with the targets of their circular references."""
        for held in self.held_entries():
            targets = self._db.execute(
                "SELECT resource_type, id FROM edges JOIN held ON n = target WHERE source = ?", (held.n,)
            ).fetchall()
            if targets:
                yield held, set(targets)

    def fail_held(self) -> None:
        """Turn all held entries into failures."""
        with self._db:
            self._db.execute("BEGIN")
            self._db.execute("""
                INSERT INTO failures (resource_type, id, place, body, status, outcome, message)
                SELECT
                    resource_type, id, place, body, status, outcome,
                    reason(resource_type, id, place, status, outcome, first_pass)
                FROM held
                ORDER BY n
            """)
            self._db.execute("DELETE FROM held")

    def failed_count(self) -> int:
        """Return the number of resources that were not delivered."""
        return int(self._db.execute("SELECT count(*) FROM failures").fetchone()[0])

    def failures(self) -> Iterator[Failure]:
        """Yield the resources that were not delivered."""
        query = "SELECT resource_type, id, place, body, status, outcome, message FROM failures ORDER BY n"
        with closing(self._db.execute(query)) as rows:
            for row in rows:
                name, resource_id, location, body, status, outcome, message = row
                key = (name, resource_id, location)
                bodies = self._decrypt("body", key, body), self._decrypt("outcome", key, outcome)
                yield Failure(name, resource_id, self.show(location), bodies[0], status, bodies[1], message)

    def _row(self, entry: BundleEntry, result: EntryResult) -> tuple[str, str, str, bytes, int, bytes]:
        key = (entry.resource_type, entry.id, self.hide(entry.location))
        encrypt = self._cipher.compress_and_encrypt
        return (
            *key,
            encrypt(entry.body, undelivered_place("body", *key)),
            result.status,
            encrypt(result.outcome, undelivered_place("outcome", *key)),
        )

    def _decrypt(self, column: str, key: tuple[str, str | None, str], content: bytes) -> bytes:
        return self._cipher.decrypt_and_decompress(content, undelivered_place(column, *key))

    def _reason(self, name: str, resource_id: str, location: str, status: int, outcome: bytes, first_pass: int) -> str:
        reason = EntryResult(status, self._decrypt("outcome", (name, resource_id, location), outcome)).reason
        if not first_pass:
            return reason
        return f"{reason}; the server holds it without its references to resources that failed"

    def count_resources(self) -> dict[str, dict[str, int]]:
        """Return the numbers of created, updated, unchanged and failed resources by resource type."""
        names = ("created", "updated", "unchanged", "failed")
        query = """
            SELECT resource_type, sum(created), sum(updated), sum(unchanged), sum(failed)
            FROM (
                SELECT resource_type, created, updated, unchanged, 0 AS failed FROM batches
                UNION ALL
                SELECT resource_type, 0, 0, 0, 1 FROM failures
            )
            GROUP BY resource_type
        """
        return {row[0]: dict(zip(names, row[1:], strict=True)) for row in self._db.execute(query)}


def _is_json(body: bytes) -> bool:
    try:
        orjson.loads(body)
    except orjson.JSONDecodeError:
        return False
    return True
