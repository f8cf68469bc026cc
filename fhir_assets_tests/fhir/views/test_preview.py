"""The preview of a view: the files that it reads and the formats that it writes."""

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet

from fhir_assets.errors import NotFhir
from fhir_assets.fhir.views import RowError, parse_view
from fhir_assets.fhir.views.preview import Format, run_view, write_rows

VIEW = parse_view(
    {
        "resource": "Patient",
        "select": [
            {
                "column": [
                    {"name": "id", "path": "id"},
                    {"name": "active", "path": "active"},
                    {"name": "births", "path": "multipleBirth.ofType(integer)"},
                    {"name": "given", "path": "name.given", "collection": True},
                    {"name": "family", "path": "name.family"},
                    {"name": "low", "path": "extension.value.ofType(decimal).lowBoundary()"},
                ]
            }
        ],
    }
)
ANN: dict[str, Any] = {
    "resourceType": "Patient",
    "id": "ann",
    "active": True,
    "multipleBirthInteger": 2,
    "name": [{"given": ["Ann", "B,o"], "family": 'O"Hara'}],
    "extension": [{"url": "x", "valueDecimal": 1.5}],
}
BO: dict[str, Any] = {"resourceType": "Patient", "id": "bo"}
DEVICE: dict[str, Any] = {"resourceType": "Device", "id": "d"}


def passed_over(*paths: Path) -> tuple[list[object], list[tuple[str, str]]]:
    """The ids of the rows, and the locations and messages of the skipped lines."""
    reported: list[tuple[str, str]] = []
    rows = run_view(VIEW, paths, on_error=lambda location, error: reported.append((location, str(error))))
    return [row[0] for row in rows], reported


def ids(*paths: Path) -> list[object]:
    return [row[0] for row in run_view(VIEW, paths)]


def test_ndjson_is_read_with_or_without_gzip(tmp_path: Path) -> None:
    text = "\n".join(map(json.dumps, (ANN, DEVICE, BO))) + "\n\n"
    (tmp_path / "a.ndjson").write_text(text)
    (tmp_path / "b.ndjson.gz").write_bytes(gzip.compress(text.encode()))
    assert ids(tmp_path / "a.ndjson", tmp_path / "b.ndjson.gz") == ["ann", "bo", "ann", "bo"]


def test_one_resource_or_a_bundle_is_read(tmp_path: Path) -> None:
    (tmp_path / "ann.json").write_text(json.dumps(ANN, indent=2))
    bundle = {"resourceType": "Bundle", "entry": [{"resource": BO}, {"fullUrl": "x"}, {"resource": DEVICE}]}
    (tmp_path / "bundle.json.gz").write_bytes(gzip.compress(json.dumps(bundle).encode()))
    assert ids(tmp_path / "ann.json", tmp_path / "bundle.json.gz") == ["ann", "bo"]


def test_ndjson_without_its_suffix_is_read_line_by_line(tmp_path: Path) -> None:
    (tmp_path / "all.json").write_text(f"{json.dumps(ANN)}\n{json.dumps(BO)}\n")
    assert ids(tmp_path / "all.json") == ["ann", "bo"]


def test_the_data_files_of_a_folder_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.ndjson").write_text(json.dumps(ANN))
    (tmp_path / "notes.txt").write_text("nothing")
    assert ids(tmp_path) == ["ann"]


@pytest.mark.parametrize("text", ['{"resourceType": "Patient"', "[1]", '{"id": "secret"}'])
def test_the_error_for_a_line_that_is_not_a_resource_has_file_and_line_but_no_content(
    tmp_path: Path, text: str
) -> None:
    (tmp_path / "a.ndjson").write_text(f"{json.dumps(ANN)}\n{text}\n")
    with pytest.raises(NotFhir, match=r"a\.ndjson:2: is not") as error:
        ids(tmp_path / "a.ndjson")
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("position", [0, 1, 2], ids=["first", "middle", "last"])
@pytest.mark.parametrize(
    "line", [b'{"resourceType": "Patient"', b"[1]", b'{"id": "secret"}', b"\xff\xfe", b"null", b"[" * 5000]
)
@pytest.mark.parametrize("name", ["a.ndjson", "a.json"])
def test_a_line_that_is_not_a_resource_costs_itself(tmp_path: Path, name: str, line: bytes, position: int) -> None:
    lines = [json.dumps(ANN).encode(), json.dumps(BO).encode()]
    lines.insert(position, line)
    (tmp_path / name).write_bytes(b"\n".join(lines))
    rows, reported = passed_over(tmp_path / name)
    assert rows == ["ann", "bo"]
    assert [location for location, _ in reported] == [f"{name}:{position + 1}"]
    assert "secret" not in reported[0][1]


def test_a_file_that_was_cut_off_gives_its_lines_and_the_next_files_theirs(tmp_path: Path) -> None:
    packed = gzip.compress("\n".join(map(json.dumps, [ANN] * 3)).encode())
    (tmp_path / "a.ndjson.gz").write_bytes(packed[:-9])
    (tmp_path / "b.ndjson").write_text(json.dumps(BO))
    rows, reported = passed_over(tmp_path)
    assert rows == ["ann", "ann", "bo"]
    assert reported == [
        (
            "a.ndjson.gz:3",
            "cannot be read: the compressed file ends too early: it was cut off; 2 lines before were read",
        )
    ]


def test_an_entry_that_is_not_a_resource_costs_itself_and_containers_are_read_at_any_depth(tmp_path: Path) -> None:
    parameters = {"resourceType": "Parameters", "parameter": [{"name": "p", "part": [{"resource": BO}]}]}
    inner = {"resourceType": "Bundle", "entry": [{"resource": {"id": "secret"}}, {"resource": ANN}]}
    bundle = {"resourceType": "Bundle", "entry": [{"resource": inner}, 1, {"resource": parameters}, {"resource": BO}]}
    (tmp_path / "bundle.json").write_text(json.dumps(bundle, indent=1))
    rows, reported = passed_over(tmp_path)
    assert rows == ["ann", "bo", "bo"]
    assert [location for location, _ in reported] == ["bundle.json:1 entry[0] entry[0]", "bundle.json:1 entry[1]"]
    assert "secret" not in str(reported)


def test_files_without_any_resource_are_an_error_and_not_an_empty_result(tmp_path: Path) -> None:
    (tmp_path / "a.ndjson").write_text("<html>\n")
    with pytest.raises(NotFhir, match="no resource that can be read"):
        passed_over(tmp_path)
    (tmp_path / "a.ndjson").rename(tmp_path / "a.txt")
    with pytest.raises(NotFhir, match="contains no"):
        passed_over(tmp_path)


@pytest.mark.parametrize("form", ["table", "csv", "ndjson", "parquet"])
@pytest.mark.parametrize(
    "wrong",
    [
        {"active": "yes"},
        {"active": 1},
        {"multipleBirthInteger": "two"},
        {"multipleBirthInteger": True},
        {"multipleBirthInteger": 2**63},
        {"multipleBirthInteger": 2.5},
    ],
    ids=str,
)
def test_a_value_of_the_wrong_type_costs_its_resource(tmp_path: Path, form: Format, wrong: dict[str, Any]) -> None:
    (tmp_path / "a.ndjson").write_text("\n".join(map(json.dumps, (BO, {**ANN, **wrong}, ANN))))
    reported: list[str] = []
    rows = run_view(VIEW, [tmp_path], on_error=lambda location, error: reported.append(f"{location}: {error}"))
    assert write_rows(rows, VIEW.columns, form, io.BytesIO()) == 2
    assert len(reported) == 1
    assert reported[0].startswith("a.ndjson:2: view patient, column")


def test_the_error_for_a_missing_or_damaged_file_names_it(tmp_path: Path) -> None:
    (tmp_path / "bad.ndjson.gz").write_bytes(gzip.compress(json.dumps(ANN).encode())[:-12])
    for name in ("none.ndjson", "bad.ndjson.gz"):
        with pytest.raises(NotFhir, match=f"{name}(:1)?: cannot be read"):
            ids(tmp_path / name)


def test_a_resource_that_the_view_refuses_is_reported_with_its_location(tmp_path: Path) -> None:
    two = {**ANN, "name": [{"family": "a"}, {"family": "b"}]}
    (tmp_path / "a.ndjson").write_text("\n".join(map(json.dumps, (BO, two, ANN))))
    refused: list[tuple[str, str]] = []

    def report(location: str, error: NotFhir | RowError) -> None:
        assert isinstance(error, RowError)
        refused.append((location, error.column))

    rows = run_view(VIEW, [tmp_path], on_error=report)
    assert [row[0] for row in rows] == ["bo", "ann"]
    assert refused == [("a.ndjson:2", "family")]
    with pytest.raises(RowError):
        list(run_view(VIEW, [tmp_path]))


def written(form: Format, tmp_path: Path) -> bytes:
    (tmp_path / "a.ndjson").write_text(f"{json.dumps(ANN)}\n{json.dumps(BO)}")
    out = io.BytesIO()
    assert write_rows(run_view(VIEW, [tmp_path / "a.ndjson"]), VIEW.columns, form, out) == 2
    return out.getvalue()


def test_csv_has_a_header_and_collections_as_json(tmp_path: Path) -> None:
    rows = list(csv.reader(io.StringIO(written("csv", tmp_path).decode(), newline="")))
    assert rows == [
        ["id", "active", "births", "given", "family", "low"],
        ["ann", "true", "2", '["Ann","B,o"]', 'O"Hara', "1.45"],
        ["bo", "", "", "[]", "", ""],
    ]


def test_ndjson_has_one_object_per_row(tmp_path: Path) -> None:
    first, second = (json.loads(line) for line in written("ndjson", tmp_path).splitlines())
    assert first == {
        "id": "ann",
        "active": True,
        "births": 2,
        "given": ["Ann", "B,o"],
        "family": 'O"Hara',
        "low": 1.45,
    }
    assert second == {"id": "bo", "active": None, "births": None, "given": [], "family": None, "low": None}


def test_parquet_has_typed_columns(tmp_path: Path) -> None:
    table = parquet.read_table(io.BytesIO(written("parquet", tmp_path)))
    assert [str(field.type) for field in table.schema] == [
        "string",
        "bool",
        "int64",
        "list<element: string>",
        "string",
        "double",
    ]
    assert table.to_pylist()[0]["given"] == ["Ann", "B,o"]
    assert table.column("births").to_pylist() == [2, None]


def test_a_table_shows_every_value_in_full(tmp_path: Path) -> None:
    text = written("table", tmp_path).decode()
    assert all(word in text for word in ("births", '["Ann","B,o"]', 'O"Hara', "1.45"))


def test_a_view_without_rows_still_writes_its_columns(tmp_path: Path) -> None:
    (tmp_path / "none.ndjson").write_text("")
    out = io.BytesIO()
    assert write_rows(run_view(VIEW, [tmp_path]), VIEW.columns, "parquet", out) == 0
    assert parquet.read_table(io.BytesIO(out.getvalue())).num_rows == 0
    assert len(VIEW.columns) == 6
