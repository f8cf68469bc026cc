"""Pages of a search and the patients on them, as a scripted server sends them."""

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any

from fhir_assets.windows import Interval

DAY = Interval(datetime(2024, 1, 1, tzinfo=UTC), datetime(2024, 1, 2, tzinfo=UTC))


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
