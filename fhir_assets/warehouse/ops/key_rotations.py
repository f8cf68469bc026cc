"""``ops.key_rotations``: key rotations (``fhir-assets keys rotate``) and their progress."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime

from psycopg.rows import class_row

from fhir_assets.errors import TransientError
from fhir_assets.warehouse.postgres.db import advisory_locks
from fhir_assets.warehouse.postgres.db.connections import Connection, Session, cipher_of


@dataclass(frozen=True, slots=True)
class Rotation:
    """A rotation of the encryption keys.

    ``left_over``, the number of rows and parts that could not be encrypted again, is None until the rotation has ended;
    ``at_work`` is True while its process runs.
    """

    id: int
    key_id: str
    actor: str
    current_step: str
    total: int
    done: int
    left_over: int | None
    started_at: datetime
    updated_at: datetime
    ended_at: datetime | None
    at_work: bool

    @property
    def rate(self) -> float:
        """Rows and parts per second."""
        seconds = (self.updated_at - self.started_at).total_seconds()
        return self.done / seconds if seconds > 0 else 0.0

    @property
    def seconds_left(self) -> float | None:
        """The estimated remaining time in seconds; None before any progress."""
        return (self.total - self.done) / self.rate if self.rate else None


@contextmanager
def lock_rotation(conn: Connection) -> Iterator[None]:
    """Hold the lock of the rotation. ``conn`` must be in autocommit mode.

    Raises TransientError if another rotation is running.
    """
    row = conn.execute("SELECT pg_try_advisory_lock(%s)", [advisory_locks.KEY_ROTATION]).fetchone()
    if not row or not row[0]:
        raise TransientError("The keys are being rotated already: `fhir-assets keys status` shows the progress")
    try:
        yield
    finally:
        conn.execute("SELECT pg_advisory_unlock(%s)", [advisory_locks.KEY_ROTATION])


def begin(conn: Session, actor: str, total: int) -> int:
    """Record the start of a rotation to the newest key and return its id."""
    row = conn.execute(
        "INSERT INTO ops.key_rotations (key_id, actor, total) VALUES (%s, %s, %s) RETURNING id",
        [cipher_of(conn).keys[0].id, actor, total],
    ).fetchone()
    assert row
    return int(row[0])


def advance(conn: Connection, rotation: int, current_step: str, done: int) -> None:
    """Add ``done`` rows or parts to the progress, and record the current step."""
    conn.execute(
        """
        UPDATE ops.key_rotations
        SET
            current_step = %s,
            done = done + %s,
            total = greatest(total, done + %s),
            updated_at = clock_timestamp()
        WHERE id = %s
        """,
        [current_step, done, done, rotation],
    )


def end(conn: Connection, rotation: int, left_over: int) -> None:
    """Record the end of a rotation, with the number of rows and parts that could not be encrypted again."""
    conn.execute(
        """
        UPDATE ops.key_rotations
        SET current_step = '', left_over = %s, updated_at = clock_timestamp(), ended_at = clock_timestamp()
        WHERE id = %s
        """,
        [left_over, rotation],
    )


def get_latest(conn: Connection) -> Rotation | None:
    """Return the rotation that was started last, None before the first."""
    with conn.cursor(row_factory=class_row(Rotation)) as cursor:
        return cursor.execute(
            """
            SELECT
                r.*,
                ended_at IS NULL AND EXISTS (
                    SELECT FROM pg_locks
                    WHERE locktype = 'advisory'
                        AND granted
                        AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
                        AND classid = 0
                        AND objid = %s
                ) AS at_work
            FROM ops.key_rotations r
            ORDER BY id DESC
            LIMIT 1
            """,
            [advisory_locks.KEY_ROTATION],
        ).fetchone()
