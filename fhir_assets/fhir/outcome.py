"""What a server's OperationOutcome says that can be passed on: codes and places, never its words, which may quote the
resource. Servers put whatever they like into every field, so only what R4 itself has names for gets through.
"""

import re
from functools import cache

import orjson

from fhir_assets.fhir.model import r4

_AT_MOST = 3
_IS_CODE = re.compile(
    "invalid|structure|required|value|invariant|security|login|unknown|expired|forbidden|suppressed|processing"
    "|not-supported|duplicate|multiple-matches|not-found|deleted|too-long|code-invalid|extension|too-costly"
    "|business-rule|conflict|transient|lock-error|no-store|exception|timeout|incomplete|throttled|informational"
).fullmatch
"""https://hl7.org/fhir/R4/valueset-issue-type.html"""

_INDEX = re.compile(r"\[\d{1,6}\]$")


def summarize_issues(outcome: bytes) -> list[str]:
    """The first issues as ``value at Patient.name[0].family``; none for what is no OperationOutcome."""
    try:
        found = orjson.loads(outcome)["issue"][:_AT_MOST]
        return [_said(issue["code"], issue.get("expression") or [None]) for issue in found]
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError):
        return []


def _said(code: object, places: list[object]) -> str:
    known = code if isinstance(code, str) and _IS_CODE(code) else "another code"
    place = places[0]
    return f"{known} at {place}" if isinstance(place, str) and _is_path(place) else known


def _is_path(text: str) -> bool:
    """Whether a text is a plain path of R4's own names, such as ``Patient.contact[0].name``."""
    first, *names = (_INDEX.sub("", part) for part in text.split("."))
    return first in r4().types and all(name in _names() for name in names)


@cache
def _names() -> frozenset[str]:
    return frozenset(name for type_ in r4().types.values() for name in (*type_.json, *type_.elements))
