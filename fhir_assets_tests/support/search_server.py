"""A FHIR server with a handful of resources whose search a test bends: refusals, missing dates, totals and order."""

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any
from urllib.parse import urlencode

from fhir_assets_tests.support.scripted_server import ReceivedRequest, Reply, ScriptedServer, reply

Resource = dict[str, Any]
Answer = Callable[[ReceivedRequest, str], Reply | None]
Bend = Callable[[Resource, ReceivedRequest], None]

_OPERATORS: dict[str, Callable[[datetime, datetime], bool]] = {
    "ge": lambda moment, bound: moment >= bound,
    "gt": lambda moment, bound: moment > bound,
    "le": lambda moment, bound: moment <= bound,
    "lt": lambda moment, bound: moment < bound,
}


def resource(resource_type: str, identity: str, moment: str | None = "2024-03-05T10:00:00Z", **fields: Any) -> Resource:
    """Return a resource with ``meta.lastUpdated``, or without ``meta`` if ``moment`` is None."""
    meta = {"meta": {"versionId": "1", "lastUpdated": moment}} if moment else {}
    return {"resourceType": resource_type, "id": identity, **meta, **fields}


def outcome(status: int, code: str = "not-supported", text: str = "") -> Reply:
    """Return an OperationOutcome with one error, whose diagnostics are ``text``."""
    issue = {"severity": "error", "code": code, **({"diagnostics": text} if text else {})}
    return reply({"resourceType": "OperationOutcome", "issue": [issue]}, status)


class SearchServer(ScriptedServer):
    """Searches by ``_lastUpdated``, ``_id``, ``_sort`` and ``_count``, with pages, and reads by id.

    ``answer(request, path)`` replies in place of the server unless it returns None; the path is below the base URL.
    ``bend(bundle, request)`` changes a page in place. ``dates_undated`` says whether every ``_lastUpdated`` filter
    matches a resource without a date. All of them, and ``resources``, may be changed between requests.
    """

    def __init__(
        self,
        resources: Sequence[Resource] = (),
        *,
        types: Sequence[str] = ("Patient",),
        interactions: Sequence[str] = ("search-type", "read"),
        answer: Answer | None = None,
        bend: Bend | None = None,
        dates_undated: bool = True,
    ) -> None:
        super().__init__(self._reply)
        self.resources = list(resources)
        self.types = types
        self.interactions = interactions
        self.answer = answer
        self.bend = bend
        self.dates_undated = dates_undated

    def searches(self, resource_type: str) -> list[ReceivedRequest]:
        """Return the searches of a type that the server received."""
        return [request for request in self.requests if request.path == f"/fhir/{resource_type}"]

    def _reply(self, request: ReceivedRequest) -> Reply:
        path = request.path.removeprefix("/fhir").strip("/")
        if self.answer and (bent := self.answer(request, path)):
            return bent
        if path == "metadata":
            return reply(self._capabilities())
        name, _, identity = path.partition("/")
        if identity:
            found = [item for item in self.resources if (item["resourceType"], item["id"]) == (name, identity)]
            return reply(found[0]) if found else outcome(404, "not-found")
        return reply(self._search(name, request)) if name in self.types else outcome(404, "not-found")

    def _capabilities(self) -> Resource:
        interactions = [{"code": code} for code in self.interactions]
        types = [{"type": name, "interaction": interactions} for name in self.types]
        return {
            "resourceType": "CapabilityStatement",
            "status": "active",
            "kind": "instance",
            "date": "2024-01-01",
            "fhirVersion": "4.0.1",
            "format": ["json"],
            "rest": [{"mode": "server", "resource": types}],
        }

    def _search(self, name: str, request: ReceivedRequest) -> Resource:
        found = [item for item in self.resources if item["resourceType"] == name]
        for bound in request.all("_lastUpdated"):
            found = [item for item in found if self._is_within(item, bound)]
        for ids in request.all("_id"):
            found = [item for item in found if item["id"] in ids.split(",")]
        for sort in request.all("_sort"):
            found.sort(key=lambda item: item.get("meta", {}).get("lastUpdated", ""), reverse=sort.startswith("-"))
        page: Resource = {"resourceType": "Bundle", "type": "searchset", "total": len(found)}
        if request.all("_summary") != ["count"]:
            start, size = (int(next(iter(request.all(key)), default)) for key, default in (("_at", 0), ("_count", 100)))
            page["entry"] = [
                {"fullUrl": f"{self.url}/{name}/{item['id']}", "resource": item, "search": {"mode": "match"}}
                for item in found[start : start + size]
            ]
            if start + size < len(found):
                query = [*((key, value) for key, value in request.query if key != "_at"), ("_at", str(start + size))]
                page["link"] = [{"relation": "next", "url": f"{self.url}/{name}?{urlencode(query)}"}]
        if self.bend:
            self.bend(page, request)
        return page

    def _is_within(self, item: Resource, bound: str) -> bool:
        text = item.get("meta", {}).get("lastUpdated")
        if text is None:
            return self.dates_undated
        return _OPERATORS[bound[:2]](datetime.fromisoformat(text), datetime.fromisoformat(bound[2:]))
