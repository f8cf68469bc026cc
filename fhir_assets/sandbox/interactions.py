"""The RESTful interactions of FHIR on the store, without HTTP, for routes and batches.

See https://hl7.org/fhir/R4/http.html. Errors are raised as Refusal with the status that the specification requires.
"""

import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from urllib.parse import parse_qsl

import msgspec

from fhir_assets.catalog import CATALOG
from fhir_assets.sandbox.dates import instant, to_microseconds
from fhir_assets.sandbox.json_text import set_id_and_version
from fhir_assets.sandbox.memory import Store, Version
from fhir_assets.sandbox.outcomes import Refusal
from fhir_assets.sandbox.search import find_matches, parse_search

_ID = re.compile(r"[A-Za-z0-9\-.]{1,64}")
_REFERENCE = re.compile(rb'"reference"\s*:\s*"([A-Z][A-Za-z]+)/([A-Za-z0-9\-.]{1,64})(?:/_history/[^"]*)?"')


class _Head(msgspec.Struct, rename="camel"):
    resource_type: str
    id: str | None = None


_head = msgspec.json.Decoder(_Head)


@dataclass(frozen=True, slots=True)
class InteractionResult:
    """The result of an interaction: its HTTP status, and the version that it created or read (None if there is none).

    ``changed`` is False if the interaction did not change the store.
    """

    status: int
    version: Version | None
    changed: bool = True


class Interactions:
    """The interactions of one server.

    With ``all_types``, all types of the catalog are supported, otherwise only the types of stored resources. With
    ``referential_integrity``, a write with ``Type/id`` references to resources that do not exist is refused.
    """

    def __init__(
        self,
        store: Store,
        *,
        all_types: bool = True,
        referential_integrity: bool = False,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.store = store
        self._catalog = {t.name for t in CATALOG} if all_types else set()
        self._referential_integrity = referential_integrity
        self._clock = clock

    def now(self) -> int:
        """Return the server's time in microseconds, rounded to milliseconds."""
        return to_microseconds(self._clock()) // 1000 * 1000

    def offers(self, resource_type: str) -> bool:
        """Return whether the server supports a type."""
        return resource_type in self._catalog or resource_type in self.store.type_stores

    def types(self) -> list[str]:
        """Return the supported types: those of the catalog in its order, then all others by name."""
        order = [t.name for t in CATALOG if self.offers(t.name)]
        return order + sorted(self.store.type_stores.keys() - set(order))

    def require_type(self, resource_type: str) -> None:
        """Raise Refusal 404 if the server does not support the type."""
        if not self.offers(resource_type):
            raise Refusal(404, "not-supported", "This server does not support the resource type")

    def latest(self, resource_type: str, resource_id: str) -> Version:
        """Return the current version of a resource. Raises Refusal: 404 if it never existed, 410 if it was deleted."""
        self.require_type(resource_type)
        version = self.store.latest(resource_type, resource_id)
        if version is None:
            raise Refusal(404, "not-found", f"No such {resource_type}")
        if version.deleted:
            raise Refusal(410, "deleted", f"This {resource_type} was deleted")
        return version

    def version(self, resource_type: str, resource_id: str, version_id: str) -> Version:
        """Return one version of a resource, current or not."""
        for version in self.history(resource_type, resource_id):
            if version.version_id == version_id:
                if version.deleted:
                    raise Refusal(410, "deleted", "This version is the deletion of the resource")
                return version
        raise Refusal(404, "not-found", f"No such version of this {resource_type}")

    def history(self, resource_type: str, resource_id: str) -> list[Version]:
        """Return all versions of a resource, newest first."""
        self.require_type(resource_type)
        latest = self.store.latest(resource_type, resource_id)
        if latest is None:
            raise Refusal(404, "not-found", f"No such {resource_type}")
        return list(latest.history())

    def create(
        self, resource_type: str, body: bytes, if_none_exist: str | None = None, new_id: str | None = None
    ) -> InteractionResult:
        """Store a new resource under ``new_id``, or under a new random id."""
        self._accept(resource_type, body)
        if if_none_exist:
            existing = self.find(resource_type, if_none_exist)
            if len(existing) > 1:
                raise Refusal(412, "multiple-matches", "If-None-Exist matches several resources")
            if existing:
                return InteractionResult(200, existing[0], changed=False)
        return InteractionResult(201, self._write(resource_type, new_id or str(uuid.uuid4()), body))

    def update(
        self, resource_type: str, resource_id: str, body: bytes, if_match: str | None = None
    ) -> InteractionResult:
        """Store a resource under the client's id, as a new version if the resource exists."""
        head = self._accept(resource_type, body)
        if not _ID.fullmatch(resource_id):
            raise Refusal(400, "value", "The id in the URL is not a FHIR id")
        if head.id != resource_id:
            raise Refusal(400, "value", "The resource's id is not the id in the URL")
        latest = self.store.latest(resource_type, resource_id)
        if if_match is not None and (latest is None or f'W/"{latest.version_id}"' != if_match):
            raise Refusal(412, "conflict", "If-Match does not name the current version")
        version = self._write(resource_type, resource_id, body)
        return InteractionResult(201 if latest is None or latest.deleted else 200, version)

    def update_matching(self, resource_type: str, query: str, body: bytes) -> InteractionResult:
        """Update the only match of a condition, or create a resource if none matches. Several matches give 412."""
        head = self._accept(resource_type, body)
        existing = self.find(resource_type, query)
        if len(existing) > 1:
            raise Refusal(412, "multiple-matches", "The conditional update matches several resources")
        if not existing:
            return InteractionResult(201, self._write(resource_type, head.id or str(uuid.uuid4()), body))
        if head.id is not None and head.id != existing[0].id:
            raise Refusal(400, "value", "The resource's id is not the id of the match")
        return InteractionResult(200, self._write(resource_type, existing[0].id, body))

    def delete(self, resource_type: str, resource_id: str, if_match: str | None = None) -> InteractionResult:
        """Delete a resource. The status is 204 even if the resource does not exist or is already deleted."""
        self.require_type(resource_type)
        latest = self.store.latest(resource_type, resource_id)
        if latest is None or latest.deleted:
            return InteractionResult(204, latest, changed=False)
        if if_match is not None and f'W/"{latest.version_id}"' != if_match:
            raise Refusal(412, "conflict", "If-Match does not name the current version")
        return InteractionResult(204, self._store(resource_type, resource_id, lambda *_: b""))

    def delete_matching(self, resource_type: str, query: str) -> InteractionResult:
        """Delete the only match of a condition. Several matches give 412."""
        self.require_type(resource_type)
        existing = self.find(resource_type, query)
        if len(existing) > 1:
            raise Refusal(412, "multiple-matches", "The conditional delete matches several resources")
        return self.delete(resource_type, existing[0].id) if existing else InteractionResult(204, None, changed=False)

    def find(self, resource_type: str, query: str) -> list[Version]:
        """Return the matches of a condition such as ``identifier=system|value``. Unknown parameters are refused."""
        search = parse_search(resource_type, parse_qsl(query, keep_blank_values=True), strict=True)
        if search.ids is None and not search.tokens:
            raise Refusal(400, "required", "The condition has no search parameter")
        return find_matches(self.store, resource_type, search)

    def _accept(self, resource_type: str, body: bytes) -> _Head:
        self.require_type(resource_type)
        try:
            head = _head.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise Refusal(400, "structure", "The body is not a FHIR resource in JSON") from None
        if head.resource_type != resource_type:
            raise Refusal(400, "value", "The resource's type is not the type in the URL")
        if head.id is not None and not _ID.fullmatch(head.id):
            raise Refusal(400, "value", "The resource's id is not a FHIR id")
        if self._referential_integrity:
            for target_type, target_id in _REFERENCE.findall(body):
                target = self.store.latest(target_type.decode(), target_id.decode())
                if (target is None or target.deleted) and target_id.decode() != head.id:
                    raise Refusal(
                        422, "not-found", f"A reference to a {target_type.decode()} has no target on this server"
                    )
        return head

    def _write(self, resource_type: str, resource_id: str, body: bytes) -> Version:
        try:
            return self._store(
                resource_type,
                resource_id,
                lambda version_id, last_updated: set_id_and_version(body, resource_id, version_id, last_updated),
            )
        except msgspec.DecodeError:
            raise Refusal(400, "structure", "The resource's meta is not a JSON object") from None

    def _store(self, resource_type: str, resource_id: str, build_body: Callable[[str, str], bytes]) -> Version:
        latest = self.store.latest(resource_type, resource_id)
        when = self.now()
        if latest is not None:
            when = max(when, latest.when + 1000)
        version_id = self.store.next_version(resource_type, resource_id)
        version = Version(resource_type, resource_id, version_id, when, build_body(version_id, instant(when)))
        self.store.type_store(resource_type).add(version)
        return version
