"""Files of every format, intact and damaged: each part is a record, a deletion or a rejected input."""

import gzip
import io
import json
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from time import process_time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fhir_assets.fhir.files import formats
from fhir_assets.fhir.files.formats import FileItem, LandedContent
from fhir_assets.fhir.files.json_elements import DOCUMENT, UnbalancedJson, split_elements
from fhir_assets.fhir.intake.visits_csv import Visit
from fhir_assets.fhir.lines import decompress
from fhir_assets.fhir.record import Deletion, Record, RejectedInput

NOW = datetime(2024, 1, 5, tzinfo=UTC)
A = {"resourceType": "Patient", "id": "a", "meta": {"lastUpdated": "2024-01-01T00:00:00Z"}}
B = {"resourceType": "Encounter", "id": "b", "text": 'line \\ " ] } [ {'}


def read(name: str, content: bytes, *, limit: int = 1000) -> list[FileItem]:
    landed = LandedContent("file", decompress(io.BytesIO(content)), NOW, limit)
    return list(formats.read(name, landed))


def describe(items: list[FileItem]) -> list[object]:
    """Describe records by id, deletions by target, and rejected inputs by location."""
    return [
        item.id if isinstance(item, Record) else ("-", item.id) if isinstance(item, Deletion) else item.path
        for item in items
        if not isinstance(item, Visit)
    ]


def bundle(*entries: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"resourceType": "Bundle", "type": "transaction", **more, "entry": list(entries)}


def delete(url: str, **more: Any) -> dict[str, Any]:
    return {"request": {"method": "DELETE", "url": url}, **more}


NDJSON = "\n".join(json.dumps(resource) for resource in (A, B)).encode()
BUNDLE = bundle({"fullUrl": "x", "resource": A}, {"resource": B, "request": {"method": "PUT", "url": "Encounter/b"}})


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.ndjson", NDJSON),
        ("x.jsonl", NDJSON + b"\n\n"),
        ("x.json", NDJSON),
        ("x.json", json.dumps([A, B]).encode()),
        ("x.json", json.dumps([A, B], indent=2).encode()),
        ("x.json", json.dumps(BUNDLE).encode()),
        ("x.JSON", b"\xef\xbb\xbf" + json.dumps(BUNDLE, indent=2).encode()),
        ("x.ndjson", json.dumps(BUNDLE).encode()),
        ("x.json", json.dumps(A, indent=2).encode() + json.dumps(B, indent=2).encode()),
    ],
)
@pytest.mark.parametrize("compressed", [False, True])
def test_every_format_returns_its_resources_byte_for_byte(name: str, content: bytes, compressed: bool) -> None:
    items = read(f"{name}.gz" if compressed else name, gzip.compress(content) if compressed else content)
    assert describe(items) == ["a", "b"]
    assert [json.loads(item.body) for item in items if isinstance(item, Record)] == [A, B]


def test_delete_entries_of_a_bundle_are_deletions_at_the_time_of_the_entry_or_of_the_file() -> None:
    at = "2024-01-02T00:00:00Z"
    entries = (delete("Patient/a", response={"status": "204", "lastModified": at}), delete("Patient/b"))
    for name in ("x.json", "x.ndjson"):
        items = read(name, json.dumps(bundle(*entries, {"resource": A})).encode())
        assert items[:2] == [Deletion("Patient", "a", datetime(2024, 1, 2, tzinfo=UTC)), Deletion("Patient", "b", NOW)]
        assert describe(items[2:]) == ["a"]


def version(resource_id: str, minute: int, number: str) -> dict[str, Any]:
    meta = {"versionId": number, "lastUpdated": f"2024-01-02T00:{minute:02}:00Z"}
    return {
        "resource": {"resourceType": "Patient", "id": resource_id, "meta": meta},
        "request": {"method": "PUT", "url": f"Patient/{resource_id}/_history/{number}"},
        "response": {"status": "200 OK", "etag": f'W/"{number}"'},
    }


def gone(url: str, number: str = "2", method: str = "DELETE", status: str = "200 OK") -> dict[str, Any]:
    return {"request": {"method": method, "url": url}, "response": {"status": status, "etag": f'W/"{number}"'}}


@pytest.mark.parametrize("name", ["x.json", "x.ndjson"])
def test_deletions_of_a_history_without_a_time_are_bounded_by_their_neighbours(name: str) -> None:
    history = bundle(
        gone("Patient/c/_history/2"),
        version("b", 9, "3"),
        gone("https://h.example/fhir/Patient/a/_history/2"),
        version("x", 5, "1"),
        gone("Patient/e/_history/2", method="GET", status="410"),
        gone("Patient/b/_history/2"),
        version("a", 3, "1"),
    )
    second = bundle(version("d", 1, "2"), gone("Patient/d/_history/1", "1"), gone("Patient/f/_history/3", "3"))
    documents = [json.dumps({"type": "history", **each}).encode() for each in (history, second)]
    separator = b"\n" if name == "x.ndjson" else b" "
    items = read(name, separator.join(documents), limit=10_000)
    deletions = {item.id: (item.at, item.version_id) for item in items if isinstance(item, Deletion)}

    def at(minute: int, number: str) -> tuple[datetime, str]:
        return datetime(2024, 1, 2, 0, minute, tzinfo=UTC), number

    # `b` and `d` have a newer version in the same history: they are not deleted.
    assert deletions == {"c": at(9, "2"), "a": at(9, "2"), "e": at(5, "2"), "f": at(1, "3")}
    assert sorted(item.id for item in items if isinstance(item, Record)) == ["a", "b", "d", "x"]


@pytest.mark.parametrize("name", ["x.json", "x.ndjson"])
def test_a_history_of_nothing_but_a_deletion_has_the_time_of_the_bundle(name: str) -> None:
    history = bundle(gone("Patient/a/_history/2")) | {"meta": {"lastUpdated": "2024-01-02T00:00:00Z"}}
    assert read(name, json.dumps(history).encode()) == [Deletion("Patient", "a", datetime(2024, 1, 2, tzinfo=UTC), "2")]
    assert read(name, json.dumps(bundle(gone("Patient/a"))).encode()) == [Deletion("Patient", "a", NOW, "2")]


@pytest.mark.parametrize("url", ["Patient", "Patient?identifier=x", "", "Patient/a/_history/1"])
def test_a_delete_that_names_no_single_resource_is_rejected(url: str) -> None:
    assert describe(read("x.json", json.dumps(bundle(delete(url), {"resource": A})).encode())) == ["file:entry[0]", "a"]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("x.ndjson", b"{\n" + NDJSON, ["file:1", "a", "b"]),
        ("x.ndjson", NDJSON[:-5], ["a", "file:2"]),
        ("x.json", json.dumps(BUNDLE).encode()[:-1], ["a", "b", "file:document"]),
        ("x.json", json.dumps(BUNDLE).encode()[:220], ["a", "file:document"]),
        ("x.json", b"hello", ["file:document"]),
        ("x.json", b'{"resourceType":"Bundle","entry":[{"resource":{"id":nope}}]}', ["file:entry[0]"]),
        ("x.json", b'[{"id":"x"}]', ["file:[0]"]),
        ("x.json", b'[1, {"id":"x"}]', ["file:document"]),
        ("x.json", json.dumps({**A, "pad": "x" * 2000}).encode(), ["file:document"]),
        ("x.ndjson", json.dumps({**A, "pad": "x" * 2000}).encode(), ["file:1"]),
        (
            "x.json",
            json.dumps({"id": "l", "entry": [{"item": {}}], "resourceType": "List"}).encode(),
            ["file:document"],
        ),
        ("x.ndjson.gz", gzip.compress(NDJSON, mtime=0)[:-10], ["a", "file:document"]),
        ("x.ndjson.gz", b"\x1f\x8bnoise" * 9, ["file:document"]),
        (
            "x.json",
            b'{"resourceType":"Bundle","entry":[{"resource":{"resourceType":"Patient","id":"a"}}, 5]}',
            ["a", "file:document"],
        ),
        ("x.json", b'[{"resourceType":"Patient","id":"a"}, 5]', ["a", "file:document"]),
        ("x.json", b"", ["file:document"]),
        ("x.ndjson.gz", gzip.compress(b"", mtime=0), ["file:document"]),
        ("x.csv", b"", ["file:document"]),
    ],
)
def test_a_malformed_part_is_rejected_with_its_location_and_the_rest_is_read(
    name: str, content: bytes, expected: list[object]
) -> None:
    items = read(name, content)
    assert describe(items) == expected
    assert all(item.message and "line" not in item.message for item in items if isinstance(item, RejectedInput))


@given(st.binary(max_size=60))
def test_no_input_raises_an_error(content: bytes) -> None:
    for name in ("x.json", "x.ndjson"):
        read(name, content)


values = st.recursive(
    st.none() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.just("entry"), inner, max_size=3)
    ),
    max_leaves=12,
)
objects = st.dictionaries(st.text(max_size=4), values, max_size=3)


@given(st.lists(objects, min_size=1, max_size=4), objects, st.integers(1, 9), st.booleans())
def test_elements_do_not_depend_on_chunk_boundaries(
    entries: list[Any], members: dict[str, Any], size: int, indent: bool
) -> None:
    document = {**{key: value for key, value in members.items() if key != "entry"}, "entry": entries, "z": 1}
    text = json.dumps(document, indent=1 if indent else None).encode()

    def chunks() -> Iterator[bytes]:
        for at in range(0, len(text), size):
            yield text[at : at + size]

    split = list(split_elements(chunks(), 10_000))
    assert [json.loads(body) for name, body in split if name == b"entry"] == entries
    assert [json.loads(body) for name, body in split if name == DOCUMENT] == [{**document, "entry": []}]
    with pytest.raises(UnbalancedJson):
        list(split_elements([text[:-1]], 10_000))


LARGE = 8 << 20


@pytest.mark.parametrize(
    "content",
    [
        b'{"a":"' + b"x" * LARGE,
        b'{"resourceType":"Bundle","entry":[{"a":"' + b"x" * LARGE,
        b'{"a"' + b" " * LARGE,
        b'"' + b"\\" * LARGE,
        b"[" * LARGE,
        b'{"a":' + b"[" * (LARGE // 2) + b"]" * (LARGE // 2) + b"}",
    ],
    ids=["a string", "a string in an entry", "spaces", "backslashes", "brackets", "closed brackets"],
)
def test_no_part_of_a_document_is_scanned_twice_however_small_the_pieces(content: bytes) -> None:
    pieces = (content[at : at + 4096] for at in range(0, len(content), 4096))
    began = process_time()
    with suppress(UnbalancedJson):
        list(split_elements(pieces, 2 * LARGE))
    # Seconds of this process's CPU: 0.5 if each byte is scanned once, more than 30 if each piece begins again.
    assert process_time() - began < 5
