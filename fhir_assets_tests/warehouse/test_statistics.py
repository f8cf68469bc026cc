"""A load that wrote much of a table leaves statistics of it; a small load costs no statement."""

from pathlib import Path

import pytest

from fhir_assets.warehouse.postgres.db.connections import Session
from fhir_assets.warehouse.postgres.tables import statistics
from fhir_assets_tests.support.deployment import Deploy, deploy
from fhir_assets_tests.support.views import load, patient, select

__all__ = ["deploy"]


def count_analyzed(conn: Session, table: str) -> int:
    [(rows,)] = select(conn, f"SELECT reltuples::int FROM pg_class WHERE oid = 'fhir.{table}'::regclass")
    return int(rows)


def test_a_table_is_analyzed_if_much_of_it_was_written(conn: Session) -> None:
    load(conn, *(patient(f"p{n}", name=[{"family": "A"}]) for n in range(5)))
    assert statistics.analyze_changed(conn, {"patient": 5, "patient_name": 5}) == []
    assert count_analyzed(conn, "patient") == -1
    many = statistics.MIN_ROWS
    assert statistics.analyze_changed(conn, {"patient": many, "patient_name": 5, "none": many}) == ["patient"]
    assert (count_analyzed(conn, "patient"), count_analyzed(conn, "patient_name")) == (5, -1)
    [(columns,)] = select(conn, "SELECT array_agg(attname::text) FROM pg_stats WHERE tablename = 'patient'")
    assert sorted(columns) == ["_resource_key", "born", "gender"], "those with an index"
    conn.execute("UPDATE pg_class SET reltuples = %s WHERE oid = 'fhir.patient'::regclass", [many * 11])
    conn.commit()
    assert statistics.analyze_changed(conn, {"patient": many}) == []


def test_a_load_analyzes_what_it_changed(deploy: Deploy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "MIN_ROWS", 2)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "Patient.ndjson").write_bytes(b"\n".join(patient(key).body for key in "ab") + b"\n")
    deployment = deploy(
        fhir_source="ndjson",
        fhir_base_url=str(tmp_path / "data"),
        fhir_resource_types="Patient",
        fhir_last_updated_gte="2024-01-01",
        fhir_partition="monthly",
    )
    assert all(outcome.success for outcome in deployment.ingest())
    assert deployment.query("SELECT reltuples::int FROM pg_class WHERE oid = 'fhir.patient'::regclass") == [(2,)]
