"""The Idempotency-Key header: a repeated request gets the first answer again, and its work is not repeated."""

from collections.abc import Callable
from typing import Annotated
from uuid import uuid4

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
    answer.

    Raises Problem if the key was used with another body, and DatabaseUnavailable.
    """
    if key is None:
        return work(f"api:{caller.request_id}:{uuid4().hex}")
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
            return Response(content, status, headers={"Idempotent-Replayed": "true"}, media_type=media_type)
        answer = work(f"api:{request.key.hex()}:{request.body.hex()}")
        idempotency.record_response(conn, request, answer.status_code, bytes(answer.body))
        return answer
