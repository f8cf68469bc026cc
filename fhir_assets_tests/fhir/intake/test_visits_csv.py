"""Visits in CSV: written and read back, valid and malformed."""

import codecs
import csv
import io
from collections.abc import Iterator
from datetime import date

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fhir_assets.fhir.intake import cells, schemas, visits_csv
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
days = st.dates(date(1990, 1, 1), date(2020, 1, 1)).map(str)
numbers = st.builds("{}{}".format, st.sampled_from("AVM"), st.integers(1))
visits = st.fixed_dictionaries(
    {
        "mrn": text | numbers,
        "first_name": text,
        "last_name": text | st.sampled_from(["=1+1", "'=x", "-", "@x", '"', "'t Hooft", "''+"]),
        "birth_date": dates,
        "visit_account_number": text | numbers,
        "visit_date": dates,
        "reason": reasons,
    }
)
good_visits = st.builds(
    lambda row, mrn, number, born, visited: {
        **row,
        "mrn": mrn,
        "visit_account_number": number,
        "birth_date": min(born, visited),
        "visit_date": max(born, visited),
    },
    visits,
    numbers,
    numbers,
    days,
    days,
).filter(lambda row: not visits_csv.find_errors(row) and not any(value.startswith('="') for value in row.values()))


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


@given(st.lists(good_visits, max_size=8), st.integers(1, 50))
def test_written_visits_are_read_back_with_any_characters(rows: list[dict[str, str]], chunk: int) -> None:
    assert good(read(visits_csv.write(rows), chunk=chunk)) == rows


@given(st.lists(visits, max_size=8))
def test_no_value_is_written_as_a_formula(rows: list[dict[str, str]]) -> None:
    written = csv.reader(io.StringIO(visits_csv.write(rows).decode(), newline=""))
    assert not [value for row in written for value in row if value[:1] in ("=", "+", "-", "@", "\t", "\r")]


def values() -> st.SearchStrategy[object]:
    odd = st.sampled_from(["", " ", "x\n", "\0", "2024-02-30", "2024-1-1", "20240101", "x" * 65, "x" * 129, "x" * 1025])
    return st.dictionaries(st.sampled_from([*visits_csv.COLUMNS, "other"]), odd | text | dates | st.integers())


@given(values() | visits)
def test_the_fast_check_agrees_with_the_json_schema(row: dict[str, object]) -> None:
    expected = tuple((error.path, error.message) for error in schemas.find_errors("visit", row))
    found = visits_csv.find_errors(row)
    assert found == expected or not expected


@given(visits.filter(lambda row: not schemas.find_errors("visit", row)))
def test_the_fast_check_of_values_agrees_with_the_one_that_names_problems(row: dict[str, str]) -> None:
    problems = list(cells.find_visit_problems(row))
    assert not problems if cells.compile_visit_check()(row) else bad(read(visits_csv.write([row]))) or not problems


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


CELLS = {**ADA, "mrn": "00123", "birth_date": "1980-01-01"}


def as_csv(delimiter: str = ",", end: str = "\n", *, more: str = "", **values: str) -> str:
    row = delimiter.join({**CELLS, **values}.values())
    return f"{HEADER.replace(',', delimiter)}{more}{end}{row}{more}{end}"


@pytest.mark.parametrize(
    "content",
    [
        as_csv(";"),
        as_csv("\t"),
        "sep=;\r\n" + as_csv(";", "\r\n"),
        '"sep=,"\n' + as_csv(),
        as_csv(more=",,,"),
        as_csv(end="\r"),
        as_csv(end="\r\r\n"),
        as_csv().encode("utf-16"),
        as_csv(";", "\r\n").encode("utf-16-le"),
        codecs.BOM_UTF16_BE + as_csv("\t").encode("utf-16-be"),
        as_csv().encode("utf-8-sig"),
        as_csv().encode("utf-32"),
        as_csv(mrn='"=""00123"""'),
        as_csv(mrn='="00123"'),
        f"{HEADER}\n,,,,,,\n{','.join(CELLS.values())}\n",
    ],
)
@pytest.mark.parametrize("chunk", [7, 1 << 20])
def test_what_a_spreadsheet_writes_is_read(content: bytes | str, chunk: int) -> None:
    assert good(read(content, chunk=chunk)) == [CELLS]
    assert not bad(read(content, chunk=chunk))


def test_line_separators_within_a_cell_are_part_of_it() -> None:
    reason = "a\u2028b\u2029c\x85d"
    assert good(read(as_csv(reason=reason))) == [{**CELLS, "reason": reason}]
    assert good(read(as_csv(reason='"a\r\nb\rc"'))) == [{**CELLS, "reason": "a\r\nb\rc"}]


@pytest.mark.parametrize(
    "value",
    [
        *("1.23457E+11", "1,23E+5", "1e-05", "-2E+10", "123.0", "123456789012345000", "#N/A", "#REF!", "#NV", "#WERT!"),
        *(
            "NULL",
            "nan",
            "NaN",
            "None",
            "n/a",
            "<NA>",
            "\\N",
            "TRUE",
            "0000",
            "-",
            "???",
            "Mar-05",
            "5-Mar",
            "3/5/2026",
        ),
        *("2026-03-05 00:00:00", "12\u200b3", "12\u00a03", "\u202e123", "12\ufeff3", "12\u200d3", "12\u00ad3"),
    ],
)
@pytest.mark.parametrize("column", ["mrn", "visit_account_number"])
def test_what_cannot_be_a_record_number_is_refused_by_name(column: str, value: str) -> None:
    cell = f'"{value}"' if "," in value else value
    assert good(read(as_csv(**{column: cell}))) == []
    ((path, message),) = visits_csv.find_errors({**CELLS, column: value})
    assert path == f"/{column}"
    assert value not in message or len(value) == 1


@pytest.mark.parametrize("value", ["M-1", "12E5", "7", "1.2.3", "#123", "MAR-05", "A0", "Null-7", "123456789012345678"])
def test_unusual_record_numbers_are_kept(value: str) -> None:
    assert good(read(as_csv(mrn=value))) == [{**CELLS, "mrn": value}]


@pytest.mark.parametrize("name", ["Null", "Nan", "None", "Na", "\u0645\u06cc\u200c\u062e", "O'Neil", "X Æ A-12"])
def test_names_that_look_like_missing_values_are_names(name: str) -> None:
    assert good(read(as_csv(last_name=name))) == [{**CELLS, "last_name": name}]


@pytest.mark.parametrize(
    "values",
    [
        {"last_name": "#N/A"},
        {"last_name": "Love\u200blace"},
        {"first_name": "Ada\u00a0M"},
        {"birth_date": "2062-01-01", "visit_date": "2026-10-01"},
        {"birth_date": "0080-01-01"},
        {"birth_date": "0080-01-01", "visit_date": "0081-01-01"},
        {"visit_date": "2126-10-01"},
        {"visit_date": "2024/01/05"},
        {"visit_date": "45296"},
    ],
)
def test_values_that_cannot_be_right_are_refused_by_name(values: dict[str, str]) -> None:
    assert good(read(as_csv(**values))) == []
    assert {path for path, _ in visits_csv.find_errors({**CELLS, **values})} <= {f"/{name}" for name in values}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04 something", "spreadsheet"),
        (codecs.BOM_UTF16_LE + as_csv().encode("utf-16-le") + b"\x00\xd8\x00", "UTF-16-LE"),
    ],
)
def test_a_file_that_is_not_text_is_refused_by_name(content: bytes, message: str) -> None:
    assert any(message in text for _, _, texts in bad(read(content)) for text in texts)


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
