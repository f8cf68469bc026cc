"""Reads resources from the server, by id or by identifier."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from fhir_assets.delivery.connector import contents
from fhir_assets.delivery.connector.mapping import Identifier, Source
from fhir_assets.delivery.connector.server import FhirServer, PermanentFailure, TransientFailure
from fhir_assets.fhir.outcome import is_error_outcome

ABSENT = frozenset({404, 410})
"""Answers to a read, an update or a deletion of a resource that the server does not have."""


@dataclass(frozen=True, slots=True)
class Held:
    """A resource that the server has. ``version_id`` is None if the server does not name it."""

    id: str
    version_id: str | None
    content_hash: str
    resource: dict[str, Any]


class Lookup:
    """Reads from one server, bypassing its caches. Safe for use by several threads."""

    def __init__(self, server: FhirServer) -> None:
        self._server = server

    def read(self, source: Source, resource_id: str) -> Held | None:
        """Return the resource with this id; None if the server has none.

        Some servers answer with a searchset that contains the resource. Raises PermanentFailure, or TransientFailure,
        which includes an answer that is not a resource.
        """
        reply = self._server.call("GET", f"{source.resource_type}/{resource_id}", absent=ABSENT)
        if reply.status in ABSENT:
            return None
        body = reply.body
        found = [body] if contents.is_resource(body, source.resource_type) else _list_resources(source, body)
        for resource in found:
            if resource["id"] == resource_id:
                return _hold(source, resource, contents.read_version(source.resource_type, reply.headers, resource))
        raise TransientFailure("not-fhir", "the response to a read is not the resource", server_wide=False)

    def search(self, source: Source, identifier: Identifier) -> list[Held]:
        """Return the resources with exactly this identifier.

        Other resources that the server returns are ignored. Raises TransientFailure if the answer is not a searchset or
        reports an error, and PermanentFailure if the server returns pages of resources that do not match.
        """
        reply = self._server.call("GET", source.resource_type, query={"identifier": identifier.token})
        body = reply.body
        if not isinstance(body, dict) or body.get("resourceType") != "Bundle":
            raise TransientFailure("not-fhir", "the response to a search is not a Bundle", server_wide=False)
        if body.get("type", "searchset") != "searchset" or any(map(is_error_outcome, _list_entries(body))):
            raise TransientFailure("not-fhir", "the response to a search reports an error", server_wide=False)
        matches = {
            resource["id"]: _hold(source, resource, contents.read_version(source.resource_type, {}, resource))
            for resource in _list_resources(source, body)
            if contents.has_identifier(resource, identifier)
        }
        if len(matches) < 2 and _has_next_page(body):
            raise PermanentFailure(
                "not-searchable",
                "the FHIR server answers a search by identifier with pages of other resources: it must support the "
                f"search parameter identifier of {source.resource_type}",
            )
        return list(matches.values())


def _hold(source: Source, resource: dict[str, Any], version_id: str | None) -> Held:
    return Held(str(resource["id"]), version_id, contents.hash_content(resource), resource)


def _list_entries(body: object) -> list[object]:
    entries = body.get("entry") if isinstance(body, dict) and body.get("resourceType") == "Bundle" else None
    return [e.get("resource") for e in entries if isinstance(e, dict)] if isinstance(entries, list) else []


def _list_resources(source: Source, body: object) -> Iterable[dict[str, Any]]:
    for resource in _list_entries(body):
        if contents.is_resource(resource, source.resource_type):
            yield resource


def _has_next_page(body: dict[str, Any]) -> bool:
    links = body.get("link")
    return isinstance(links, list) and any(isinstance(link, dict) and link.get("relation") == "next" for link in links)
