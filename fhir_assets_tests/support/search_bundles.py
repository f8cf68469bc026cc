"""Searches against a scripted server: the source, pages of patients, and the ids that were read."""

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any

from fhir_assets.fhir.client.http import FhirClient
from fhir_assets.fhir.record import Record, RejectedInput
from fhir_assets.fhir.search.source import SearchSource
from fhir_assets.retries import Retrier, RetryPolicy
from fhir_assets.windows import Interval
from fhir_assets_tests.support.scripted_server import ScriptedServer

DAY = Interval(datetime(2024, 1, 1, tzinfo=UTC), datetime(2024, 1, 2, tzinfo=UTC))
NOW = datetime(2024, 6, 1, tzinfo=UTC)


def patient(n: int, *, version: str | None = "1", at: datetime | None = None, **members: object) -> dict[str, Any]:
    """Return a Patient that was updated ``n`` minutes into the day, or ``at`` a time."""
    moment = at or datetime(2024, 1, 1, tzinfo=UTC) + timedelta(minutes=n)
    meta = {"lastUpdated": moment.isoformat()} | ({"versionId": version} if version else {})
    return {"resourceType": "Patient", "id": f"p{n}", "meta": meta, **members}


def bundle(resources: Iterable[object], next_link: str | None = None, **members: object) -> dict[str, Any]:
    """Return a page of a search with these resources as matches."""
    links = [{"relation": "self", "url": "x"}] + ([{"relation": "next", "url": next_link}] if next_link else [])
    entries = [{"resource": resource, "search": {"mode": "match"}} for resource in resources]
    return {"resourceType": "Bundle", "type": "searchset", "link": links, "entry": entries, **members}


def build_search_source(server: ScriptedServer, *, page_size: int = 500) -> SearchSource:
    """Return a search source of the server, which retries without waits and whose present is NOW."""
    retrier = Retrier(RetryPolicy(attempts=3), sleep=lambda seconds: None)
    return SearchSource(FhirClient(server.url, timeout=10, retrier=retrier), page_size=page_size, now=lambda: NOW)


def resource_ids(items: Iterable[Record | RejectedInput]) -> list[str]:
    """Return the ids of records, and a description of rejected inputs."""
    return [item.id if isinstance(item, Record) else f"rejected {item.resource_id}" for item in items]
