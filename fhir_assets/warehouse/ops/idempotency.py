"""``ops.idempotency``: a request that comes again is answered as it was, and its work is not done again."""

from dataclasses import dataclass
from datetime import timedelta

from fhir_assets.warehouse.postgres.db import advisory_locks
from fhir_assets.warehouse.postgres.db.connections import Session, cipher_of

KEPT = timedelta(days=1)


class KeyReused(Exception):
    """The key was used for another request."""


@dataclass(frozen=True, slots=True)
class Request:
    """A request by its hashes: ``key`` for who asks what with which key, ``body`` for what it brings."""

    key: bytes
    body: bytes

    @classmethod
    def of(cls, conn: Session, caller: str, path: str, key: str, body: bytes) -> "Request":
        cipher = cipher_of(conn)
        return cls(cipher.fingerprint("\0".join((caller, path, key)).encode()), cipher.fingerprint(body))


def begin(conn: Session, request: Request) -> tuple[int, bytes] | None:
    """Wait until the same request is not under way elsewhere; then the status and the answer that it had, if it was
    answered. Nobody else begins it until the transaction ends. Raises AnotherBody, SealingError.
    """
    conn.execute(
        "SELECT pg_advisory_xact_lock(%s, hashtext(%s))", [advisory_locks.IDEMPOTENT_REQUEST, request.key.hex()]
    )
    row = conn.execute(
        "SELECT body, status, answer FROM ops.idempotency WHERE key = %s AND answered_at > now() - %s",
        [request.key, KEPT],
    ).fetchone()
    if row is None:
        return None
    if bytes(row[0]) != request.body:
        raise KeyReused
    return row[1], cipher_of(conn).decrypt_and_decompress(bytes(row[2]))


def record_response(conn: Session, request: Request, status: int, answer: bytes) -> None:
    """The request was answered so. What is older than a day is forgotten."""
    cipher = cipher_of(conn)
    conn.execute(
        "INSERT INTO ops.idempotency AS known (key, body, status, answer, key_id) VALUES (%s, %s, %s, %s, %s)"
        " ON CONFLICT (key) DO UPDATE SET body = excluded.body, status = excluded.status, answer = excluded.answer,"
        " key_id = excluded.key_id, answered_at = now()",
        [request.key, request.body, status, cipher.compress_and_encrypt(answer), cipher.key_id],
    )
    conn.execute(
        "DELETE FROM ops.idempotency WHERE key IN (SELECT key FROM ops.idempotency WHERE answered_at < now() - %s"
        " LIMIT 100 FOR UPDATE SKIP LOCKED)",
        [KEPT],
    )
