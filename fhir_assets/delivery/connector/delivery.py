"""Sends the requests that a change needs. Delivery is idempotent: a repetition, even after a crash, changes nothing.

A record is created on the server if no resource has its identifier, and from then on addressed by the id that this
delivery returned. A resource with the identifier that was not delivered for a record is foreign: it is not updated
unless it may be taken over, and never deleted. Where the server's CapabilityStatement offers conditional create
(https://hl7.org/fhir/R4/http.html#ccreate), a foreign resource that appears after the search is not overwritten either;
elsewhere, and where it may be taken over, the creation is a conditional update (#cond-update).
"""

from collections.abc import Sequence
from dataclasses import replace

import orjson

from fhir_assets.delivery.connector import contents
from fhir_assets.delivery.connector.changes import Change, Outgoing
from fhir_assets.delivery.connector.confirmation import Confirmation, retrying_refusals
from fhir_assets.delivery.connector.lookup import ABSENT, Held, Lookup
from fhir_assets.delivery.connector.mapping import Identifier, Source
from fhir_assets.delivery.connector.outcomes import Acknowledged
from fhir_assets.delivery.connector.removal import Removal
from fhir_assets.delivery.connector.server import FhirServer, PermanentFailure, Reply, TransientFailure
from fhir_assets.fhir.outcome import is_error_outcome
from fhir_assets.fhir.validation import Validator

_EXISTS = frozenset({304})
"""The status, besides 200, with which servers answer a create if a matching resource exists."""

_GONE = ABSENT | {405}
"""The statuses with which servers that do not let clients choose an id answer the update of a deleted resource."""


class Delivery:
    """Delivers changes of the sources to one server. Safe for use by several threads.

    With ``take_over``, a foreign resource with the identifier of a row is updated; otherwise the row is refused.
    """

    def __init__(self, sources: dict[str, Source], server: FhirServer, *, take_over: bool = False) -> None:
        self._sources = sources
        self._server = server
        self._take_over = take_over
        self._validator = Validator()
        self._lookup = Lookup(server)
        self._confirmation = Confirmation(server, self._lookup)
        self._removal = Removal(server, self._lookup, self._confirmation)

    def prepare(self, change: Change) -> Change:
        """Return the change with the resource to send, or with the error that prevents it."""
        if change.row is None:
            return change
        try:
            return replace(change, outgoing=self._build(self._sources[change.claim.source], change))
        except Exception as error:
            return replace(change, outgoing=error)

    def deliver(self, change: Change) -> Acknowledged:
        """Make the server's resource equal to the changed row, or delete it. ``change`` is the result of ``prepare``.

        Raises TransientFailure or PermanentFailure.
        """
        source = self._sources[change.claim.source]
        change = self._on_this_server(source, change)
        if change.outgoing is None:
            return self._removal.remove(source, change)
        if isinstance(change.outgoing, Exception):
            raise change.outgoing
        self._check(change.outgoing)
        return self._put(source, change, change.outgoing)

    def _build(self, source: Source, change: Change) -> Outgoing:
        assert change.row is not None
        identifier = source.read_identifier(change.row)
        if identifier is None:
            raise PermanentFailure(
                "no-identifier",
                f"the row has no {source.identifier.system} or no {source.identifier.value}: "
                "set both, then the row is delivered",
            )
        resource = source.build_resource(change.row, change.children)
        if not contents.has_identifier(resource, identifier):
            raise PermanentFailure(
                "identifier-not-sent",
                f"the resource of the row does not contain its identifier ({source.identifier.system}, "
                f"{source.identifier.value}), by which the server would look for it: correct CONNECTOR_MAPPING",
            )
        return Outgoing(identifier, resource, contents.hash_content(resource))

    def _check(self, outgoing: Outgoing) -> None:
        verdict = self._validator.check(orjson.dumps(outgoing.resource))
        if not verdict.valid:
            errors = [issue for issue in verdict.issues if issue.severity == "error"]
            rules = ", ".join(sorted({f"{issue.rule} at {issue.path}" for issue in errors})[:3])
            raise PermanentFailure("invalid", f"the resource of the row is invalid in R4: {rules}")

    def _on_this_server(self, source: Source, change: Change) -> Change:
        """Return the change without the delivered resource if that resource is on another server.

        An id is meaningful on its own server only. If the same server has another address now, its resources are still
        the delivered ones.
        """
        known = change.delivered
        if known is None or known.resource_id is None or known.server in (None, self._server.base_url):
            return change
        held = self._lookup.read(source, known.resource_id)
        if (
            held is not None
            and held.content_hash in known.hashes
            and contents.has_identifier(held.resource, known.identifier)
        ):
            return change
        return replace(change, delivered=None)

    def _put(self, source: Source, change: Change, outgoing: Outgoing) -> Acknowledged:
        if any(holder.current and holder.identifier == outgoing.identifier for holder in change.holders):
            raise PermanentFailure(
                "identifier-of-another-row",
                f"another row of {source.table} has the same {source.identifier.system} and "
                f"{source.identifier.value}, and its resource is delivered: correct one of the rows, then replay this "
                "change",
            )
        known_id = change.delivered.resource_id if change.delivered else None
        if known_id is None:
            return self._create(source, change, outgoing)
        if change.claim.attempts > 1 or change.sent:
            held = self._lookup.read(source, known_id)
            if held is not None and held.content_hash == outgoing.content_hash:
                return self._acknowledge_found(change, outgoing, held)
        return self._put_by_id(source, change, outgoing, known_id) or self._create(source, change, outgoing)

    def _create(self, source: Source, change: Change, outgoing: Outgoing) -> Acknowledged:
        """Create the record's resource, or update the one that an earlier delivery has created."""
        # With take_over and without an earlier delivery, the conditional update itself finds a single foreign match.
        sent_by_others = change.hashes_sent_by_others(outgoing.identifier)
        has_earlier = change.claim.attempts > 1 or change.sent or sent_by_others or change.delivered
        if not self._take_over or has_earlier or change.holders:
            held = self._find(source, change, outgoing.identifier)
            if held is not None:
                return self._update_found(source, change, outgoing, held)
        if not self._take_over and self._server.creates_conditionally(source.resource_type):
            return self._post(source, change, outgoing)
        reply = self._send(
            "PUT",
            source.resource_type,
            outgoing,
            outgoing.resource,
            query={"identifier": outgoing.identifier.token},
        )
        return self._acknowledge(source, change, outgoing, reply, None)

    def _post(self, source: Source, change: Change, outgoing: Outgoing) -> Acknowledged:
        """Create the record's resource, unless a resource with its identifier has appeared since the search."""
        before = outgoing.uncertain
        reply = self._send(
            "POST",
            source.resource_type,
            outgoing,
            outgoing.resource,
            if_none_exist=outgoing.identifier.token,
            absent=_EXISTS,
        )
        if reply.status not in (200, *_EXISTS) or is_error_outcome(reply.body):
            return self._acknowledge(source, change, outgoing, reply, None)
        # The resource existed, or the server answers a create with 200, too: its content decides which.
        with retrying_refusals():
            matches = self._lookup.search(source, outgoing.identifier)
        ours = [held for held in matches if held.content_hash == outgoing.content_hash]
        if len(matches) == 1 and ours:
            return self._acknowledge_found(change, outgoing, ours[0])
        if not matches or ours:
            raise TransientFailure(
                "unconfirmed",
                f"the FHIR server answered {reply.status} to a creation, but does not have one resource as it was sent",
                server_wide=False,
            )
        outgoing.uncertain = before
        raise _refuse_foreign(source, matches)

    def _update_found(self, source: Source, change: Change, outgoing: Outgoing, held: Held) -> Acknowledged:
        """Update a resource that a search found, unless it already has the content."""
        if held.content_hash == outgoing.content_hash:
            return self._acknowledge_found(change, outgoing, held)
        updated = self._put_by_id(source, change, outgoing, held.id)
        if updated is None:
            raise TransientFailure(
                "gone", "the FHIR server finds the resource, but refuses its update", server_wide=False
            )
        return updated

    def _find(self, source: Source, change: Change, identifier: Identifier) -> Held | None:
        """Return the resource to update, or None if there is none.

        This is the record's own resource, with this identifier or an earlier one, or else a single foreign resource
        with this identifier if it may be taken over. Raises PermanentFailure if only other resources have the
        identifier.
        """
        matches = self._lookup.search(source, identifier)
        if (own := _select_own(change, identifier, matches)) is not None:
            return own
        if matches and not self._take_over:
            raise _refuse_foreign(source, matches)
        if (renamed := self._find_renamed(source, change, identifier)) is not None:
            return renamed
        if len(matches) > 1:
            raise _refuse_foreign(source, matches)
        return matches[0] if matches else None

    def _find_renamed(self, source: Source, change: Change, identifier: Identifier) -> Held | None:
        """Return the record's own resource that still has another identifier on the server; None if there is none."""
        others = {sent.identifier for sent in change.sent}
        if change.delivered is not None:
            others.add(change.delivered.identifier)
        for other in sorted(others - {identifier}, key=lambda i: i.token):
            if (own := _select_own(change, other, self._lookup.search(source, other))) is not None:
                return own
        return None

    def _acknowledge_found(self, change: Change, outgoing: Outgoing, held: Held) -> Acknowledged:
        return Acknowledged(change, "found", self._confirmation.describe_held(outgoing, held))

    def _acknowledge(
        self, source: Source, change: Change, outgoing: Outgoing, reply: Reply, target: str | None
    ) -> Acknowledged:
        delivered = self._confirmation.confirm_update(source, outgoing, reply, target)
        return Acknowledged(change, "created" if reply.status == 201 else "updated", delivered)

    def _put_by_id(self, source: Source, change: Change, outgoing: Outgoing, resource_id: str) -> Acknowledged | None:
        """Update a resource. Return None if the server no longer has it."""
        resource = {**outgoing.resource, "id": resource_id}
        reply = self._send("PUT", f"{source.resource_type}/{resource_id}", outgoing, resource, absent=_GONE)
        if reply.status in _GONE:
            outgoing.uncertain = False
            return None
        return self._acknowledge(source, change, outgoing, reply, resource_id)

    def _send(
        self,
        method: str,
        path: str,
        outgoing: Outgoing,
        resource: dict[str, object],
        *,
        query: dict[str, str] | None = None,
        if_none_exist: str | None = None,
        absent: frozenset[int] = frozenset(),
    ) -> Reply:
        """Send an update or a create. Until the answer is confirmed, it is unknown whether the server has stored the
        resource.
        """
        before, outgoing.uncertain = outgoing.uncertain, True
        try:
            return self._server.call(
                method, path, query=query, body=orjson.dumps(resource), if_none_exist=if_none_exist, absent=absent
            )
        except PermanentFailure:
            outgoing.uncertain = before
            raise


def _refuse_foreign(source: Source, matches: Sequence[Held]) -> PermanentFailure:
    """Return the failure of a row whose identifier belongs to resources that were not delivered for it."""
    if len(matches) > 1:
        return PermanentFailure("several-matches", "the FHIR server has several resources with this identifier")
    return PermanentFailure(
        "foreign-resource",
        f"the FHIR server has a {source.resource_type} with this identifier that was not delivered for this row: it is "
        "not changed. Remove the identifier there, or set CONNECTOR_TAKE_OVER=true to let the row replace its content, "
        "then replay this change",
    )


def _select_own(change: Change, identifier: Identifier, matches: Sequence[Held]) -> Held | None:
    """Return the record's own resource among all with this identifier; None if there is none, or more than one."""
    own = [held for held in matches if _is_own(change, identifier, held, alone=len(matches) == 1)]
    return own[0] if len(own) == 1 else None


def _is_own(change: Change, identifier: Identifier, held: Held, *, alone: bool) -> bool:
    """Return whether a resource with this identifier was delivered or sent for the record.

    A resource that another record delivered also counts, if the row of that record no longer has the identifier.
    ``alone`` is True if no other resource has the identifier.
    """
    known = change.delivered
    if known is not None and known.resource_id == held.id:
        return True
    for holder in change.holders:
        if holder.resource_id == held.id:
            return not holder.current and held.content_hash in holder.hashes
    sent = change.hashes_sent_with(identifier)
    if _is_current(change, identifier):
        sent |= change.hashes_sent_by_others(identifier)
    if held.content_hash in sent:
        return True
    # An earlier release delivered to a server that returned no id: its conditional update matched only this resource.
    return alone and known is not None and known.resource_id is None and known.identifier == identifier


def _is_current(change: Change, identifier: Identifier) -> bool:
    return isinstance(change.outgoing, Outgoing) and change.outgoing.identifier == identifier
