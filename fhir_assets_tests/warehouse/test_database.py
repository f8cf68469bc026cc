"""Connections: every failure is one sentence without the password, and patient data needs an explicit cipher."""

import pytest

from fhir_assets.errors import ConfigurationError, DatabaseUnavailable, FhirAssetsError, MissingCipher
from fhir_assets.privacy.encryption import NO_ENCRYPTION, Cipher
from fhir_assets.privacy.keys import new_key, parse_keys
from fhir_assets.warehouse.ops import dead_letters
from fhir_assets.warehouse.ops.dead_letters import DeadLetter
from fhir_assets.warehouse.postgres.db.connections import cipher_of, connect, normalise_url, with_database


def test_a_connection_speaks_utc(database: str) -> None:
    with connect(database) as conn:
        assert conn.execute("SHOW timezone").fetchone() == ("UTC",)


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg", "postgresql+psycopg2"])
def test_urls_of_every_library_are_understood(database: str, scheme: str) -> None:
    with connect(database.replace("postgresql", scheme)) as conn:
        assert conn.execute("SELECT 1").fetchone() == (1,)


def test_urls_are_rewritten_for_sqlalchemy() -> None:
    assert normalise_url("postgres://u@h/d", "psycopg2") == "postgresql+psycopg2://u@h/d"


@pytest.mark.parametrize(
    ("url", "error", "words"),
    [
        ("postgresql://me:hunter2@127.0.0.1:1/db", DatabaseUnavailable, "cannot be reached"),
        ("postgresql://me:hunter2@no-such-host.invalid/db", DatabaseUnavailable, "cannot be reached"),
        ("mysql://me:hunter2@h/db", ConfigurationError, "must look like"),
        ("postgresql://me:hunter2@h:port/db", FhirAssetsError, "DB_URL"),
    ],
)
def test_a_failure_says_what_to_do_without_the_password(url: str, error: type[FhirAssetsError], words: str) -> None:
    with pytest.raises(error, match=words) as exc_info:
        connect(url, timeout=2)
    assert "hunter2" not in str(exc_info.value)
    assert exc_info.value.__cause__ is None


def test_a_missing_database_and_an_unknown_user_are_told_apart_from_a_server_that_is_down(postgres: str) -> None:
    for url in (with_database(postgres, "nowhere"), postgres.replace("postgres@", "stranger:hunter2@")):
        with pytest.raises(ConfigurationError, match="does not exist there") as exc_info:
            connect(url)
        assert "hunter2" not in str(exc_info.value)


def test_a_plain_connection_has_no_cipher(database: str) -> None:
    with connect(database) as conn, pytest.raises(MissingCipher, match=r"open it through Warehouse\.connect"):
        cipher_of(conn)


@pytest.mark.parametrize("cipher", [NO_ENCRYPTION, Cipher(parse_keys([new_key()]))])
def test_a_session_carries_the_cipher_that_it_was_opened_with(database: str, cipher: Cipher) -> None:
    with connect(database, cipher=cipher) as session:
        assert cipher_of(session) is cipher


def test_a_dead_letter_is_not_recorded_through_a_plain_connection(database: str) -> None:
    dead_letter = DeadLetter("Patient", "a", "validate", "structure", "Patient", "wrong", b"{}", "2024-01-01")
    with connect(database) as conn, pytest.raises(MissingCipher):
        dead_letters.record(conn, "run", [dead_letter])  # type: ignore[arg-type]
    with connect(database) as conn:
        assert conn.execute("SELECT count(*) FROM ops.dead_letters").fetchone() == (0,)
