"""Headers of posts: Idempotency-Key of the request and X-Task-Id of the answer.

A repeated request with the same Idempotency-Key gets the first answer again, and its work is not repeated.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic, sleep
from typing import Annotated, Any
from uuid import uuid4

import orjson
from fastapi import Header, Response

from fhir_assets.api.context import CONNECTION_TIMEOUT_SECONDS, AppContext, Caller
from fhir_assets.api.problems import Problem
from fhir_assets.warehouse.ops import idempotency
from fhir_assets.warehouse.postgres.db.connections import Session

WAIT_SECONDS = 30
"""Seconds that a request waits for another one in progress with the same key."""
_POLL_SECONDS = 0.1

IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        max_length=256,
        description="For a day, a request with the same key and the same body gets the same answer and has no further "
        "effect",
    ),
]

TASK_HEADER = "X-Task-Id"
TASK_HEADERS: dict[str, Any] = {
    TASK_HEADER: {
        "description": "The id of the task; its status is at /ingest/tasks/{task_id}. Missing if nothing was accepted",
        "schema": {"type": "string"},
    }
}
"""The OpenAPI description of the header that names the task of a post."""


def answer_once(
    context: AppContext,
    caller: Caller,
    path: str,
    key: str | None,
    body: bytes,
    work: Callable[[str], Response],
    *,
    media_type: str = "application/json",
) -> Response:
    """Do the work of a request and return its answer, or return the stored answer of an earlier, equal request.

    ``work`` takes the origin of its records. Equal requests have equal origins, so that interrupted work can be
    repeated without duplicates. Without a key every request is new. ``media_type`` is the media type of a stored
    answer. The answer has the header X-Task-Id if its body names a task.

    Raises Problem if the key was used with another body, or if an earlier request with it is still in progress after
    WAIT_SECONDS, and DatabaseUnavailable.
    """
    if key is None:
        return _add_task_header(work(f"api:{caller.request_id}:{uuid4().hex}"))
    if (answer := _try_answer(context, caller, path, key, body, work, media_type)) is None:
        answer = _wait_for_answer(context, lambda: _try_answer(context, caller, path, key, body, work, media_type))
    return _add_task_header(answer)


def _wait_for_answer(context: AppContext, attempt: Callable[[], Response | None]) -> Response:
    """Repeat an attempt while another request with the same key is in progress. Raises Problem after WAIT_SECONDS.

    A waiting request occupies a thread, so that only MAX_WAITING_REQUESTS wait; it holds no connection.
    """
    if context.wait_slots.acquire(blocking=False):
        try:
            deadline = monotonic() + WAIT_SECONDS
            while monotonic() < deadline:
                sleep(_POLL_SECONDS)
                if (answer := attempt()) is not None:
                    return answer
        finally:
            context.wait_slots.release()
    raise _build_busy_problem(409, "an earlier request with this Idempotency-Key is still in progress")


def _try_answer(
    context: AppContext,
    caller: Caller,
    path: str,
    key: str,
    body: bytes,
    work: Callable[[str], Response],
    media_type: str,
) -> Response | None:
    """Answer a request, or return None if another request with the same key is in progress."""
    with _open_connection(context) as conn:
        request = idempotency.Request.of(conn, caller.token.name, path, key, body)
        if not idempotency.lock(conn, request):
            return None
        return _answer_locked(conn, request, work, media_type)


@contextmanager
def _open_connection(context: AppContext) -> Iterator[Session]:
    """Open a connection of its own for a request with a key, which holds it for as long as its work takes.

    The pool has none to spare for that: the work itself and all other requests need them. Raises Problem if too many
    requests with a key are in progress.
    """
    if not context.keyed_slots.acquire(timeout=CONNECTION_TIMEOUT_SECONDS):
        raise _build_busy_problem(503, "too many requests with an Idempotency-Key are in progress")
    try:
        with context.own_connection() as conn:
            yield conn
    finally:
        context.keyed_slots.release()


def _answer_locked(
    conn: Session, request: idempotency.Request, work: Callable[[str], Response], media_type: str
) -> Response:
    try:
        stored = idempotency.find_response(conn, request)
    except idempotency.KeyReused:
        raise Problem(
            422, "this Idempotency-Key was used with another body: send this request with a new key"
        ) from None
    if stored is not None:
        status, content = stored
        return Response(content, status, headers={"Idempotent-Replayed": "true"}, media_type=media_type)
    answer = work(f"api:{request.key.hex()}:{request.body.hex()}")
    idempotency.record_response(conn, request, answer.status_code, bytes(answer.body))
    return answer


def _build_busy_problem(status: int, reason: str) -> Problem:
    return Problem(
        status, f"{reason}: repeat the request after the seconds in Retry-After", headers={"Retry-After": "1"}
    )


def _add_task_header(answer: Response) -> Response:
    """Add X-Task-Id to an answer whose body names a task: as ``task_id``, or as the id of an OperationOutcome."""
    content = orjson.loads(answer.body)
    if task_id := content.get("task_id") or content.get("id"):
        answer.headers[TASK_HEADER] = task_id
    return answer
