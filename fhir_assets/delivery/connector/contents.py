"""Reads the content of resources and responses: hash, identifiers, id, version, and whether it reports an error."""

import hashlib
from collections.abc import Mapping
from typing import Any, TypeGuard

import orjson

from fhir_assets.delivery.connector.mapping import Identifier
from fhir_assets.fhir.deletions import parse_etag
from fhir_assets.fhir.outcome import is_error_outcome

_SERVER_ELEMENTS = ("id", "meta", "text")


def hash_content(resource: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a resource without the elements that a server sets: id, meta and text.

    The order of members and the form of a number (1 and 1.0) do not matter.
    """
    content = {name: _canonical(value) for name, value in resource.items() if name not in _SERVER_ELEMENTS}
    return hashlib.sha256(orjson.dumps(content, option=orjson.OPT_SORT_KEYS)).hexdigest()


def has_identifier(resource: Mapping[str, Any], identifier: Identifier) -> bool:
    """Return whether a resource has exactly this identifier."""
    values = resource.get("identifier")
    return any(
        isinstance(value, dict) and value.get("system") == identifier.system and value.get("value") == identifier.value
        for value in (values if isinstance(values, list) else [values])
    )


def is_resource(body: object, resource_type: str) -> TypeGuard[dict[str, Any]]:
    """Return whether the body of a reply is a resource of this type with an id."""
    return isinstance(body, dict) and body.get("resourceType") == resource_type and _is_text(body.get("id"))


def has_no_error(body: object) -> bool:
    """Return whether the body is empty, or an OperationOutcome without an error. Such a body does not contradict a
    success.
    """
    return body is None or (
        isinstance(body, dict) and body.get("resourceType") == "OperationOutcome" and not is_error_outcome(body)
    )


def read_location(resource_type: str, headers: Mapping[str, str]) -> tuple[str | None, str | None]:
    """Return the id and the version in the Location header; None for each that is missing."""
    for header in ("Location", "Content-Location"):
        parts = (headers.get(header) or "").split("?")[0].split("/")
        if resource_type in parts[:-1]:
            id_and_more = parts[len(parts) - parts[::-1].index(resource_type) :]
            version = id_and_more[2] if len(id_and_more) > 2 and id_and_more[1] == "_history" else None
            return id_and_more[0] or None, version or None
    return None, None


def read_version(resource_type: str, headers: Mapping[str, str], body: object) -> str | None:
    """Return the version in a response: from its body, else from its ETag, else from its Location."""
    if isinstance(body, dict) and isinstance(meta := body.get("meta"), dict) and _is_text(meta.get("versionId")):
        return str(meta["versionId"])
    return parse_etag(headers.get("ETag")) or read_location(resource_type, headers)[1]


def _canonical(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _canonical(member) for name, member in value.items()}
    if isinstance(value, list):
        return [_canonical(member) for member in value]
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value != ""
