"""The faults of the sandbox server that can hit the requests of a bulk export."""

from pydantic import ValidationError

from fhir_assets.sandbox.faults import Fault, FaultKind, RequestKind

EXPORT_REQUESTS = (RequestKind.KICK_OFF, RequestKind.POLL, RequestKind.FILE, RequestKind.DELETE)


def _can_hit(kind: FaultKind, request: RequestKind) -> bool:
    try:
        Fault(kind=kind, on=frozenset({request}))
    except ValidationError:
        return False
    return True


EXPORT_FAULTS = [(kind, request) for kind in FaultKind for request in EXPORT_REQUESTS if _can_hit(kind, request)]
"""All combinations that the sandbox server accepts, so that a new fault is a new test case."""
