"""Sends the requests that a change needs. Delivery is idempotent: a repetition, also after a crash, changes nothing.

A record is addressed on the server by its identifier (conditional update and delete,
https://hl7.org/fhir/R4/http.html#cond-update). If the identifier itself changed, the record is addressed by the id of
its last delivery instead, so that the resource keeps its id and references to it stay valid.
"""

from typing import Any

import orjson

from fhir_assets.delivery.connector.mapping import Identifier, Source
from fhir_assets.delivery.connector.outbox import Change, Delivered
from fhir_assets.delivery.connector.server import FhirServer, PermanentFailure, Reply, TransientFailure
from fhir_assets.delivery.connector.settle import Acknowledged
from fhir_assets.fhir.validation import Validator

_ABSENT = frozenset({404, 410})
_SERVER_ELEMENTS = ("id", "meta", "text")


class Delivery:
    """Delivers changes of the sources to one server. Safe for use by several threads."""

    def __init__(self, sources: dict[str, Source], server: FhirServer) -> None:
        self._sources = sources
        self._server = server
        self._validator = Validator()

    def deliver(self, change: Change) -> Acknowledged:
        """Make the server's resource equal to the changed row, or delete it.

        Raises TransientFailure or PermanentFailure.
        """
        source = self._sources[change.claim.source]
        if change.row is None:
            return self._remove(source, change)
        identifier = source.read_identifier(change.row)
        if identifier is None:
            raise PermanentFailure(
                "no-identifier",
                f"the row has no {source.identifier.system} or no {source.identifier.value}: "
                "set both, then the row is delivered",
            )
        resource = source.build_resource(change.row, change.children)
        self._check(resource)
        return self._put(source, change, identifier, resource)

    def _put(self, source: Source, change: Change, identifier: Identifier, resource: dict[str, Any]) -> Acknowledged:
        target_id = self._find_renamed(source, change, identifier)
        if change.claim.attempts > 1:
            delivered_id = self._find_delivered(source, identifier, resource, target_id)
            if delivered_id is not None:
                return Acknowledged(change, "found", Delivered(delivered_id, identifier))
        if target_id is not None:
            reply = self._put_by_id(source, target_id, resource)
        else:
            try:
                reply = self._put_by_identifier(source, identifier, resource)
            except PermanentFailure as failure:
                known = change.delivered.resource_id if change.delivered else None
                if failure.reason != "several-matches" or known is None:
                    raise
                reply = self._put_by_id(source, known, resource)
        outcome = "created" if reply.status == 201 else "updated"
        return Acknowledged(change, outcome, Delivered(_read_resource_id(source, reply) or target_id, identifier))

    def _find_renamed(self, source: Source, change: Change, identifier: Identifier) -> str | None:
        """Return the id of the resource to update if it still has another identifier on the server.

        None means that the record is addressed by its current identifier.
        """
        if change.delivered is not None and change.delivered.resource_id is not None:
            return None if change.delivered.identifier == identifier else change.delivered.resource_id
        other_identifiers = set(change.former_identifiers)
        if change.delivered is not None and not change.shared:
            other_identifiers.add(change.delivered.identifier)
        for former in sorted(other_identifiers - {identifier}, key=lambda i: i.token):
            if len(matches := self._search(source, former)) == 1:
                return str(matches[0]["id"])
        return None

    def _remove(self, source: Source, change: Change) -> Acknowledged:
        known = change.delivered
        outcome = "nothing"
        if known is not None and (not change.shared or known.resource_id is not None):
            if change.shared:
                self._server.call("DELETE", f"{source.resource_type}/{known.resource_id}", absent=_ABSENT)
            else:
                self._delete_by_identifier(source, known.identifier, known.resource_id)
            outcome = "deleted"
        for former in change.former_identifiers:
            if known is None or former != known.identifier:
                # A server answers 204 for an absent resource too, so this does not count as a deletion.
                self._delete_by_identifier(source, former, None)
        return Acknowledged(change, outcome, None)

    def _delete_by_identifier(self, source: Source, identifier: Identifier, known: str | None) -> None:
        try:
            query = {"identifier": identifier.token}
            self._server.call("DELETE", source.resource_type, query=query, absent=_ABSENT)
        except PermanentFailure as failure:
            if failure.reason != "several-matches" or known is None:
                raise
            self._server.call("DELETE", f"{source.resource_type}/{known}", absent=_ABSENT)

    def _put_by_identifier(self, source: Source, identifier: Identifier, resource: dict[str, Any]) -> Reply:
        body = orjson.dumps(resource)
        return self._server.call("PUT", source.resource_type, query={"identifier": identifier.token}, body=body)

    def _put_by_id(self, source: Source, resource_id: str, resource: dict[str, Any]) -> Reply:
        body = orjson.dumps({**resource, "id": resource_id})
        return self._server.call("PUT", f"{source.resource_type}/{resource_id}", body=body)

    def _find_delivered(
        self, source: Source, identifier: Identifier, resource: dict[str, Any], target_id: str | None
    ) -> str | None:
        """Return the id of the server's resource if an earlier attempt gave it this content, else None."""
        if target_id is None:
            matches = self._search(source, identifier)
        else:
            reply = self._server.call("GET", f"{source.resource_type}/{target_id}", absent=_ABSENT)
            matches = [reply.body] if reply.status == 200 and isinstance(reply.body, dict) else []
        if len(matches) == 1 and _without_server_elements(matches[0]) == _without_server_elements(resource):
            return str(matches[0]["id"])
        return None

    def _search(self, source: Source, identifier: Identifier) -> list[dict[str, Any]]:
        reply = self._server.call("GET", source.resource_type, query={"identifier": identifier.token})
        if not isinstance(reply.body, dict) or reply.body.get("resourceType") != "Bundle":
            raise TransientFailure("not-fhir", "the response to a search is not a Bundle", server_wide=False)
        resources = [entry.get("resource") for entry in reply.body.get("entry", [])]
        return [r for r in resources if isinstance(r, dict) and r.get("resourceType") == source.resource_type]

    def _check(self, resource: dict[str, Any]) -> None:
        verdict = self._validator.check(orjson.dumps(resource))
        if not verdict.valid:
            errors = [issue for issue in verdict.issues if issue.severity == "error"]
            rules = ", ".join(sorted({f"{issue.rule} at {issue.path}" for issue in errors})[:3])
            raise PermanentFailure("invalid", f"the resource of the row is invalid in R4: {rules}")


def _read_resource_id(source: Source, reply: Reply) -> str | None:
    for header in ("Location", "Content-Location"):
        parts = (reply.headers.get(header) or "").split("/")
        if source.resource_type in parts[:-1]:
            return parts[len(parts) - parts[::-1].index(source.resource_type)]
    if isinstance(reply.body, dict) and reply.body.get("resourceType") == source.resource_type:
        resource_id = reply.body.get("id")
        return resource_id if isinstance(resource_id, str) else None
    return None


def _without_server_elements(resource: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in resource.items() if name not in _SERVER_ELEMENTS}
