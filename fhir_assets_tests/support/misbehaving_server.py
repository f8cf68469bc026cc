"""A FHIR server in memory whose search misbehaves at random, but never lies about content.

Each answer is a step. What a correct client must get in the end are all resources: faults change the form of an answer,
its order and its paging; they refuse parameters or ignore them, and what they withhold they admit, by a total or by an
OperationOutcome. The server is called in this process, without sockets.
"""

import gzip
import json
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from email.utils import format_datetime
from random import Random
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from fhir_assets.errors import ServerUnavailable
from fhir_assets.fhir.client.clock import ServerClock
from fhir_assets.fhir.client.http import Exchange, FhirClient, Params
from fhir_assets.retries import Retrier, RetryPolicy, TransientFailure

BASE = "http://misbehaving.example/fhir"
Resource = dict[str, Any]

FORMS = (
    *("no total", "total as text", "total as fraction", "no type", "entry null", "link null", "search null"),
    *("no search", "byte order mark", "undeclared gzip", "self link without url", "junk entry", "no date", "odd date"),
)
PARAMETERS = (
    *("ignores sort", "ignores summary", "ignores count", "ignores from", "ignores until", "ignores total"),
    *("refuses sort", "refuses summary", "refuses total", "refuses large count", "fails on sort", "fails on summary"),
)
PAGING = (
    *("page expired", "page not found", "empty page", "repeats a match", "next link at the end", "next link null"),
    *("loop", "included as match", "incomplete with outcome", "incomplete with unmarked outcome"),
)
TRANSIENT = ("unavailable", "body cut off", "connection lost")
LOSING = ("next link lost", "order changes between pages")
"""Only the total shows what these lose. They are not combined with faults that hide totals or add to the entries."""
HIDING = frozenset(
    {"junk entry", "no total", "ignores summary", "refuses summary", "refuses total", "fails on summary"}
)


class MisbehavingServer:
    """A server of Patients at the time ``now``.

    Each fault of ``faults`` strikes with the probability ``rate``, drawn from ``random``.
    """

    def __init__(
        self, resources: Sequence[Resource], faults: Collection[str], rate: float, random: Random, now: datetime
    ) -> None:
        self._resources = resources
        self.now = now
        self._faults = frozenset(faults)
        self._rate = rate
        self._random = random
        self._pages: list[tuple[list[Resource], int, int]] = []
        self.answers = 0

    def answer(self, url: str, params: Params) -> Exchange:
        """Answer a GET request. Raises TransientFailure for a lost connection."""
        self.answers += 1
        parts = urlsplit(url)
        query = [*params, *parse_qsl(parts.query)]
        asked = dict(query)
        if self._strikes("unavailable"):
            return Exchange(url, 503, {}, b"")
        if self._strikes("connection lost"):
            raise TransientFailure("the connection was lost", final=ServerUnavailable)
        if parts.path.endswith("/metadata"):
            statement = {"resourceType": "CapabilityStatement", "fhirVersion": "4.0.1"}
            return Exchange(url, 200, {}, json.dumps(statement).encode())
        if "_page" in asked:
            return self._answer_page(url, int(asked["_page"]))
        if status := self._refuse(asked):
            return Exchange(url, status, {}, b"{}")
        found = [item for item in self._resources if self._matches(item, query)]
        if "_sort" in asked and not self._strikes("ignores sort"):
            found.sort(key=lambda item: item.get("meta", {}).get("lastUpdated", ""))
        else:
            self._random.shuffle(found)
        if asked.get("_summary") == "count" and not self._strikes("ignores summary"):
            return self._reply(url, {"total": len(found)})
        size = int(asked.get("_count", 4))
        return self._page(url, found, 0, 3 if self._strikes("ignores count") else size)

    def _strikes(self, fault: str) -> bool:
        return fault in self._faults and self._random.random() < self._rate

    def _refuse(self, asked: Mapping[str, str]) -> int:
        large = int(asked.get("_count", 0)) > 20
        refused = {
            "refuses sort": "_sort" in asked,
            "refuses summary": "_summary" in asked,
            "refuses total": "_total" in asked,
            "refuses large count": large,
        }
        failing = {"fails on sort": "_sort" in asked, "fails on summary": "_summary" in asked}
        if any(fault in self._faults and applies for fault, applies in refused.items()):
            return self._random.choice((400, 422, 501))
        return 500 if any(fault in self._faults and applies for fault, applies in failing.items()) else 0

    def _matches(self, item: Resource, query: Params) -> bool:
        moment = item.get("meta", {}).get("lastUpdated")
        if moment is None:
            return True
        at = datetime.fromisoformat(moment)
        for name, value in query:
            if name != "_lastUpdated":
                continue
            bound = datetime.fromisoformat(value[2:])
            if value.startswith("ge"):
                if at < bound and not self._strikes("ignores from"):
                    return False
            elif at >= bound and not self._strikes("ignores until"):
                return False
        return True

    def _answer_page(self, url: str, number: int) -> Exchange:
        if self._strikes("page expired"):
            return Exchange(url, 410, {}, b"{}")
        if number >= len(self._pages) or self._strikes("page not found"):
            return Exchange(url, 404, {}, b"{}")
        found, start, size = self._pages[number]
        if self._strikes("order changes between pages"):
            self._random.shuffle(found)
        return self._page(url, found, start, size)

    def _page(self, url: str, found: list[Resource], start: int, size: int) -> Exchange:
        end = start if self._strikes("empty page") else start + size
        shown = found[start:end]
        if start and self._strikes("repeats a match"):
            shown = [found[start - 1], *shown]
        entries: list[Any] = [self._entry(item) for item in shown]
        page: Resource = {"total": len(found)}
        link = self._next_link(url, found, end, size)
        for fault in ("incomplete with outcome", "incomplete with unmarked outcome"):
            if self._strikes(fault):
                issue = {"severity": self._random.choice(("error", "fatal")), "code": "incomplete"}
                outcome: Resource = {"resource": {"resourceType": "OperationOutcome", "issue": [issue]}}
                if fault == "incomplete with outcome":
                    outcome["search"] = {"mode": "outcome"}
                entries = [*entries[: self._random.randrange(len(entries) + 1)], outcome]
                page.pop("total", None)
        if self._strikes("junk entry"):
            entries.append(self._random.choice((None, "x", {}, {"resource": []}, {"resource": {"id": 1}}, 7)))
        page["link"] = [{"relation": "self", "url": None if self._strikes("self link without url") else url}, *link]
        page["entry"] = entries
        return self._reply(url, page)

    def _next_link(self, url: str, found: list[Resource], end: int, size: int) -> list[Resource]:
        if end >= len(found):
            if self._strikes("loop"):
                return [{"relation": "next", "url": url}]
            return (
                [{"relation": "next", "url": f"{BASE}/Patient?_page=999"}]
                if self._strikes("next link at the end")
                else []
            )
        if self._strikes("next link lost"):
            return []
        self._pages.append((found, end, size))
        link = f"{BASE}/Patient?_page={len(self._pages) - 1}"
        return [{"relation": "next", "url": None if self._strikes("next link null") else link}]

    def _entry(self, item: Resource) -> Resource:
        if self._strikes("no search"):
            return {"resource": item}
        if self._strikes("search null"):
            return {"resource": item, "search": None}
        return {"resource": item, "search": {"mode": "include" if self._strikes("included as match") else "match"}}

    def _reply(self, url: str, page: Resource) -> Exchange:
        page = {"resourceType": "Bundle", "type": "searchset", **page}
        if self._strikes("no total"):
            page.pop("total", None)
        elif "total" in page and self._strikes("total as text"):
            page["total"] = str(page["total"])
        elif "total" in page and self._strikes("total as fraction"):
            page["total"] = float(page["total"])
        if self._strikes("no type"):
            del page["type"]
        if not page.get("entry") and self._strikes("entry null"):
            page["entry"] = None
        if len(page.get("link", ())) <= 1 and self._strikes("link null"):
            page["link"] = None
        body = json.dumps(page).encode()
        if self._strikes("byte order mark"):
            body = b"\xef\xbb\xbf" + body
        if self._strikes("undeclared gzip"):
            body = gzip.compress(body, 1)
        if self._strikes("body cut off"):
            body = body[: self._random.randrange(len(body))]
        return Exchange(url, 200, self._headers(), body)

    def _headers(self) -> dict[str, str]:
        if self._strikes("no date"):
            return {}
        return {"Date": "soon" if self._strikes("odd date") else format_datetime(self.now, usegmt=True)}


class InProcessClient(FhirClient):
    """A client whose requests are calls of a MisbehavingServer."""

    def __init__(self, server: MisbehavingServer) -> None:
        super().__init__(BASE, retrier=Retrier(RetryPolicy(attempts=4), sleep=lambda seconds: None))
        self._server = server
        self.clock = ServerClock(self.notices, BASE, now=lambda: server.now)

    def _request(
        self, method: str, url: str, params: Params, body: bytes | None, headers: Mapping[str, str] | None
    ) -> Exchange:
        return self._server.answer(url, params)
