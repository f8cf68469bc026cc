"""The scan counts unencrypted values in tagged columns, for every treatment."""

from collections.abc import Iterator

import pytest

from fhir_assets.privacy.encryption import Cipher
from fhir_assets.privacy.keys import new_key, parse_keys
from fhir_assets.warehouse.ops import encryption_secret
from fhir_assets.warehouse.postgres.db.connections import Connection, connect
from fhir_assets.warehouse.postgres.tables import plaintext_scan
from fhir_assets_tests.support.encrypted_views import PATIENT_WITH_PHI, TAGGED_PATIENT
from fhir_assets_tests.support.views import load, patient

PHI = {"family", "mrn", "mrn_index", "ssn", "born", "died", "multiple", "note"}


@pytest.fixture
def encrypted(database: str) -> Iterator[Connection]:
    with connect(database) as conn:
        cipher = encryption_secret.unlock(conn, Cipher(parse_keys([new_key()])))
    with connect(database, cipher=cipher) as conn:
        load(conn, PATIENT_WITH_PHI, patient("nothing known"), views=(TAGGED_PATIENT,))
        yield conn


def test_a_scan_of_encrypted_tables_counts_no_unencrypted_value(encrypted: Connection) -> None:
    samples = plaintext_scan.scan_view(encrypted, TAGGED_PATIENT)
    assert {sample.column for sample in samples} == PHI
    assert sum(sample.plain for sample in samples) == 0
    assert {sample.column for sample in samples if sample.values} == PHI - {"note"}
    assert plaintext_scan.scan_resources(encrypted, "Patient") == [
        plaintext_scan.ColumnSample("resource_patient", "resource", 2, 0)
    ]


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("family", "O'Hara"),
        ("family", "gAAAAA O'Hara"),
        ("family", "fs2_O'Hara"),
        ("multiple", "2"),
        ("mrn", "gAAAAABMRN-1"),
        ("mrn_index", "MRN-1"),
        ("ssn", "078-05-1120"),
        ("born", "1980-02-29"),
        ("died", "2020-05-01"),
        ("note", "<div>O'Hara</div>"),
    ],
)
def test_one_unencrypted_value_is_counted_in_its_column(encrypted: Connection, column: str, value: str) -> None:
    encrypted.execute(f"UPDATE fhir.patient SET {column} = %s WHERE _resource_key = 'a'".encode(), [value])
    samples = plaintext_scan.scan_view(encrypted, TAGGED_PATIENT)
    assert [(sample.column, sample.plain) for sample in samples if sample.plain] == [(column, 1)]


@pytest.mark.parametrize("change", ["resource = '{}'", "key_id = NULL"])
def test_an_unencrypted_resource_is_counted(encrypted: Connection, change: str) -> None:
    encrypted.execute(f"UPDATE fhir.resource SET {change} WHERE id = 'a'".encode())
    assert plaintext_scan.scan_resources(encrypted, "Patient") == [
        plaintext_scan.ColumnSample("resource_patient", "resource", 2, 1)
    ]


def test_only_a_sample_of_a_large_table_is_scanned(encrypted: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    encrypted.execute("INSERT INTO fhir.patient SELECT p.* FROM fhir.patient p, generate_series(1, 3000)")
    monkeypatch.setattr(plaintext_scan, "SAMPLE_PAGES", 20)
    [family] = [sample for sample in plaintext_scan.scan_view(encrypted, TAGGED_PATIENT) if sample.column == "family"]
    assert 0 < family.values < 1500
