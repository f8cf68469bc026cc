"""pandas reads the tables and the lake by the lines of docs/tools.md. It is in the environment of `make dbt-story`."""

from pathlib import Path

import pytest
from sqlalchemy import create_engine

from fhir_assets.deployment.store import build_blobs
from fhir_assets.privacy.encryption import NO_ENCRYPTION
from fhir_assets.settings import load_settings
from fhir_assets.warehouse.lake import writer
from fhir_assets.warehouse.postgres.db.connections import connect, normalise_url
from fhir_assets_tests.support.shipped_views import views
from fhir_assets_tests.support.views import load, patient

pandas = pytest.importorskip("pandas", reason="pandas is in the environment of make dbt-story")
pytestmark = pytest.mark.slow


def test_pandas_reads_a_mart_and_the_lake(database: str, tmp_path: Path) -> None:
    view = views()["patient"]
    people = [patient("0123", birthDate="1900", deceasedBoolean=True), patient("p2", birthDate="1900-05-06")]
    with connect(database, cipher=NO_ENCRYPTION) as conn:
        load(conn, *people, views=(view,))
        writer.update(conn, build_blobs(load_settings(), str(tmp_path)), view, ["2024-01-01"], run_id="r", actor="test")
    engine = create_engine(normalise_url(database, "psycopg"))
    read = pandas.read_sql("SELECT * FROM marts.patient_current ORDER BY id", engine, dtype_backend="numpy_nullable")
    engine.dispose()
    assert [read["id"].tolist(), read["alive"].tolist()] == [["0123", "p2"], [False, True]]
    assert (str(read["age"].dtype), read["age"].isna().tolist()) == ("Int64", [True, False])
    lake = pandas.read_parquet(tmp_path / "patient")
    assert sorted(zip(lake["id"], map(str, lake["birth_date"]), strict=True)) == [
        ("0123", "1900-01-01"),
        ("p2", "1900-05-06"),
    ]
