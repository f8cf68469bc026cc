"""Headers of posts: Idempotency-Key of the request and X-Task-Id of the answer.

A repeated request with the same Idempotency-Key gets the first answer again, and its work is not repeated.
"""

from collections.abc import Callable
from typing import Annotated, Any
from uuid import uuid4

import orjson
from fastapi import Header, Response

from fhir_assets.api.context import AppContext, Caller
from fhir_assets.api.problems import Problem
from fhir_assets.warehouse.ops import idempotency

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

    Raises Problem if the key was used with another body, and DatabaseUnavailable.
    """
    if key is None:
        return _add_task_header(work(f"api:{caller.request_id}:{uuid4().hex}"))
    with context.connection() as conn:
        request = idempotency.Request.of(conn, caller.token.name, path, key, body)
        try:
            stored = idempotency.begin(conn, request)
        except idempotency.KeyReused:
            raise Problem(
                422, "this Idempotency-Key was used with another body: send this request with a new key"
            ) from None
        if stored is not None:
            status, content = stored
            replayed = {"Idempotent-Replayed": "true"}
            return _add_task_header(Response(content, status, headers=replayed, media_type=media_type))
        answer = work(f"api:{request.key.hex()}:{request.body.hex()}")
        idempotency.record_response(conn, request, answer.status_code, bytes(answer.body))
        return _add_task_header(answer)


def _add_task_header(answer: Response) -> Response:
    """Add X-Task-Id to an answer whose body names a task: as ``task_id``, or as the id of an OperationOutcome."""
    content = orjson.loads(answer.body)
    if task_id := content.get("task_id") or content.get("id"):
        answer.headers[TASK_HEADER] = task_id
    return answer
