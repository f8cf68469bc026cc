"""Visits in CSV: written and read back, valid and malformed."""

import csv
import io
from collections.abc import Iterator

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fhir_assets.fhir.intake import schemas, visits_csv
from fhir_assets.fhir.intake.visits_csv import InvalidRow, ValidRow

HEADER = "mrn,first_name,last_name,birth_date,visit_account_number,visit_date,reason"
ADA = {
    "mrn": "M1",
    "first_name": "Ada",
    "last_name": "Lovelace",
    "birth_date": "1815-12-10",
    "visit_account_number": "V1",
    "visit_date": "2024-01-05",
    "reason": "fever",
}
ROW = ",".join(ADA.values())

text = st.text(st.characters(blacklist_categories=["Cs", "Cc"]), min_size=1, max_size=20).filter(
    lambda value: value == value.strip()
)
reasons = st.text(st.characters(blacklist_categories=["Cs", "Cc"]) | st.sampled_from("\t\n\r\",'=+-@"), max_size=20)
dates = st.dates().map(str)
visits = st.fixed_dictionaries(
    {
        "mrn": text,
        "first_name": text,
        "last_name": text | st.sampled_from(["=1+1", "'=x", "-", "@x", '"', "'t Hooft", "''+"]),
        "birth_date": dates,
        "visit_account_number": text,
        "visit_date": dates,
        "reason": reasons,
    }
)


def read(content: bytes | str, *, chunk: int = 1 << 20) -> list[ValidRow | InvalidRow]:
    data = content.encode() if isinstance(content, str) else content
    return list(visits_csv.read(data[start : start + chunk] for start in range(0, len(data), chunk)))


def good(rows: list[ValidRow | InvalidRow]) -> list[dict[str, str]]:
    return [dict(row.values) for row in rows if isinstance(row, ValidRow)]


def bad(rows: list[ValidRow | InvalidRow]) -> list[tuple[int, str, tuple[str, ...]]]:
    return [
        (row.line, row.rule, tuple(message for _, message in row.problems))
        for row in rows
        if isinstance(row, InvalidRow)
    ]


@given(st.lists(visits, max_size=8), st.integers(1, 50))
def test_written_visits_are_read_back_with_any_characters(rows: list[dict[str, str]], chunk: int) -> None:
    assert good(read(visits_csv.write(rows), chunk=chunk)) == rows


@given(st.lists(visits, max_size=8))
def test_no_value_is_written_as_a_formula(rows: list[dict[str, str]]) -> None:
    cells = csv.reader(io.StringIO(visits_csv.write(rows).decode(), newline=""))
    assert not [value for row in cells for value in row if value[:1] in ("=", "+", "-", "@", "\t", "\r")]


def values() -> st.SearchStrategy[object]:
    odd = st.sampled_from(["", " ", "x\n", "\0", "2024-02-30", "2024-1-1", "20240101", "x" * 65, "x" * 129, "x" * 1025])
    return st.dictionaries(st.sampled_from([*visits_csv.COLUMNS, "other"]), odd | text | dates | st.integers())


@given(values() | visits)
def test_the_fast_check_agrees_with_the_json_schema(row: dict[str, object]) -> None:
    assert visits_csv.find_errors(row) == tuple(
        (error.path, error.message) for error in schemas.find_errors("visit", row)
    )


@pytest.mark.parametrize(
    "content",
    [
        f"{HEADER}\r\n{ROW}\r\n",
        f"\ufeff{HEADER}\n{ROW}",
        f"\n\n{HEADER}\n\n{ROW}\n,,,,,,\n\n",
        f"{HEADER.upper()}\n" + ",".join(f'"{value}"' for value in ADA.values()),
        " reason , mrn,first_name,last_name,birth_date,visit_account_number,visit_date\nfever,"
        + ROW.removesuffix(",fever"),
    ],
)
def test_the_csv_dialects_of_spreadsheets_give_the_same_rows(content: str) -> None:
    assert read(content) == [ValidRow(next(n for n, line in enumerate(content.split("\n"), 1) if "Ada" in line), ADA)]


def test_a_quote_within_a_value_is_a_character_in_any_row() -> None:
    rows = [ROW.replace("Lovelace", 'Love"lace'), ROW, ROW.replace("fever", '"high ""fever"""')]
    rows_read = read("\n".join([HEADER, *rows, *rows]))
    assert [row["last_name"] for row in good(rows_read)] == ['Love"lace', "Lovelace", "Lovelace"] * 2
    assert [row["reason"] for row in good(rows_read)] == ["fever", "fever", 'high "fever"'] * 2


def test_the_reason_is_the_only_column_that_may_be_missing() -> None:
    shorter = HEADER.removesuffix(",reason")
    assert len(good(read(f"{shorter}\n{ROW.removesuffix(',fever')}\n"))) == 1
    (row,) = read(f"first_name,reason,shoe_size\n{ROW}\n")
    assert isinstance(row, InvalidRow)
    assert (row.line, row.rule) == (1, "csv-header")
    assert "the header lacks mrn, last_name, birth_date, visit_account_number, visit_date" in row.problems[0][1]
    assert "1 unknown columns" in row.problems[1][1]


def test_a_file_without_a_header_is_rejected_and_its_first_line_is_not_in_the_message() -> None:
    (row,) = read(f"{ROW}\n{ROW}\n")
    assert isinstance(row, InvalidRow)
    assert "Lovelace" not in str(row)


def test_all_problems_of_a_row_are_reported_with_its_line_and_without_its_values() -> None:
    rows = read(f"{HEADER}\n{ROW}\n,Ada,Lovelace,1815-13-10,V2, 5.1.2024,\n{ROW}\n")
    (row,) = [row for row in rows if isinstance(row, InvalidRow)]
    assert row.line == 3
    assert {column for column, _ in row.problems} == {"", "birth_date", "visit_date"}
    assert ("", "mrn is required") in row.problems
    assert not any(word in str(row.problems) for word in ("1815", "5.1", "Lovelace"))
    assert orjson.loads(row.body)["birth_date"] == "1815-13-10"
    assert len(good(rows)) == 2


MALFORMED = [
    'M2,"Eva,Lovelace,1815-12-10,V9,2024-01-05,',
    'M2,"E"va,Lovelace,1815-12-10,V9,2024-01-05,',
    "M2,Eva",
    f"{ROW},more",
    "\ud800".encode("utf-16-le", "surrogatepass").decode("latin-1") + ",",
    '"' + "x" * 40_000,
    "x" * 70_000,
]


@given(st.lists(st.sampled_from(MALFORMED) | st.just(ROW), max_size=12))
def test_a_malformed_row_does_not_affect_other_rows(rows: list[str]) -> None:
    rows_read = read("\n".join([HEADER, *rows]))
    assert len(good(rows_read)) == rows.count(ROW)
    assert sorted({row.line for row in rows_read}) == list(range(2, len(rows) + 2))


def test_bytes_that_are_not_utf_8_make_one_invalid_row() -> None:
    rows_read = read(
        f"{HEADER}\n{ROW}\n".encode() + ROW.replace("Ada", "Zoë").encode("latin-1") + f"\n{ROW}\n".encode()
    )
    assert len(good(rows_read)) == 2
    assert [line for line, *_ in bad(rows_read)] == [3]


def test_a_large_file_is_read_as_a_stream() -> None:
    chunks_read = 0

    def chunks() -> Iterator[bytes]:
        nonlocal chunks_read
        yield f"{HEADER}\n".encode()
        for _ in range(1000):
            chunks_read += 1
            yield f"{ROW}\n".encode()

    rows = visits_csv.read(chunks())
    next(rows)
    assert chunks_read < 10
