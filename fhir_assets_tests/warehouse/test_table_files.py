"""Files of tables: what a spreadsheet, a data frame and DuckDB read is what the table has."""

import csv
import io
import json
import zipfile
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet as arrow_parquet

from fhir_assets.deployment.store import build_blobs
from fhir_assets.errors import ConfigurationError, StoreError
from fhir_assets.fhir.intake import formulas, visits_csv
from fhir_assets.fhir.record import Record
from fhir_assets.fhir.views import View
from fhir_assets.fhir.views.preview import write_csv
from fhir_assets.privacy.encryption import NO_ENCRYPTION
from fhir_assets.settings import load_settings
from fhir_assets.storage.store import open_store
from fhir_assets.warehouse.exports.export import Export, Format
from fhir_assets.warehouse.lake import writer
from fhir_assets.warehouse.postgres.db.connections import Session
from fhir_assets.warehouse.postgres.tables.view_tables import ensure_tables
from fhir_assets_tests.support.views import column, load, patient, view

FORMULAS = ["=1+1", "+49 30", "-5", "@SUM(A1)", "\tx", "\rx", "'=1", "''@", "\uff1d1", "\n=1"]
CELLS = view(
    "cells",
    "Patient",
    column("id", "getResourceKey()", "string"),
    column("note", "name.family", "string"),
    column("price", "extension.where(url = 'price').value.ofType(decimal)", "decimal"),
    column("seen", "deceased.ofType(dateTime)", "dateTime"),
    column("clock", "extension.where(url = 'clock').value.ofType(time)", "time"),
)


def row(key: str, note: str | None = None, price: str | None = None, **elements: Any) -> Record:
    """A patient with a row of CELLS. ``price`` is written into the JSON with all of its digits."""
    if note is not None:
        elements["name"] = [{"family": note}]
    if price is not None:
        elements["extension"] = [{"url": "price", "valueDecimal": "PRICE"}]
    record = patient(key, **elements)
    return replace(record, body=record.body.replace(b'"PRICE"', (price or "").encode()))


def export(conn: Session, folder: Path, form: Format, *, excel: bool = False, of: View = CELLS) -> Path:
    store = open_store(str(folder / "store"), NO_ENCRYPTION)
    target = open_store(str(folder / "out"), NO_ENCRYPTION).blobs
    with Export(conn, store, target, "", actor="test", withholding=False) as files:
        files.for_type("Patient", None).write_table(of, form, excel=excel)
        files.finish()
    return folder / "out" / f"{of.name}.{form}"


def read_csv(path: Path) -> dict[str, dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return {cells["id"]: cells for cells in csv.DictReader(file)}


def test_no_cell_of_a_csv_file_is_a_formula_and_numbers_stay_numbers(conn: Session, tmp_path: Path) -> None:
    load(conn, *(row(f"p{n}", text, "-5.50") for n, text in enumerate(FORMULAS)), views=(CELLS,))
    rows = read_csv(export(conn, tmp_path, "csv"))
    for n, text in enumerate(FORMULAS):
        assert rows[f"p{n}"]["note"] == f"'{text}"
        assert rows[f"p{n}"]["price"] == "-5.50"


@given(st.text(alphabet="'=+-@\t\r\nab\uff1d", max_size=6))
def test_a_guarded_text_is_read_back_as_it_was(text: str) -> None:
    guarded = formulas.guard(text)
    assert formulas.remove_guard(guarded) == text
    assert not guarded or guarded[0] not in "=+-@\t\r\n\uff1d"


def test_our_own_import_removes_the_guard_of_an_exported_cell() -> None:
    visit = dict.fromkeys(visits_csv.COLUMNS, "x") | {
        "mrn": "M1",
        "visit_account_number": "V1",
        "birth_date": "1980-01-01",
        "visit_date": "2024-01-01",
        "first_name": "-Anna",
        "last_name": "@Li",
        "reason": "=2+2",
    }
    text = io.StringIO(newline="")
    csv_writer = csv.DictWriter(text, visits_csv.COLUMNS)
    csv_writer.writeheader()
    csv_writer.writerow({name: formulas.guard(value) for name, value in visit.items()})
    for mark in ("", "\ufeff"):
        [read] = list(visits_csv.read([(mark + text.getvalue()).encode()]))
        values = getattr(read, "values", None) or json.loads(getattr(read, "body", b"{}"))
        assert {name: values[name] for name in ("first_name", "last_name", "reason")} == {
            "first_name": "-Anna",
            "last_name": "@Li",
            "reason": "=2+2",
        }


def test_the_rows_of_a_view_over_files_are_guarded_as_well() -> None:
    out = io.BytesIO()
    write_csv([("p", "=1+1", -5, None, None)], CELLS.columns, out)
    assert out.getvalue().splitlines()[1] == b"p,'=1+1,-5,,"


def test_times_in_csv_and_ndjson_have_one_shape(conn: Session, tmp_path: Path) -> None:
    load(
        conn,
        row("a", deceasedDateTime="2024-01-05T10:00:00Z"),
        row("b", deceasedDateTime="2024-01-05T10:00:00.250Z"),
        views=(CELLS,),
    )
    rows = read_csv(export(conn, tmp_path, "csv"))
    lines = export(conn, tmp_path, "ndjson").read_bytes().splitlines()
    of_json = {line["id"]: line["seen"] for line in map(orjson.loads, lines)}
    assert {key: cells["seen"] for key, cells in rows.items()} == of_json
    assert of_json == {"a": "2024-01-05T10:00:00.000000+00:00", "b": "2024-01-05T10:00:00.250000+00:00"}
    assert {len(cells["loaded_at"]) for cells in rows.values()} == {32}


def test_empty_text_differs_from_null_and_a_code_keeps_its_zeros(conn: Session, tmp_path: Path) -> None:
    load(conn, row("a", "0123"), row("b"), views=(CELLS,))
    lines = export(conn, tmp_path, "csv").read_bytes().decode().split("\r\n")
    assert any(line.startswith('"a","0123",,') for line in lines)
    assert any(line.startswith('"b",,,') for line in lines)


def test_a_csv_file_for_excel_begins_with_a_mark_and_keeps_codes_as_text(conn: Session, tmp_path: Path) -> None:
    codes = ["0123", "1E5", "3-4", "MAR1", "1-Mar", "2-SEP", "10-Dec", "FALSE", "true", "123456789012345678"]
    codes += ["Ö", "Mar", "=1"]
    load(conn, *(row(f"p{n}", code, "1.50") for n, code in enumerate(codes)), views=(CELLS,))
    path = export(conn, tmp_path, "csv", excel=True)
    assert path.read_bytes().startswith(b"\xef\xbb\xbf")
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = {cells["id"]: cells for cells in csv.DictReader(file)}
    notes = [rows[f"p{n}"]["note"] for n in range(len(codes))]
    assert notes == [*(f'="{code}"' for code in codes[:10]), "Ö", "Mar", "'=1"]
    assert {cells["price"] for cells in rows.values()} == {"1.50"}
    assert not export(conn, tmp_path, "csv").read_bytes().startswith(b"\xef\xbb\xbf")


def test_a_number_keeps_its_digits_in_ndjson(conn: Session, tmp_path: Path) -> None:
    load(conn, row("a", None, "1.10000000000000000001"), views=(CELLS,))
    assert b'"price":1.10000000000000000001,' in export(conn, tmp_path, "ndjson").read_bytes()


PRICES = ["1224.75", "0.1", "0.2", "-5", "1.100"]
BEYOND = {
    "long": "1.12345678901234567890123",
    "large": "123456789012345678901234.5",
    "rounded up": "99999999999999999999.9999999999999999999",
}


def test_a_sum_of_decimals_in_parquet_is_exact(conn: Session, tmp_path: Path) -> None:
    load(conn, *(row(f"p{n}", None, price) for n, price in enumerate(PRICES)), views=(CELLS,))
    path = export(conn, tmp_path, "parquet")
    found = duckdb.execute(f"SELECT sum(price), typeof(any_value(price)) FROM '{path}'").fetchone()
    assert found == (sum(map(Decimal, PRICES)), "DECIMAL(38,18)")
    assert arrow_parquet.read_table(path)["_exact_decimals"].null_count == len(PRICES)


def test_a_decimal_that_does_not_fit_is_not_lost(conn: Session, tmp_path: Path) -> None:
    load(conn, *(row(key, None, price) for key, price in {**BEYOND, "fits": "1.5"}.items()), views=(CELLS,))
    rows = {found["id"]: found for found in arrow_parquet.read_table(export(conn, tmp_path, "parquet")).to_pylist()}
    assert {key: json.loads(rows[key]["_exact_decimals"])["price"] for key in BEYOND} == BEYOND
    assert rows["long"]["price"] == Decimal("1.123456789012345679")
    assert rows["large"]["price"] is rows["rounded up"]["price"] is None
    assert (rows["fits"]["price"], rows["fits"]["_exact_decimals"]) == (Decimal("1.5"), None)


def test_excel_files_keep_text_as_text_and_numbers_as_numbers(conn: Session, tmp_path: Path) -> None:
    pytest.importorskip("xlsxwriter")
    load(conn, row("a", "0123", "-5.5"), row("b", "=1+1", BEYOND["large"]), views=(CELLS,))
    with zipfile.ZipFile(export(conn, tmp_path, "xlsx")) as archive:
        sheet = archive.read("xl/worksheets/sheet1.xml").decode()
    assert "<f>" not in sheet
    for text in ("0123", "=1+1", BEYOND["large"], "note"):
        assert f"<is><t>{text}</t></is>" in sheet
    assert "<v>-5.5</v>" in sheet


def test_a_text_that_no_cell_of_excel_holds_is_an_error_that_names_the_column(conn: Session, tmp_path: Path) -> None:
    pytest.importorskip("xlsxwriter")
    load(conn, row("a", "x" * 40_000), views=(CELLS,))
    with pytest.raises(ConfigurationError, match="column note has a text of 40,000 characters"):
        export(conn, tmp_path, "xlsx")


def test_an_excel_file_may_be_larger_than_a_zip_file_without_extensions(
    conn: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("xlsxwriter")
    load(conn, row("a", "x" * 2_000), views=(CELLS,))
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 1_000)
    assert zipfile.is_zipfile(export(conn, tmp_path, "xlsx"))


def test_an_excel_file_that_cannot_be_written_is_an_error_of_the_store_and_leaves_no_file(
    conn: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    xlsxwriter = pytest.importorskip("xlsxwriter")

    def fail(workbook: object) -> None:
        raise OSError(28, "No space left on device")

    load(conn, row("a", "x"), views=(CELLS,))
    monkeypatch.setattr(xlsxwriter.Workbook, "_store_workbook", fail)
    with pytest.raises(StoreError, match=r"cannot write cells\.xlsx of the export: No space left on device"):
        export(conn, tmp_path, "xlsx")
    assert list((tmp_path / "out").rglob("*")) == []


def update(conn: Session, folder: Path) -> writer.LakeUpdate:
    return writer.update(conn, build_blobs(load_settings(), str(folder)), CELLS, [], run_id="run", actor="test")


def files_of(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_view_without_rows_has_a_file_with_its_columns_until_it_has_rows(conn: Session, tmp_path: Path) -> None:
    ensure_tables(conn, (CELLS,))
    conn.commit()
    empty = "cells/partition_key=__HIVE_DEFAULT_PARTITION__/rows.parquet"
    assert update(conn, tmp_path) == writer.LakeUpdate(bytes=(tmp_path / empty).stat().st_size)
    assert update(conn, tmp_path) == writer.LakeUpdate()
    found = duckdb.execute(f"SELECT * FROM read_parquet('{tmp_path}/cells/*/*.parquet', hive_partitioning = true)")
    assert {name for name, *_ in found.description} >= {"id", "note", "price", "seen_date", "partition_key"}
    assert found.fetchall() == []
    load(conn, row("a", "x"), views=(CELLS,), key="2024-01-01")
    assert update(conn, tmp_path).windows == 1
    assert files_of(tmp_path) == {"_state/cells.json", "cells/partition_key=2024-01-01/rows.parquet"}
    conn.execute("DELETE FROM fhir.cells")
    conn.commit()
    assert update(conn, tmp_path).removed == 1
    assert files_of(tmp_path) == {"_state/cells.json", empty}


def test_the_lake_has_no_other_files_among_those_of_a_view_and_no_spool(conn: Session, tmp_path: Path) -> None:
    load(conn, row("a", "x", "1.5"), views=(CELLS,), key="2024-01-01")
    update(conn, tmp_path)
    assert {path.suffix for path in (tmp_path / "cells").rglob("*") if path.is_file()} == {".parquet"}
    assert not (tmp_path / ".spool").exists()


def test_polars_reads_the_folder_of_a_view(conn: Session, tmp_path: Path) -> None:
    polars = pytest.importorskip("polars")
    load(conn, *(row(f"p{n}", None, price) for n, price in enumerate(PRICES)), views=(CELLS,), key="2024-01-01")
    load(conn, row("q"), views=(CELLS,), key="2024-01-02")
    update(conn, tmp_path)
    frame = polars.scan_parquet(tmp_path / "cells").collect()
    assert (frame.height, frame["price"].sum()) == (len(PRICES) + 1, sum(map(Decimal, PRICES)))


def test_a_lake_of_an_earlier_version_is_read_and_written_in_the_new_form(conn: Session, tmp_path: Path) -> None:
    load(conn, row("a", "x", "1.5"), views=(CELLS,), key="2024-01-01")
    update(conn, tmp_path)
    state = json.loads((tmp_path / "_state/cells.json").read_bytes())
    state["2024-01-01"]["shape"] = state["2024-01-01"]["shape"].partition("/")[0]
    state["2023-12-31"] = {"rows": 1}
    (tmp_path / "_state/cells.json").unlink()
    (tmp_path / "cells/_windows.json").write_text(json.dumps(state))
    gone = tmp_path / "cells/partition_key=2023-12-31/rows.parquet"
    gone.parent.mkdir()
    gone.write_bytes(b"rows that the table no longer has")
    result = update(conn, tmp_path)
    assert (result.windows, result.removed) == (1, 1)
    assert files_of(tmp_path) == {"_state/cells.json", "cells/partition_key=2024-01-01/rows.parquet"}
