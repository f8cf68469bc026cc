"""Summaries of a server's OperationOutcome that contain no patient data.

Servers write free text into every field, and the text may quote the resource. A summary therefore contains only codes
and element paths that R4 itself defines.
"""

import re
from functools import cache

import orjson

from fhir_assets.fhir.model import r4

_MAX_ISSUES = 3
_is_code = re.compile(
    "invalid|structure|required|value|invariant|security|login|unknown|expired|forbidden|suppressed|processing"
    "|not-supported|duplicate|multiple-matches|not-found|deleted|too-long|code-invalid|extension|too-costly"
    "|business-rule|conflict|transient|lock-error|no-store|exception|timeout|incomplete|throttled|informational"
).fullmatch
"""https://hl7.org/fhir/R4/valueset-issue-type.html"""

_PATH = re.compile(r"\b[A-Z][A-Za-z]{2,40}(?:\.[a-zA-Z]{1,60}){1,8}\b")
_INDEX = re.compile(r"\[\d{1,6}\]$")
_HARMLESS = ("warning", "information")


def reports_error(body: bytes) -> bool:
    """Return whether a body is an OperationOutcome that reports an error, or that cannot be read."""
    if b'"OperationOutcome"' not in body:
        return False
    try:
        return is_error_outcome(orjson.loads(body))
    except orjson.JSONDecodeError:
        return True


def is_error_outcome(body: object) -> bool:
    """Return whether a parsed body is an OperationOutcome with an issue of severity error or fatal.

    An outcome without issues, or with an issue whose severity cannot be read, also counts as an error, because R4
    requires both.
    """
    if not isinstance(body, dict) or body.get("resourceType") != "OperationOutcome":
        return False
    issues = body.get("issue")
    if not isinstance(issues, list) or not issues:
        return True
    return any(not isinstance(issue, dict) or issue.get("severity") not in _HARMLESS for issue in issues)


def summarize_issues(outcome: bytes) -> list[str]:
    """Return the first issues as ``value at Patient.name[0].family``; an empty list if there is no OperationOutcome."""
    try:
        issues = orjson.loads(outcome)["issue"][:_MAX_ISSUES]
        return [_summarize(issue["code"], issue.get("expression") or _find_paths(issue)) for issue in issues]
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError):
        return []


def _summarize(code: object, paths: list[object]) -> str:
    known_code = code if isinstance(code, str) and _is_code(code) else "another code"
    path = paths[0] if paths else None
    return f"{known_code} at {path}" if isinstance(path, str) and _is_path(path) else known_code


def _find_paths(issue: dict[str, object]) -> list[object]:
    """Return the element paths in the text of an issue: HAPI names there what refers to a resource, for example."""
    text = issue.get("diagnostics")
    return [word for word in _PATH.findall(text) if _is_path(word)] if isinstance(text, str) else []


def _is_path(text: str) -> bool:
    """Return whether a text is a path of element names of R4, such as ``Patient.contact[0].name``."""
    first, *names = (_INDEX.sub("", part) for part in text.split("."))
    return first in r4().types and all(name in _element_names() for name in names)


@cache
def _element_names() -> frozenset[str]:
    return frozenset(name for type_ in r4().types.values() for name in (*type_.json, *type_.elements))
