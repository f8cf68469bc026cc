"""Checks whether resources still exist on a server, by reading them by id.

See https://hl7.org/fhir/R4/http.html#read.
"""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from itertools import islice

from fhir_assets.errors import NotFhir, ServerRefused
from fhir_assets.fhir.client.http import FhirClient
from fhir_assets.fhir.client.response import FhirResponse, invalid_json_failure
from fhir_assets.fhir.deletions import parse_etag, parse_target
from fhir_assets.fhir.record import Deletion, MalformedResource, read_header
from fhir_assets.notices import Notice

MAX_KNOWN_IDS = 3
"""The maximum number of resources that the server has just returned and that are read to check that reads work."""

_GONE = 410
_NOT_FOUND = 404
_IDS_PER_BATCH = 1000


class ExistenceReader:
    """Reads resources by id to find those that the server no longer has.

    Status 410 means that a resource was deleted. A server that does not keep deletions answers 404, but so does a
    server that hides resources or whose reads do not work. Status 404 therefore counts only if a resource of the same
    type that the server has just returned can be read. In every other case the resource counts as existing, and a
    notice is added.
    """

    def __init__(self, client: FhirClient, *, connections: int = 4) -> None:
        self._client = client
        self._connections = connections

    def drain_notices(self) -> tuple[Notice, ...]:
        """Return the notices about the reads since the last call."""
        return self._client.notices.drain()

    def find_gone(self, resource_type: str, ids: Iterable[str], known_ids: Sequence[str]) -> Iterator[Deletion]:
        """Yield a Deletion for each id that the server no longer has, with the time of the server's clock.

        ``known_ids`` are resources of the type that the server has just returned. Raises ServerUnavailable.
        """
        observed = self._client.get("metadata", lambda response: response.date) or datetime.now(UTC)
        can_read: bool | None = None
        unconfirmed = 0
        remaining = iter(ids)
        try:
            with ThreadPoolExecutor(self._connections, "existence") as threads:
                while chunk := list(islice(remaining, _IDS_PER_BATCH)):
                    answers = threads.map(lambda id_: self._read(resource_type, id_), chunk)
                    for id_, (status, version) in zip(chunk, answers, strict=True):
                        if status == _NOT_FOUND and can_read is None:
                            can_read = self._can_read(resource_type, known_ids)
                        if status == _GONE or (status == _NOT_FOUND and can_read):
                            yield Deletion(resource_type, id_, observed, version)
                        elif status == _NOT_FOUND:
                            unconfirmed += 1
        except (ServerRefused, NotFhir) as error:
            self._add_notice(
                resource_type,
                f"{resource_type} resources in the tables are not among those that the server returns, and the server "
                f"does not let them be read by id ({error}): they are kept in the tables",
            )
        if unconfirmed:
            self._add_notice(
                resource_type,
                f"{unconfirmed} {resource_type} resources in the tables are not among those that the server returns. "
                f"It answers 404 when they are read, but no other {resource_type} can be read either, so they are kept "
                "in the tables: see whether the server lets this account read them by id",
            )

    def _read(self, resource_type: str, resource_id: str) -> tuple[int, str | None]:
        """Return the status of a read, and the version of the deletion if the server names one."""

        def read(response: FhirResponse) -> tuple[int, str | None]:
            location = parse_target(response.headers.get("Location", ""))
            version = parse_etag(response.headers.get("ETag")) or (location.version_id if location else None)
            return response.status, version

        return self._client.get(f"{resource_type}/{resource_id}", read, expect={200, _NOT_FOUND, _GONE})

    def _can_read(self, resource_type: str, known_ids: Sequence[str]) -> bool:
        """Return whether one of the known resources can be read."""

        def read(response: FhirResponse) -> str | None:
            try:
                header = read_header(response.body)
            except MalformedResource:
                raise invalid_json_failure(response) from None
            return header.id if header.resource_type == resource_type else None

        for known in known_ids[:MAX_KNOWN_IDS]:
            try:
                if self._client.get(f"{resource_type}/{known}", read) == known:
                    return True
            except (ServerRefused, NotFhir):
                continue
        return False

    def _add_notice(self, resource_type: str, message: str) -> None:
        self._client.notices.add("error", "deletions-unconfirmed", message, resource_type)
