"""Every way a connection can fail ends in one sentence without the password."""

import pytest

from fhir_assets.errors import ConfigurationError, DatabaseUnavailable, FhirAssetsError
from fhir_assets.warehouse.postgres.db.connections import connect, normalise_url, with_database


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
    with pytest.raises(error, match=words) as caught:
        connect(url, timeout=2)
    assert "hunter2" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_a_missing_database_and_an_unknown_user_are_told_apart_from_a_server_that_is_down(postgres: str) -> None:
    for url in (with_database(postgres, "nowhere"), postgres.replace("postgres@", "stranger:hunter2@")):
        with pytest.raises(ConfigurationError, match="does not exist there") as caught:
            connect(url)
        assert "hunter2" not in str(caught.value)
