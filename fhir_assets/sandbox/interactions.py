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
from fhir_assets.sandbox.dates import instant, microseconds
from fhir_assets.sandbox.json_text import stamp
from fhir_assets.sandbox.memory import Store, Version
from fhir_assets.sandbox.outcomes import Refusal
from fhir_assets.sandbox.search import matches, parse

_ID = re.compile(r"[A-Za-z0-9\-.]{1,64}")
_REFERENCE = re.compile(rb'"reference"\s*:\s*"([A-Z][A-Za-z]+)/([A-Za-z0-9\-.]{1,64})(?:/_history/[^"]*)?"')


class _Head(msgspec.Struct):
    resourceType: str  # noqa: N815
    id: str | None = None


_head = msgspec.json.Decoder(_Head)


@dataclass(frozen=True, slots=True)
class Done:
    """The result of an interaction: its status, and the version that it created or found (None if there is none).

    ``changed`` is False if the interaction did not change the store.
    """

    status: int
    version: Version | None
    changed: bool = True


class Interactions:
    """The interactions of one server.

    ``all_types`` supports the whole catalog instead of the types in use. ``referential_integrity`` refuses a write with
    ``Type/id`` references to resources that do not exist.
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
        return microseconds(self._clock()) // 1000 * 1000

    def offers(self, resource_type: str) -> bool:
        """Return whether the server supports a type."""
        return resource_type in self._catalog or resource_type in self.store.shelves

    def types(self) -> list[str]:
        """Return the supported types in the order of the catalog, then the others by name."""
        order = [t.name for t in CATALOG if self.offers(t.name)]
        return order + sorted(self.store.shelves.keys() - set(order))

    def require(self, resource_type: str) -> None:
        """Raise Refusal 404 if the server does not support the type."""
        if not self.offers(resource_type):
            raise Refusal(404, "not-supported", "This server does not have that resource type")

    def latest(self, resource_type: str, resource_id: str) -> Version:
        """Return the current version of a resource. Raises Refusal: 404 if it never existed, 410 if it was deleted."""
        self.require(resource_type)
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
        self.require(resource_type)
        latest = self.store.latest(resource_type, resource_id)
        if latest is None:
            raise Refusal(404, "not-found", f"No such {resource_type}")
        return list(latest.history())

    def create(
        self, resource_type: str, body: bytes, if_none_exist: str | None = None, new_id: str | None = None
    ) -> Done:
        """Store a new resource under a new id, or under ``new_id`` if the server chose it before."""
        self._accept(resource_type, body)
        if if_none_exist:
            found = self.find(resource_type, if_none_exist)
            if len(found) > 1:
                raise Refusal(412, "multiple-matches", "If-None-Exist matches several resources")
            if found:
                return Done(200, found[0], changed=False)
        return Done(201, self._write(resource_type, new_id or str(uuid.uuid4()), body))

    def update(self, resource_type: str, resource_id: str, body: bytes, if_match: str | None = None) -> Done:
        """Store a resource, or a new version of it, under the client's id."""
        head = self._accept(resource_type, body)
        if not _ID.fullmatch(resource_id):
            raise Refusal(400, "value", "The id in the URL is not a FHIR id")
        if head.id != resource_id:
            raise Refusal(400, "value", "The resource's id is not the id in the URL")
        latest = self.store.latest(resource_type, resource_id)
        if if_match is not None and (latest is None or f'W/"{latest.version_id}"' != if_match):
            raise Refusal(412, "conflict", "If-Match names another version than the current one")
        version = self._write(resource_type, resource_id, body)
        return Done(201 if latest is None or latest.deleted else 200, version)

    def update_where(self, resource_type: str, query: str, body: bytes) -> Done:
        """Update the one match of a condition, or create a resource. Several matches are refused with 412."""
        head = self._accept(resource_type, body)
        found = self.find(resource_type, query)
        if len(found) > 1:
            raise Refusal(412, "multiple-matches", "The conditional update matches several resources")
        if not found:
            return Done(201, self._write(resource_type, head.id or str(uuid.uuid4()), body))
        if head.id is not None and head.id != found[0].id:
            raise Refusal(400, "value", "The resource's id is not the id of the match")
        return Done(200, self._write(resource_type, found[0].id, body))

    def delete(self, resource_type: str, resource_id: str) -> Done:
        """Delete a resource. Status 204 also if it does not exist or was deleted before."""
        self.require(resource_type)
        latest = self.store.latest(resource_type, resource_id)
        if latest is None or latest.deleted:
            return Done(204, latest, changed=False)
        return Done(204, self._store(resource_type, resource_id, lambda *_: b""))

    def delete_where(self, resource_type: str, query: str) -> Done:
        """Delete the one match of a condition. Several matches are refused with 412."""
        self.require(resource_type)
        found = self.find(resource_type, query)
        if len(found) > 1:
            raise Refusal(412, "multiple-matches", "The conditional delete matches several resources")
        return self.delete(resource_type, found[0].id) if found else Done(204, None, changed=False)

    def find(self, resource_type: str, query: str) -> list[Version]:
        """Return the matches of a condition such as ``identifier=system|value``. Unknown parameters are refused."""
        search = parse(resource_type, parse_qsl(query, keep_blank_values=True), strict=True)
        if search.ids is None and not search.tokens:
            raise Refusal(400, "required", "The condition has no search parameter")
        return matches(self.store, resource_type, search)

    def _accept(self, resource_type: str, body: bytes) -> _Head:
        self.require(resource_type)
        try:
            head = _head.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise Refusal(400, "structure", "The body is not a FHIR resource in JSON") from None
        if head.resourceType != resource_type:
            raise Refusal(400, "value", "The resource's type is not the type in the URL")
        if head.id is not None and not _ID.fullmatch(head.id):
            raise Refusal(400, "value", "The resource's id is not a FHIR id")
        if self._referential_integrity:
            for target_type, target_id in _REFERENCE.findall(body):
                target = self.store.latest(target_type.decode(), target_id.decode())
                if (target is None or target.deleted) and target_id.decode() != head.id:
                    raise Refusal(422, "not-found", f"A reference to a {target_type.decode()} points to nothing here")
        return head

    def _write(self, resource_type: str, resource_id: str, body: bytes) -> Version:
        try:
            return self._store(resource_type, resource_id, lambda *marks: stamp(body, resource_id, *marks))
        except msgspec.DecodeError:
            raise Refusal(400, "structure", "The resource's meta is not a JSON object") from None

    def _store(self, resource_type: str, resource_id: str, text: Callable[[str, str], bytes]) -> Version:
        latest = self.store.latest(resource_type, resource_id)
        when = self.now()
        if latest is not None:
            when = max(when, latest.when + 1000)
        version_id = self.store.next_version(resource_type, resource_id)
        version = Version(resource_type, resource_id, version_id, when, text(version_id, instant(when)))
        self.store.shelf(resource_type).add(version)
        return version
