"""Deletes the resource of a deleted row, if it was delivered for the row and has not been changed by others since.

A resource is deleted by its id, never by an identifier, because other resources may have the same identifier. For a row
that was never sent, nothing is deleted.
"""

from fhir_assets.delivery.connector import contents
from fhir_assets.delivery.connector.changes import Change, Delivered
from fhir_assets.delivery.connector.confirmation import Confirmation
from fhir_assets.delivery.connector.lookup import ABSENT, Held, Lookup
from fhir_assets.delivery.connector.mapping import Identifier, Source
from fhir_assets.delivery.connector.outcomes import Acknowledged
from fhir_assets.delivery.connector.server import FhirServer, PermanentFailure


class Removal:
    """Deletes resources on one server. Safe for use by several threads."""

    def __init__(self, server: FhirServer, lookup: Lookup, confirmation: Confirmation) -> None:
        self._server = server
        self._lookup = lookup
        self._confirmation = confirmation

    def remove(self, source: Source, change: Change) -> Acknowledged:
        """Delete the resource of a record whose row was deleted. Raises TransientFailure or PermanentFailure.

        The resource of an acknowledged delivery is read by its id. If only a request without an answer or a delivery
        without an id is recorded, the resource is searched for by the identifier, and deleted if it is the only match
        and has the content that was sent.
        """
        known = change.delivered
        if known is not None and known.resource_id is not None:
            held = self._lookup.read(source, known.resource_id)
            if held is not None and _is_of_another_row(held, known.identifier, known.hashes, change):
                return Acknowledged(change, "nothing", None)
            if held is not None:
                _require_unchanged(held, known, change)
                self._delete(source, held)
                return Acknowledged(change, "deleted", None)
        outcome = "nothing"
        unconfirmed = {sent.identifier for sent in change.sent}
        if known is not None and known.resource_id is None:
            unconfirmed.add(known.identifier)
        for identifier in sorted(unconfirmed, key=lambda i: i.token):
            if (held := self._find_sent(source, change, identifier)) is not None:
                self._delete(source, held)
                outcome = "deleted"
        return Acknowledged(change, outcome, None)

    def _find_sent(self, source: Source, change: Change, identifier: Identifier) -> Held | None:
        """Return the resource that a request without an answer has created; None if there is none."""
        of_others = {holder.resource_id for holder in change.holders}
        matches = [held for held in self._lookup.search(source, identifier) if held.id not in of_others]
        if not matches:
            return None
        if len(matches) > 1:
            raise PermanentFailure(
                "several-matches",
                "the row was deleted after a delivery that was not confirmed, and the FHIR server has several "
                "resources with its identifier: none is deleted. Delete the one of the row by hand, then discard this "
                "change",
            )
        hashes = change.hashes_sent_with(identifier)
        if change.delivered is not None and change.delivered.identifier == identifier:
            hashes |= change.delivered.hashes
        if _is_of_another_row(matches[0], identifier, hashes, change):
            return None
        if matches[0].content_hash not in hashes:
            raise PermanentFailure(
                "not-ours",
                "the row was deleted after a delivery that was not confirmed, and the resource with its identifier on "
                "the FHIR server is not what was sent: it is not deleted. If it is the row's, delete it by hand, then "
                "discard this change",
            )
        return matches[0]

    def _delete(self, source: Source, held: Held) -> None:
        reply = self._server.call(
            "DELETE", f"{source.resource_type}/{held.id}", if_match=held.version_id, absent=ABSENT
        )
        self._confirmation.confirm_deletion(source, reply, held.id)


def _is_of_another_row(held: Held, identifier: Identifier, hashes: set[str], change: Change) -> bool:
    """Return whether another row with this identifier has taken the resource over since.

    Its request had no answer yet. It is delivered again or, if that row is deleted too, deleted with it.
    """
    return held.content_hash not in hashes and held.content_hash in change.hashes_sent_by_others(identifier)


def _require_unchanged(held: Held, known: Delivered, change: Change) -> None:
    """Raise PermanentFailure if the resource was changed by another client since it was delivered."""
    identifiers = {known.identifier, *(sent.identifier for sent in change.sent)}
    hashes = known.hashes | {sent.content_hash for sent in change.sent}
    if any(contents.has_identifier(held.resource, identifier) for identifier in identifiers):
        if known.sent_hash is None or held.content_hash in hashes:
            return
        # A server that returned no content may have stored another form of the resource: then its version decides.
        if known.stored_hash is None and held.version_id is not None and held.version_id == known.version_id:
            return
    raise PermanentFailure(
        "changed-elsewhere",
        "the row was deleted, but its resource on the FHIR server was changed by another client after the delivery: it "
        "is not deleted. Delete it by hand, or discard this change to keep it",
    )
