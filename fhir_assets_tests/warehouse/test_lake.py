"""The lake, read with DuckDB, has the rows of the tables: for every shipped view, with and without keys."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import duckdb
import orjson
import pyarrow.fs
import pyarrow.parquet
import pytest

from fhir_assets.catalog import CATALOG
from fhir_assets.deployment.store import build_blobs
from fhir_assets.errors import StoreError
from fhir_assets.fhir.record import Record
from fhir_assets.fhir.views import View
from fhir_assets.privacy.encryption import NO_ENCRYPTION, Cipher
from fhir_assets.privacy.keys import new_key, parse_keys
from fhir_assets.settings import load_settings
from fhir_assets.storage.blobs import LocalBlobs
from fhir_assets.warehouse.lake import writer
from fhir_assets.warehouse.lake.writer import LakeUpdate
from fhir_assets.warehouse.ops import encryption_secret
from fhir_assets.warehouse.postgres.db.connections import Session, connect
from fhir_assets.warehouse.postgres.tables import row_streams
from fhir_assets_tests.support.encrypted_views import PATIENT_WITH_PHI, TAGGED_PATIENT
from fhir_assets_tests.support.lake_rows import in_lake, in_table
from fhir_assets_tests.support.shipped_views import saturated_for_views, views_of_type
from fhir_assets_tests.support.views import PATIENTS, load, patient

KEY = new_key()
DAYS = ("2024-01-01", "2024-01-02")
_UPDATE_REPEATEDLY = """
import sys
from fhir_assets.deployment.store import build_blobs
from fhir_assets.deployment.views import build_views
from fhir_assets.privacy.encryption import NO_ENCRYPTION
from fhir_assets.settings import load_settings
from fhir_assets.storage.blobs import LocalBlobs
from fhir_assets.warehouse.lake import writer
from fhir_assets.warehouse.postgres.db.connections import connect
settings = load_settings(fhir_lake_url=sys.argv[2])
(view,) = [view for view in build_views(settings).views if view.name == "patient"]
days = [f"2024-01-{day:02}" for day in range(1, 6)]
with connect(sys.argv[1], cipher=NO_ENCRYPTION) as conn:
    while True:
        writer.update(conn, build_blobs(settings, sys.argv[2]), view, days, run_id="r", actor="test")
        print("written", flush=True)
"""


@pytest.fixture(params=["without keys", "with keys"])
def session(request: pytest.FixtureRequest, database: str) -> Iterator[Session]:
    """A connection without keys, and a connection with keys."""
    if request.param == "without keys":
        with connect(database, cipher=NO_ENCRYPTION) as conn:
            yield conn
    else:
        with connect(database) as conn:
            cipher = encryption_secret.unlock(conn, Cipher(parse_keys([new_key()])))
        with connect(database, cipher=cipher) as conn:
            yield conn


def update(conn: Session, url: str, view: View, *wanted: str) -> LakeUpdate:
    return writer.update(conn, build_blobs(load_settings(), url), view, wanted, run_id="run", actor="test")


def saturated_records(resource_type: str) -> Iterator[Record]:
    moment = datetime(2024, 1, 1, tzinfo=UTC)
    for n, resource in enumerate(saturated_for_views(resource_type)):
        body: dict[str, Any] = {**resource, "id": f"r{n}"}
        yield Record(resource_type, f"r{n}", "1", moment, moment, orjson.dumps(body))


@pytest.mark.slow
def test_duckdb_reads_the_rows_of_every_shipped_view(session: Session, tmp_path: Path) -> None:
    different, empty = [], []
    for resource_type in (catalog_type.name for catalog_type in CATALOG):
        views = tuple(views_of_type(resource_type))
        records = list(saturated_records(resource_type))
        for day, part in zip(DAYS, (records[::2], records[1::2]), strict=True):
            load(session, *part, views=views, key=day)
        for view in views:
            update(session, str(tmp_path), view)
            expected = in_table(session, view.name)
            if not expected:
                empty.append(view.name)
            if in_lake(str(tmp_path), view.name) != expected:
                different.append(view.name)
    assert different == []
    # Their rows are extensions, which saturated resources do not have.
    assert empty == ["patient_ethnicity", "patient_race"]


def test_the_treatments_of_patient_data_apply_to_the_lake(database: str, tmp_path: Path) -> None:
    with connect(database) as conn:
        cipher = encryption_secret.unlock(conn, Cipher(parse_keys([KEY])))
    with connect(database, cipher=cipher) as conn:
        load(conn, PATIENT_WITH_PHI, views=(TAGGED_PATIENT,))
        update(conn, str(tmp_path), TAGGED_PATIENT)
    files = list((tmp_path / "patient").rglob("*.parquet"))
    row = duckdb.execute(
        "SELECT family, mrn_index, ssn, born, note FROM read_parquet(?)", [[str(file) for file in files]]
    ).fetchone()
    assert row
    family, mrn_index, ssn, born, note = row
    assert family.startswith("fs2_")
    assert (mrn_index, ssn) == (cipher.index("MRN-1"), cipher.index("078-05-1120"))
    assert (born, note) == (date(1980, 1, 1), None)
    for file in (tmp_path / "patient").rglob("*"):
        content = file.read_bytes() if file.is_file() else b""
        assert [word for word in (b"O'Hara", b"MRN-1", b"078-05-1120") if word in content] == []


def test_windows_with_changed_rows_are_written_again(conn: Session, tmp_path: Path) -> None:
    for day in DAYS:
        load(conn, patient(f"p{day}"), key=day)
    assert update(conn, str(tmp_path), PATIENTS[0]).windows == 2
    assert update(conn, str(tmp_path), PATIENTS[0]) == LakeUpdate()
    # A key rotation also changes the values of a row without a new version of its resource.
    conn.execute("UPDATE fhir.patient SET gender = 'other' WHERE _resource_key = %s", [f"p{DAYS[1]}"])
    conn.commit()
    assert update(conn, str(tmp_path), PATIENTS[0]).windows == 1
    assert in_lake(str(tmp_path), "patient") == in_table(conn, "patient")


@pytest.mark.slow
def test_a_killed_writer_leaves_complete_files(database: str, conn: Session, tmp_path: Path) -> None:
    views = tuple(views_of_type("Patient"))
    for day in range(1, 6):
        people = [patient(f"p{day}-{n}", gender="other") for n in range(50)]
        load(conn, *people, views=views, key=f"2024-01-{day:02}")
    url = str(tmp_path / "lake")
    expected = in_table(conn, "patient")
    for n in range(4):
        command = [sys.executable, "-c", _UPDATE_REPEATEDLY, database, url]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout
            for _ in range(n + 1):
                assert process.stdout.readline() == b"written\n"
            process.send_signal(signal.SIGKILL)
        # Each file is the old file or its replacement, and both contain the rows.
        assert in_lake(url, "patient") == expected
    (view,) = [view for view in views if view.name == "patient"]
    update(conn, url, view, *[f"2024-01-{day:02}" for day in range(1, 6)])
    assert in_lake(url, "patient") == expected


def test_a_lake_in_a_bucket_can_be_read_as_one_table(conn: Session, s3_server: str, s3_url: str) -> None:
    for day in DAYS:
        load(conn, *(patient(f"{day}-{n}", gender="female") for n in range(3)), key=day)
    update(conn, s3_url, PATIENTS[0])
    files = pyarrow.fs.S3FileSystem(
        access_key="test", secret_key="test", region="us-east-1", scheme="http", endpoint_override=s3_server
    )
    rows = pyarrow.parquet.read_table(f"{s3_url.removeprefix('s3://')}/patient", filesystem=files).to_pylist()
    assert sorted(row["_resource_key"] for row in rows) == sorted(f"{day}-{n}" for day in DAYS for n in range(3))
    assert {str(row["partition_key"]) for row in rows} == set(DAYS)
    schema = pyarrow.parquet.read_schema(
        f"{s3_url.removeprefix('s3://')}/patient/partition_key={DAYS[0]}/rows.parquet", filesystem=files
    )
    assert schema.field("gender").metadata[b"comment"] == b"Administrative gender"


class _BrokenBlobs(LocalBlobs):
    """A folder whose disk is full, or whose process ends, after ``room`` files."""

    def __init__(self, root: Path, room: int) -> None:
        super().__init__(root)
        self.room = room

    def put_file(self, name: str, path: Path) -> None:
        if not self.room:
            raise StoreError("No space left on device")
        self.room -= 1
        super().put_file(name, path)


def test_what_an_unfinished_update_wrote_is_audited_and_completed_by_the_next_one(
    conn: Session, tmp_path: Path
) -> None:
    for day in DAYS:
        load(conn, patient(f"p{day}"), key=day)
    with pytest.raises(StoreError, match="No space left"):
        writer.update(conn, _BrokenBlobs(tmp_path, 1), PATIENTS[0], [], run_id="broken", actor="test")
    assert not (tmp_path / ".spool").exists()
    assert conn.execute("SELECT run_id, count FROM ops.audit_log WHERE action = 'export'").fetchall() == [("broken", 1)]
    conn.commit()
    assert update(conn, str(tmp_path), PATIENTS[0]).windows == 2
    assert in_lake(str(tmp_path), "patient") == in_table(conn, "patient")


def test_a_window_that_loses_its_rows_after_an_unfinished_update_leaves_the_lake(conn: Session, tmp_path: Path) -> None:
    """As if the process was killed between the files and the state, and consent was withdrawn then."""
    for day in DAYS:
        load(conn, patient(f"p{day}"), key=day)
    with pytest.raises(StoreError):
        writer.update(conn, _BrokenBlobs(tmp_path, 1), PATIENTS[0], [], run_id="run", actor="test")
    [written] = tmp_path.glob("patient/*/rows.parquet")
    conn.execute("DELETE FROM fhir.patient WHERE _resource_key = %s", [f"p{DAYS[0]}"])
    conn.commit()
    update(conn, str(tmp_path), PATIENTS[0])
    assert not written.exists()
    assert in_lake(str(tmp_path), "patient") == in_table(conn, "patient")


def test_a_file_with_fewer_rows_than_its_table_is_an_error(
    conn: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(conn, patient("p"), key=DAYS[0])
    monkeypatch.setattr(row_streams, "stream_rows", lambda *_, **__: iter(()))
    with pytest.raises(StoreError, match="would have 0 rows and its table 1"):
        update(conn, str(tmp_path), PATIENTS[0])
    assert list(tmp_path.glob("patient/*/rows.parquet")) == []
