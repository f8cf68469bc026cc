"""Bundles of every type, Parameters and arrays of them: each resource in them is read, its references resolved."""

import io
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest

from fhir_assets.fhir.files import formats
from fhir_assets.fhir.files.formats import FileItem, LandedContent
from fhir_assets.fhir.full_urls import FullUrls
from fhir_assets.fhir.lines import decompress
from fhir_assets.fhir.record import Deletion, Record, RejectedInput

NOW = datetime(2026, 1, 5, tzinfo=UTC)
UUID = "0f2a1c34-0000-4000-8000-00000000000b"
OTHER = "0f2a1c34-0000-4000-8000-00000000000C"
BUNDLE_TYPES = ("transaction", "batch", "batch-response", "collection", "document", "message", "history", "searchset")


def read(name: str, content: Any, *, limit: int = 100_000) -> list[FileItem]:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()

    def reopen() -> Iterator[bytes]:
        return decompress(io.BytesIO(body))

    return list(formats.read(name, LandedContent("file", reopen(), NOW, limit, reopen=reopen)))


def describe(items: list[FileItem]) -> list[str]:
    """Describe a record by its id, a rejected input by its location."""
    return [
        item.id if isinstance(item, Record | Deletion) else item.path
        for item in items
        if isinstance(item, Record | Deletion | RejectedInput)
    ]


def bodies(items: list[FileItem]) -> list[dict[str, Any]]:
    return [json.loads(item.body) for item in items if isinstance(item, Record)]


def patient(resource_id: str | None = None, **more: Any) -> dict[str, Any]:
    return {"resourceType": "Patient", **({"id": resource_id} if resource_id else {}), **more}


def bundle(*entries: Any, kind: str = "collection", **more: Any) -> dict[str, Any]:
    return {"resourceType": "Bundle", "type": kind, "entry": list(entries), **more}


def entry(resource: dict[str, Any], url: str | None = None, **more: Any) -> dict[str, Any]:
    return {**({"fullUrl": url} if url else {}), "resource": resource, **more}


def parameters(*resources: dict[str, Any]) -> dict[str, Any]:
    return {
        "resourceType": "Parameters",
        "parameter": [{"name": "return", "part": [{"name": "one", "resource": resource}]} for resource in resources],
    }


NESTED = {
    "a Bundle": bundle(entry(patient("a")), entry(patient("b"))),
    "an array of Bundles": [bundle(entry(patient("a"))), bundle(entry(patient("b")))],
    "an array of a resource and a Bundle": [patient("a"), bundle(entry(patient("b")))],
    "a searchset in a batch-response": bundle(
        entry(bundle(entry(patient("a")), kind="searchset"), response={"status": "200"}),
        entry(patient("b")),
        kind="batch-response",
    ),
    "Parameters": parameters(patient("a"), patient("b")),
    "a Bundle in Parameters": parameters(bundle(entry(patient("a")), entry(patient("b")))),
    "Parameters in a Bundle": bundle(entry(parameters(patient("a"))), entry(patient("b"))),
    "Bundles in Bundles": bundle(entry(bundle(entry(bundle(entry(patient("a"))))))) | {"id": "x"},
}


@pytest.mark.parametrize("name", ["x.json", "x.ndjson"])
@pytest.mark.parametrize("shape", NESTED)
def test_a_container_of_any_shape_gives_its_resources(name: str, shape: str) -> None:
    content: Any = NESTED[shape]
    if name == "x.ndjson":
        lines = content if isinstance(content, list) else [content]
        content = "\n".join(json.dumps(line) for line in lines).encode()
    assert describe(read(name, content)) == (["a"] if shape == "Bundles in Bundles" else ["a", "b"])


@pytest.mark.parametrize("kind", BUNDLE_TYPES)
def test_a_bundle_of_every_type_gives_its_resources(kind: str) -> None:
    assert describe(read("x.json", bundle(entry(patient("a")), entry(patient("b")), kind=kind))) == ["a", "b"]


def test_an_envelope_is_read_leniently() -> None:
    odd = {"resourceType": "Bundle", "total": "3", "entry": None, "link": None, "timestamp": 7}
    assert read("x.json", odd) == []
    assert describe(read("x.ndjson", {**odd, "entry": [entry(patient("a"))]})) == ["a"]
    assert describe(read("x.json", {"entry": [entry(patient("a"))], "total": 1.0, "resourceType": "Bundle"})) == ["a"]


@pytest.mark.parametrize(
    "envelope",
    [
        {"response": {"status": 200}},
        {"request": {"method": None, "url": None}, "response": {"status": None, "lastModified": 7, "etag": 3}},
    ],
)
def test_the_envelope_of_an_entry_is_read_leniently(envelope: dict[str, Any]) -> None:
    assert [type(item) for item in read("x.json", bundle(entry(patient("a"), **envelope)))] == [Record]


@pytest.mark.parametrize("name", ["x.json", "x.ndjson"])
def test_half_a_surrogate_pair_makes_one_entry_invalid_and_not_the_bundle(name: str) -> None:
    items = read(name, bundle(entry(patient("a")), entry(patient("b", language="\ud83d")), entry(patient("c"))))
    assert describe([item for item in items if not isinstance(item, RejectedInput)]) == ["a", "c"]
    [rejected] = [item for item in items if isinstance(item, RejectedInput)]
    assert b'"language": "\\ud83d"' in rejected.body


def test_the_method_of_a_deletion_may_be_in_lower_case() -> None:
    assert read("x.json", bundle({"request": {"method": "delete", "url": "Patient/a"}})) == [
        Deletion("Patient", "a", NOW)
    ]


@pytest.mark.parametrize("name", ["x.json", "x.ndjson"])
@pytest.mark.parametrize("backwards", [False, True])
def test_a_reference_to_a_full_url_leads_to_the_resource_of_that_entry(name: str, backwards: bool) -> None:
    references = [f"urn:uuid:{UUID}", f"urn:uuid:{OTHER}", "https://h.example/r4/Patient/7", "urn:uuid:unknown"]
    entries = [
        entry(patient(UUID), f"urn:uuid:{UUID}"),
        entry(patient("server-id"), f"urn:uuid:{OTHER.lower()}"),
        entry(patient("7"), "https://h.example/r4/Patient/7"),
        entry({"resourceType": "List", "id": "l", "entry": [{"item": {"reference": each}} for each in references]}),
    ]
    items = read(name, bundle(*(entries[::-1] if backwards else entries)))
    (found,) = (body for body in bodies(items) if body["resourceType"] == "List")
    assert [each["item"]["reference"] for each in found["entry"]] == [
        f"Patient/{UUID}",
        "Patient/server-id",
        "Patient/7",
        "urn:uuid:unknown",
    ]


def test_only_references_are_rewritten_and_a_version_is_kept() -> None:
    urn = f"urn:uuid:{UUID}"
    resource = {
        "resourceType": "DocumentReference",
        "id": "d",
        "identifier": [{"value": urn}],
        "subject": {"reference": "https:\\/\\/h.example\\/r4\\/Patient\\/7\\/_history\\/2"},
        "author": [{"reference": "https://elsewhere.example/r4/Patient/7"}, {"reference": "#c"}],
        "content": [{"attachment": {"url": urn}}],
    }
    text = json.dumps(
        bundle(entry(patient("7"), "https://h.example/r4/Patient/7"), entry(patient("p"), urn), entry(resource))
    )
    found = bodies(read("x.json", text.replace("\\\\/", "\\/").encode()))[2]
    assert found["identifier"] == [{"value": urn}]
    assert found["subject"] == {"reference": "Patient/7/_history/2"}
    assert found["author"] == resource["author"]
    assert found["content"] == [{"attachment": {"url": "Patient/p"}}]


def test_a_full_url_of_two_resources_resolves_no_reference() -> None:
    urn = f"urn:uuid:{UUID}"
    items = read(
        "x.ndjson",
        bundle(
            entry(patient("a"), urn),
            entry(patient("b"), urn),
            entry(patient("c", link=[{"other": {"reference": urn}}])),
        ),
    )
    assert bodies(items)[2]["link"] == [{"other": {"reference": urn}}]


def test_full_urls_hold_for_their_bundle_only() -> None:
    urn = f"urn:uuid:{UUID}"
    link = [{"other": {"reference": urn}}]
    pages = [bundle(entry(patient(name), urn), entry(patient("c", link=link))) for name in ("a", "b")]
    for name, content in (("x.json", pages), ("x.ndjson", "\n".join(map(json.dumps, pages)).encode())):
        found = bodies(read(name, content))
        assert [body["link"][0]["other"]["reference"] for body in found if "link" in body] == ["Patient/a", "Patient/b"]


@pytest.mark.parametrize(
    ("full_url", "more", "expected"),
    [
        (f"urn:uuid:{OTHER}", {}, OTHER.lower()),
        ("urn:oid:1.2.3", {}, "1.2.3"),
        ("https://h.example/Patient/7", {}, "7"),
        (None, {"request": {"method": "PUT", "url": "Patient/8"}}, "8"),
        (None, {"request": {"method": "POST", "url": "Patient"}}, ""),
        ("https://h.example/anything?x=1", {}, ""),
    ],
)
@pytest.mark.parametrize("name", ["x.json", "x.ndjson"])
def test_an_entry_without_id_gets_the_one_in_its_full_url_each_time(
    name: str, full_url: str | None, more: dict[str, Any], expected: str
) -> None:
    content = bundle(entry(patient(gender="male"), full_url, **more))
    assert describe(read(name, content)) == describe(read(name, content)) == [expected]


@pytest.mark.parametrize(
    "unusable",
    [
        {"request": {"method": "POST", "url": "Patient"}},
        {"request": {"method": "PATCH", "url": "Patient/a"}, "resource": parameters()},
        {
            "response": {
                "status": "500",
                "outcome": {"resourceType": "OperationOutcome", "issue": [{"severity": "error", "code": "exception"}]},
            }
        },
        entry(
            {"resourceType": "OperationOutcome", "issue": [{"severity": "fatal", "code": "incomplete"}]},
            search={"mode": "outcome"},
        ),
    ],
)
def test_an_entry_that_lacks_what_it_speaks_of_is_reported(unusable: dict[str, Any]) -> None:
    assert describe(read("x.json", bundle(unusable, entry(patient("a"))))) == ["file:entry[0]", "a"]


def test_entries_that_carry_nothing_are_passed_over() -> None:
    hint = {"resourceType": "OperationOutcome", "issue": [{"severity": "warning", "code": "informational"}]}
    entries = [{"request": {"method": "GET", "url": "Patient"}}, {"response": {"status": "201", "outcome": hint}}]
    assert read("x.json", bundle(*entries)) == []


def page(name: str, own: str | None = None, following: str | None = None) -> dict[str, Any]:
    links = [{"relation": relation, "url": url} for relation, url in (("self", own), ("next", following)) if url]
    return bundle(entry(patient(name)), kind="searchset", link=links)


@pytest.mark.parametrize("name", ["x.json", "x.ndjson"])
def test_a_page_whose_next_page_is_not_in_the_file_is_half_a_file(name: str) -> None:
    def read_pages(*pages: dict[str, Any]) -> list[str]:
        return describe(read(name, list(pages) if name == "x.json" else "\n".join(map(json.dumps, pages)).encode()))

    assert read_pages(page("a", "u1", "u2"), page("b", "u2")) == ["a", "b"]
    assert read_pages(page("b", "u2", "u3"), page("a", "u1", "u2"), page("c", "u3")) == ["b", "a", "c"]
    assert read_pages(page("b", "u2"), page("a", "u1", "u2")) == ["b", "a"]
    assert read_pages(page("a", "u?x=1", "u?p=2&x=1"), page("b", "u?x=1&p=2")) == ["a", "b"]
    assert len(read_pages(page("a", None, "u2"), page("b"))) == 3
    assert len(read_pages(page("a", "u1", "u2"), page("b", "u9"))) == 3
    (path,) = read_pages(page("a", "u1", "u2"))[1:]
    assert path.endswith(".link")
    (nested,) = read("x.json", bundle(entry(page("a", None, "u2")), kind="batch-response"))[1:]
    assert isinstance(nested, RejectedInput)
    assert "next link" in nested.message


def test_uuids_that_share_their_beginning_are_kept_apart() -> None:
    urls = FullUrls()
    names = [f"{n % 3:08x}-0000-4000-8000-{n:012x}" for n in range(3000)]
    for n, name in enumerate(names):
        urls.add(f"urn:uuid:{name}", ("Patient", "Encounter")[n % 2], name)
    assert [urls.find(f"urn:uuid:{name.upper()}") for name in names] == [
        f"{('Patient', 'Encounter')[n % 2]}/{name}" for n, name in enumerate(names)
    ]
    assert urls.find(f"urn:uuid:{UUID}") is None
