"""A value in the clear where none should be is found, whatever the column's tag."""

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
def sealed(database: str) -> Iterator[Connection]:
    with connect(database) as conn:
        cipher = encryption_secret.unlock(conn, Cipher(parse_keys([new_key()])))
    with connect(database, cipher=cipher) as conn:
        load(conn, PATIENT_WITH_PHI, patient("nothing known"), views=(TAGGED_PATIENT,))
        yield conn


def test_what_is_sealed_as_its_tag_asks_is_found_so(sealed: Connection) -> None:
    found = plaintext_scan.scan_view(sealed, TAGGED_PATIENT)
    assert {each.column for each in found} == PHI
    assert sum(each.plain for each in found) == 0
    assert {each.column for each in found if each.values} == PHI - {"note"}
    assert plaintext_scan.scan_resources(sealed, "Patient") == [
        plaintext_scan.ColumnSample("resource_patient", "resource", 2, 0)
    ]


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("family", "O'Hara"),
        ("family", "gAAAAA O'Hara"),
        ("multiple", "2"),
        ("mrn", "gAAAAABMRN-1"),
        ("mrn_index", "MRN-1"),
        ("ssn", "078-05-1120"),
        ("born", "1980-02-29"),
        ("died", "2020-05-01"),
        ("note", "<div>O'Hara</div>"),
    ],
)
def test_one_value_in_the_clear_is_found_in_its_column(sealed: Connection, column: str, value: str) -> None:
    sealed.execute(f"UPDATE fhir.patient SET {column} = %s WHERE _resource_key = 'a'".encode(), [value])
    found = plaintext_scan.scan_view(sealed, TAGGED_PATIENT)
    assert [(each.column, each.plain) for each in found if each.plain] == [(column, 1)]


@pytest.mark.parametrize("change", ["resource = '{}'", "key_id = NULL"])
def test_a_resource_in_the_clear_is_found(sealed: Connection, change: str) -> None:
    sealed.execute(f"UPDATE fhir.resource SET {change} WHERE id = 'a'".encode())
    assert plaintext_scan.scan_resources(sealed, "Patient") == [
        plaintext_scan.ColumnSample("resource_patient", "resource", 2, 1)
    ]


def test_of_a_large_table_a_sample_is_looked_at(sealed: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    sealed.execute("INSERT INTO fhir.patient SELECT p.* FROM fhir.patient p, generate_series(1, 3000)")
    monkeypatch.setattr(plaintext_scan, "SAMPLE_PAGES", 20)
    [family] = [each for each in plaintext_scan.scan_view(sealed, TAGGED_PATIENT) if each.column == "family"]
    assert 0 < family.values < 1500
