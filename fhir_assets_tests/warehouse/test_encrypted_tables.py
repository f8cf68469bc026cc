"""Tables of a deployment with keys: tagged columns are encrypted, all other columns are unchanged."""

from collections.abc import Iterator

import pytest

from fhir_assets.errors import ConfigurationError, ViewError
from fhir_assets.fhir.views import View, parse_view
from fhir_assets.privacy.encryption import NO_ENCRYPTION, Cipher
from fhir_assets.privacy.keys import new_key, parse_keys
from fhir_assets.privacy.places import value_place
from fhir_assets.warehouse.ops import dead_letters, encryption_secret
from fhir_assets.warehouse.ops.dead_letters import DeadLetter
from fhir_assets.warehouse.postgres import resources
from fhir_assets.warehouse.postgres.db.connections import Connection, Session, cipher_of, connect
from fhir_assets.warehouse.postgres.tables.view_tables import apply_changes, ensure_tables
from fhir_assets_tests.support.encrypted_views import PATIENT_WITH_PHI, TAGGED_PATIENT, tagged_column
from fhir_assets_tests.support.views import load, select, view

KEY = new_key()


@pytest.fixture
def encrypted(database: str) -> Iterator[Connection]:
    with connect(database) as conn:
        cipher = encryption_secret.unlock(conn, Cipher(parse_keys([KEY])))
    with connect(database, cipher=cipher) as conn:
        yield conn


def test_every_tag_has_its_treatment(encrypted: Session) -> None:
    load(encrypted, PATIENT_WITH_PHI, views=(TAGGED_PATIENT,))
    cipher = cipher_of(encrypted)
    [(family, mrn, mrn_index, ssn, born, precision, died, multiple, note, gender)] = select(
        encrypted,
        "SELECT family, mrn, mrn_index, ssn, born::text, born_precision, died::text, multiple, note, gender"
        " FROM fhir.patient",
    )
    values = {"family": (family, "O'Hara\t\\N"), "mrn": (mrn, "MRN-1"), "multiple": (multiple, "2")}
    for name, (token, value) in values.items():
        assert cipher.decrypt_token(token, value_place("patient", name, "default", "a")) == value
    assert mrn_index == cipher.index("MRN-1")
    assert ssn == cipher.index("078-05-1120")
    assert (born, precision, died) == ("1980-01-01", "year", "2020-01-01 00:00:00+00")
    assert (note, gender) == (None, "female")


def test_a_resource_is_encrypted_and_decrypts_to_the_same_bytes(encrypted: Session) -> None:
    load(encrypted, PATIENT_WITH_PHI, views=(TAGGED_PATIENT,))
    [(kind, text, key_id)] = select(
        encrypted, "SELECT jsonb_typeof(resource), resource::text, key_id FROM fhir.resource"
    )
    assert (kind, key_id) == ("string", cipher_of(encrypted).key_id)
    assert "MRN" not in text
    resource = resources.read(encrypted, "Patient", "a")
    assert resource is not None
    assert resource.body == PATIENT_WITH_PHI.body
    assert resources.read(encrypted, "Patient", "b") is None
    assert [stored.body for stored in resources.stream_type(encrypted, "Patient")] == [PATIENT_WITH_PHI.body]


def test_a_dead_letter_is_encrypted_and_a_repeated_failure_is_the_same_row(encrypted: Session) -> None:
    dead_letter = DeadLetter(
        "Patient", "a", "validate", "structure", "Patient", "wrong", PATIENT_WITH_PHI.body, "2024-01-01"
    )
    for run in ("one", "two"):
        dead_letters.record(encrypted, run, [dead_letter])
    [(number, attempts, stored)] = select(encrypted, "SELECT id, attempts, resource FROM ops.dead_letters")
    assert attempts == 2
    assert b"MRN" not in stored
    assert dead_letter.fingerprint(cipher_of(encrypted)) != dead_letter.fingerprint(NO_ENCRYPTION)
    assert dead_letters.read_resource(encrypted, number) == PATIENT_WITH_PHI.body


def test_without_keys_no_column_is_encrypted(conn: Session) -> None:
    load(conn, PATIENT_WITH_PHI, views=(TAGGED_PATIENT,))
    assert select(conn, "SELECT mrn, ssn, born::text, multiple FROM fhir.patient") == [
        ("MRN-1", "078-05-1120", "1980-02-29", 2)
    ]


def test_the_error_after_keys_are_set_names_the_command_that_changes_the_table(database: str) -> None:
    with connect(database, cipher=NO_ENCRYPTION) as conn:
        load(conn, PATIENT_WITH_PHI, views=(TAGGED_PATIENT,))
        cipher = encryption_secret.unlock(conn, Cipher(parse_keys([KEY])))
    with connect(database, cipher=cipher) as conn:
        with pytest.raises(ViewError, match=r"multiple is integer .* but text .*keys rotate"):
            ensure_tables(conn, [TAGGED_PATIENT])
        conn.rollback()
        apply_changes(conn, [TAGGED_PATIENT])
        load(conn, PATIENT_WITH_PHI, views=(TAGGED_PATIENT,))
        assert select(conn, "SELECT mrn_index FROM fhir.patient") == [(cipher.index("MRN-1"),)]


def test_an_encrypted_database_cannot_be_unlocked_without_its_key(database: str) -> None:
    cipher = Cipher(parse_keys([KEY]))
    with connect(database) as conn:
        encryption_secret.unlock(conn, cipher)
        with pytest.raises(ConfigurationError, match="PHI_ENCRYPTION_KEYS is not set"):
            encryption_secret.unlock(conn, NO_ENCRYPTION)
        with pytest.raises(ConfigurationError, match=f"encrypted with key {cipher.keys[0].id}, which is not in PHI"):
            encryption_secret.unlock(conn, Cipher(parse_keys([new_key()])))
        both = Cipher(parse_keys([new_key(), KEY]))
        assert encryption_secret.unlock(conn, both).index("x") == encryption_secret.unlock(conn, cipher).index("x")
        assert encryption_secret.reencrypt(conn, both)
        assert not encryption_secret.reencrypt(conn, both)
        assert encryption_secret.unlock(conn, Cipher(both.keys[:1])).index("x") == encryption_secret.unlock(
            conn, both
        ).index("x")


def test_an_unknown_tag_is_refused(encrypted: Session) -> None:
    wrong: View = parse_view(view("w", "Patient", tagged_column("x", "gender", "code", phi="hide")).definition)
    with pytest.raises(ViewError, match="tag phi is hide"):
        ensure_tables(encrypted, [wrong])
