"""Confirms that the server did what the status of its response says, because the status alone is not reliable."""

from collections.abc import Iterator
from contextlib import contextmanager

from fhir_assets.delivery.connector import contents
from fhir_assets.delivery.connector.changes import Delivered, Outgoing
from fhir_assets.delivery.connector.lookup import Held, Lookup
from fhir_assets.delivery.connector.mapping import Source
from fhir_assets.delivery.connector.server import FhirServer, PermanentFailure, Reply, TransientFailure


class Confirmation:
    """Confirms answers to updates and deletions.

    An update is confirmed by the resource itself in the answer, or by a Location or ETag with an empty body or with an
    OperationOutcome without an error. After any other answer (``{"status": "maintenance"}``, an OperationOutcome with
    an error, a Bundle), the resource is read back, and the update is confirmed if the server has the content that was
    sent. A deletion is confirmed by an empty body or an OperationOutcome without an error, otherwise by a read that
    finds nothing.
    """

    def __init__(self, server: FhirServer, lookup: Lookup) -> None:
        self._server = server
        self._lookup = lookup

    def confirm_update(self, source: Source, outgoing: Outgoing, reply: Reply, target: str | None) -> Delivered:
        """Return the resource of an update. ``target`` is the id that was updated; None if the server chose it.

        Raises TransientFailure if the server does not have what was sent.
        """
        located, _ = contents.read_location(source.resource_type, reply.headers)
        body = reply.body
        if (
            contents.is_resource(body, source.resource_type)
            and body["id"] == (target or located or body["id"])
            and contents.has_identifier(body, outgoing.identifier)
        ):
            version = contents.read_version(source.resource_type, reply.headers, body)
            return self._describe(outgoing, body["id"], version, contents.hash_content(body))
        resource_id = target or located
        named = located == resource_id if located else bool(reply.headers.get("ETag"))
        confirmed = contents.has_no_error(body) and named and reply.status != 202
        if confirmed and resource_id is not None:
            version = contents.read_version(source.resource_type, reply.headers, None)
            return self._describe(outgoing, resource_id, version, None)
        return self._read_back(source, outgoing, resource_id, status=reply.status, confirmed=confirmed)

    def confirm_deletion(self, source: Source, reply: Reply, resource_id: str) -> None:
        """Return if the resource is deleted. Raises TransientFailure if it still exists."""
        if reply.status in (404, 410) or (contents.has_no_error(reply.body) and reply.status != 202):
            return
        with retrying_refusals():
            held = self._lookup.read(source, resource_id)
        if held is not None:
            raise _unconfirmed(reply.status, "a deletion, but still has the resource")

    def describe_held(self, outgoing: Outgoing, held: Held) -> Delivered:
        """Return what to record about a resource that was read from the server and is accepted as the one that was
        sent.
        """
        return self._describe(outgoing, held.id, held.version_id, held.content_hash)

    def _describe(
        self, outgoing: Outgoing, resource_id: str, version_id: str | None, stored_hash: str | None
    ) -> Delivered:
        return Delivered(
            resource_id,
            outgoing.identifier,
            self._server.base_url,
            version_id,
            outgoing.content_hash,
            stored_hash,
        )

    def _read_back(
        self, source: Source, outgoing: Outgoing, resource_id: str | None, *, status: int, confirmed: bool
    ) -> Delivered:
        """Read the resource from the server and return it.

        ``confirmed`` is True if the response confirms the update, but has no id.
        """
        with retrying_refusals():
            if resource_id is None:
                matches = self._lookup.search(source, outgoing.identifier)
            else:
                held = self._lookup.read(source, resource_id)
                matches = [held] if held is not None else []
        if len(matches) == 1 and (confirmed or matches[0].content_hash == outgoing.content_hash):
            return self.describe_held(outgoing, matches[0])
        raise _unconfirmed(status, "an update, but not with the resource, and does not have what was sent")


@contextmanager
def retrying_refusals() -> Iterator[None]:
    """Raise the refusal of a read as a TransientFailure.

    The update or the deletion before it may have been executed, so that it must not count as refused.
    """
    try:
        yield
    except PermanentFailure as failure:
        raise TransientFailure(failure.reason, str(failure), server_wide=False) from None


def _unconfirmed(status: int, what: str) -> TransientFailure:
    return TransientFailure("unconfirmed", f"the FHIR server answered {status} to {what}", server_wide=False)
