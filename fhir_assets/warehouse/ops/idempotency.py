"""``ops.idempotency``: stored responses to API requests that have an ``Idempotency-Key`` header.

A repeated request gets the stored response and is not executed again.
"""

from dataclasses import dataclass
from datetime import timedelta

from fhir_assets.privacy.places import answer_place
from fhir_assets.warehouse.postgres.db import advisory_locks
from fhir_assets.warehouse.postgres.db.connections import Session, cipher_of

RETENTION = timedelta(days=1)
"""The time for which a response is kept."""


class KeyReused(Exception):
    """The idempotency key was used for a request with another body."""


@dataclass(frozen=True, slots=True)
class Request:
    """Keyed hashes of a request: ``key`` hashes the caller, the path and the idempotency key; ``body`` the body."""

    key: bytes
    body: bytes

    @classmethod
    def of(cls, conn: Session, caller: str, path: str, key: str, body: bytes) -> "Request":
        """Return the hashes of a request, keyed with the secret of the database."""
        cipher = cipher_of(conn)
        return cls(cipher.fingerprint("\0".join((caller, path, key)).encode()), cipher.fingerprint(body))


def lock(conn: Session, request: Request) -> bool:
    """Lock a request until the transaction ends. Return False if another process handles the same request."""
    row = conn.execute(
        "SELECT pg_try_advisory_xact_lock(%s, hashtext(%s))", [advisory_locks.IDEMPOTENT_REQUEST, request.key.hex()]
    ).fetchone()
    return row is not None and bool(row[0])


def find_response(conn: Session, request: Request) -> tuple[int, bytes] | None:
    """Return the status and body of the stored response of a locked request, or None.

    Raises KeyReused if the stored request has another body, and EncryptionError if the stored response cannot be
    decrypted.
    """
    row = conn.execute(
        "SELECT body, status, answer FROM ops.idempotency WHERE key = %s AND answered_at > now() - %s",
        [request.key, RETENTION],
    ).fetchone()
    if row is None:
        return None
    if bytes(row[0]) != request.body:
        raise KeyReused
    return row[1], cipher_of(conn).decrypt_and_decompress(bytes(row[2]), answer_place(request.key))


def record_response(conn: Session, request: Request, status: int, answer: bytes) -> None:
    """Store the response to a request, and delete at most 100 responses that are older than RETENTION."""
    cipher = cipher_of(conn)
    conn.execute(
        """
        INSERT INTO ops.idempotency (key, body, status, answer, key_id)
        VALUES (%s, %s, %s, %s, %s)
        ON CONFLICT (key) DO UPDATE SET
            body = excluded.body,
            status = excluded.status,
            answer = excluded.answer,
            key_id = excluded.key_id,
            answered_at = now()
        """,
        [
            request.key,
            request.body,
            status,
            cipher.compress_and_encrypt(answer, answer_place(request.key)),
            cipher.key_id,
        ],
    )
    conn.execute(
        """
        DELETE FROM ops.idempotency
        WHERE key IN (
            SELECT key FROM ops.idempotency WHERE answered_at < now() - %s LIMIT 100 FOR UPDATE SKIP LOCKED
        )
        """,
        [RETENTION],
    )
