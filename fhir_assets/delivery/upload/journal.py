"""What an upload has done, in a SQLite file: it survives a kill, and its size in memory does not grow.

A commit is on disk when it returns. What was under way at a kill is sent again: putting a resource twice does no harm.
Resources and outcomes are sealed there where there are keys.
"""

import sqlite3
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import orjson

from fhir_assets.delivery.upload.files import Unusable
from fhir_assets.errors import ConfigurationError
from fhir_assets.fhir.bundles import BundleEntry, EntryResult, ReferenceTarget, find_references
from fhir_assets.privacy.encryption import Cipher

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
_AT_ONCE = 100


@dataclass(frozen=True, slots=True)
class BatchKey:
    """Which batch: the resources of a type in a file that share a lane, so many at a time."""

    resource_type: str
    file: str
    lane: int
    number: int


@dataclass(slots=True)
class Done:
    """What became of the entries of a batch."""

    created: int = 0
    updated: int = 0
    unchanged: int = 0
    settled: list[BundleEntry] = field(default_factory=list)
    held: list[tuple[BundleEntry, EntryResult]] = field(default_factory=list)
    failed: list[tuple[BundleEntry, EntryResult]] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Held:
    """An entry that waits for another try; ``first_pass`` is the status its reduced form got, 0 if there was none."""

    n: int
    entry: BundleEntry
    result: EntryResult
    first_pass: int


@dataclass(frozen=True, slots=True)
class Failure:
    """What was not delivered, and why."""

    resource_type: str
    id: str | None
    place: str
    body: bytes
    status: int
    outcome: bytes
    message: str

    @property
    def line(self) -> bytes:
        """As a line of ``upload_failures.ndjson``."""
        head = orjson.dumps({"status": self.status or None, "reason": self.message, "place": self.place})[:-1]
        resource = self.body if _is_json(self.body) else orjson.dumps(self.body.decode("utf-8", "replace"))
        return b'%b,"outcome":%b,"resource":%b}\n' % (head, self.outcome or b"null", resource)


class Journal:
    """The state of one upload; used by one thread. ``path`` None keeps it in a temporary file."""

    def __init__(self, path: Path | None = None, *, cipher: Cipher) -> None:
        self._cipher = cipher
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)
        self.path = path
        self._db = sqlite3.connect("" if path is None else path, isolation_level=None, timeout=0)
        # Ours alone, and one write and one fsync a commit.
        self._db.execute("PRAGMA locking_mode = EXCLUSIVE")
        try:
            self._db.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError:
            self._db.close()
            raise ConfigurationError(
                "another upload of this input to this server is at work: wait for it, or end it"
            ) from None
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.create_function("reason", 3, self._reason, deterministic=True)
        self._db.executescript(_SCHEMA.replace("CREATE TABLE", "CREATE TABLE IF NOT EXISTS"))
        self._any_open = self.held_count() + self.failed_count() > 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let the file go."""
        self._db.close()

    def facts(self) -> dict[str, str]:
        """What was noted of the upload as a whole."""
        return dict(self._db.execute("SELECT name, value FROM facts"))

    def begin(self, count: Callable[[Callable[[Unusable], None]], dict[str, str]]) -> None:
        """A new upload: forget what was. ``count`` looks through the input, hands on each line that cannot be sent,
        and returns what is to be noted of the upload as a whole.
        """
        with self._db:
            self._db.execute("BEGIN")
            for table in ("facts", "batches", "held", "failures"):
                self._db.execute(f"DELETE FROM {table}")  # noqa: S608
            self._db.executemany("INSERT INTO facts VALUES (?, ?)", count(self._refuse).items())
        self._any_open = self.failed_count() > 0

    def _refuse(self, line: Unusable) -> None:
        self._db.execute(
            "INSERT INTO failures (resource_type, id, place, body, status, outcome, message)"
            " VALUES (?, NULL, ?, ?, 0, x'', ?)",
            (line.resource_type, line.place, self._cipher.compress_and_encrypt(line.body), line.message),
        )

    def resume(self, facts: dict[str, str]) -> None:
        """Go on: note what has changed of the upload as a whole, and let what failed be tried again."""
        with self._db:
            self._db.execute("BEGIN")
            self._db.executemany("INSERT OR REPLACE INTO facts VALUES (?, ?)", facts.items())
            self._db.execute(
                "INSERT OR IGNORE INTO held (resource_type, id, place, body, status, outcome, own_type, first_pass)"
                " SELECT resource_type, id, place, body, status, outcome, 0, 0 FROM failures WHERE id IS NOT NULL"
            )
            self._db.execute("DELETE FROM failures WHERE id IS NOT NULL")
        self._any_open = self.held_count() + self.failed_count() > 0

    def is_done(self, key: BatchKey) -> bool:
        """Whether a batch was sent and its results are noted."""
        query = "SELECT 1 FROM batches WHERE resource_type = ? AND file = ? AND lane = ? AND number = ?"
        return self._db.execute(query, (key.resource_type, key.file, key.lane, key.number)).fetchone() is not None

    def commit(self, key: BatchKey, done: Done) -> None:
        """Note the results of a batch."""
        with self._db:
            self._db.execute("BEGIN")
            self._count(key, done)
            self._hold(done.held)
            self._db.executemany(
                "INSERT INTO failures (resource_type, id, place, body, status, outcome, message)"
                " VALUES (?, ?, ?, ?, ?, ?, ?)",
                ((*self._row(entry, result), result.reason) for entry, result in done.failed),
            )
            if self._any_open:
                # What has come through now is the newer line of a resource: an older one must not follow it.
                names = [(entry.resource_type, entry.id) for entry in done.settled]
                self._db.executemany("DELETE FROM held WHERE resource_type = ? AND id = ?", names)
                self._db.executemany("DELETE FROM failures WHERE resource_type = ? AND id = ?", names)
        self._any_open = self._any_open or bool(done.held or done.failed)

    def _count(self, key: BatchKey, done: Done) -> None:
        self._db.execute(
            "INSERT INTO batches VALUES (?, ?, ?, ?, ?, ?, ?)",
            (key.resource_type, key.file, key.lane, key.number, done.created, done.updated, done.unchanged),
        )

    def _hold(self, held: Iterable[tuple[BundleEntry, EntryResult]]) -> None:
        self._db.executemany(
            "INSERT INTO held (resource_type, id, place, body, status, outcome, own_type, first_pass)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, 0) ON CONFLICT DO UPDATE SET place = excluded.place, body = excluded.body,"
            " status = excluded.status, outcome = excluded.outcome",
            (
                (
                    *self._row(entry, result),
                    any(name == entry.resource_type for name, _ in find_references(entry.body)),
                )
                for entry, result in held
            ),
        )  # fmt: skip

    def next_number(self) -> int:
        """The first number that is free for batches of entries that are tried again; they are of no file."""
        query = "SELECT coalesce(max(number) + 1, 0) FROM batches WHERE file = ''"
        return int(self._db.execute(query).fetchone()[0])

    def held_count(self, *, own_type_of: str | None = None) -> int:
        """How many entries wait for another try; of one type only those that refer to their own type."""
        if own_type_of is None:
            return int(self._db.execute("SELECT count(*) FROM held").fetchone()[0])
        query = "SELECT count(*) FROM held WHERE resource_type = ? AND own_type"
        return int(self._db.execute(query, (own_type_of,)).fetchone()[0])

    def held(self, *, own_type_of: str | None = None) -> Iterator[Held]:
        """The entries that wait, in the order in which they came; a few of them are read at a time."""
        after = 0
        condition = "" if own_type_of is None else "AND resource_type = :type AND own_type"
        query = (
            "SELECT n, resource_type, id, place, body, status, outcome, first_pass FROM held"  # noqa: S608
            f" WHERE n > :after {condition} ORDER BY n LIMIT :limit"
        )
        while rows := self._db.execute(query, {"after": after, "type": own_type_of, "limit": _AT_ONCE}).fetchall():
            for n, name, identity, place, body, status, outcome, first_pass in rows:
                after = n
                yield Held(
                    n,
                    BundleEntry(name, identity, self._cipher.decrypt_and_decompress(body), place),
                    EntryResult(status, self._cipher.decrypt_and_decompress(outcome)),
                    first_pass,
                )

    def note_first_pass(self, done: Iterable[tuple[Held, EntryResult]]) -> None:
        """Entries whose reduced form the server has taken."""
        with self._db:
            self._db.execute("BEGIN")
            self._db.executemany(
                "UPDATE held SET first_pass = ? WHERE n = ?", ((result.status, each.n) for each, result in done)
            )

    def find_circles(self) -> int:
        """Find out which of the waiting entries refer to one another in circles; returns how many there are."""
        self._db.execute("DELETE FROM edges")
        for each in self.held():
            self._db.executemany(
                "INSERT OR IGNORE INTO edges SELECT ?, n FROM held WHERE resource_type = ? AND id = ? AND n <> ?",
                ((each.n, *target, each.n) for target in find_references(each.entry.body)),
            )
        # What nothing waits for, and what waits for nothing, is in no circle; nor is what then is left so.
        while self._db.execute(
            "DELETE FROM edges WHERE source NOT IN (SELECT target FROM edges)"
            " OR target NOT IN (SELECT source FROM edges)"
        ).rowcount:
            pass
        return int(self._db.execute("SELECT count(DISTINCT source) FROM edges").fetchone()[0])

    def circular(self) -> Iterator[tuple[Held, set[ReferenceTarget]]]:
        """The entries of the circles, and what each refers to in them."""
        for each in self.held():
            targets = self._db.execute(
                "SELECT resource_type, id FROM edges JOIN held ON n = target WHERE source = ?", (each.n,)
            ).fetchall()
            if targets:
                yield each, set(targets)

    def give_up(self) -> None:
        """What waits still has failed."""
        with self._db:
            self._db.execute("BEGIN")
            self._db.execute(
                "INSERT INTO failures (resource_type, id, place, body, status, outcome, message)"
                " SELECT resource_type, id, place, body, status, outcome, reason(status, outcome, first_pass)"
                " FROM held ORDER BY n"
            )
            self._db.execute("DELETE FROM held")

    def failed_count(self) -> int:
        """How many resources were not delivered."""
        return int(self._db.execute("SELECT count(*) FROM failures").fetchone()[0])

    def failures(self) -> Iterator[Failure]:
        """What was not delivered."""
        query = "SELECT resource_type, id, place, body, status, outcome, message FROM failures ORDER BY n"
        with closing(self._db.execute(query)) as rows:
            for row in rows:
                name, identity, place, body, status, outcome, message = row
                yield Failure(
                    name,
                    identity,
                    place,
                    self._cipher.decrypt_and_decompress(body),
                    status,
                    self._cipher.decrypt_and_decompress(outcome),
                    message,
                )

    def _row(self, entry: BundleEntry, result: EntryResult) -> tuple[str, str, str, bytes, int, bytes]:
        compress_and_encrypt = self._cipher.compress_and_encrypt
        return (
            entry.resource_type,
            entry.id,
            entry.location,
            compress_and_encrypt(entry.body),
            result.status,
            compress_and_encrypt(result.outcome),
        )

    def _reason(self, status: int, outcome: bytes, first_pass: int) -> str:
        reason = EntryResult(status, self._cipher.decrypt_and_decompress(outcome)).reason
        return (
            f"{reason}; it stands on the server without its references to others that failed" if first_pass else reason
        )

    def totals(self) -> dict[str, dict[str, int]]:
        """By type: created, updated, unchanged, failed."""
        names = ("created", "updated", "unchanged", "failed")
        query = (
            "SELECT resource_type, sum(c), sum(u), sum(s), sum(f) FROM ("
            " SELECT resource_type, created c, updated u, unchanged s, 0 f FROM batches"
            " UNION ALL SELECT resource_type, 0, 0, 0, 1 FROM failures) GROUP BY 1"
        )
        return {row[0]: dict(zip(names, row[1:], strict=True)) for row in self._db.execute(query)}


def _is_json(body: bytes) -> bool:
    try:
        orjson.loads(body)
    except orjson.JSONDecodeError:
        return False
    return True
