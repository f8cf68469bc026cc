"""Errors of Postgres, the system, S3 and the network become a sentence, a kind and an exit code; defects stay."""

import errno
import socket
import sqlite3
import ssl
from pathlib import Path

import psycopg
import pytest
import requests
import sqlalchemy
from botocore.exceptions import ClientError, EndpointConnectionError
from dagster import DagsterExecutionInterruptedError
from psycopg_pool import PoolTimeout

from fhir_assets.errors import (
    ConfigurationError,
    DatabaseUnavailable,
    FhirAssetsError,
    FileMissing,
    OutOfResources,
    PermanentError,
    ServerUnavailable,
    StoreError,
    StoreForbidden,
    StoreFull,
    StoreUnavailable,
)
from fhir_assets.foreign_errors import choose_store_error, translate_error, translate_s3_error, was_interrupted
from fhir_assets.orchestration.instance.config import require_dagster_database
from fhir_assets.warehouse.postgres.db.connections import Connection, connect, normalise_url
from fhir_assets_tests.support.databases import dagster_instance, fresh_database


def refused(code: str, status: int = 403) -> ClientError:
    """Return the error of boto3 for an answer of S3."""
    return ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "PutObject")


def by_state(state: str) -> psycopg.Error:
    """Return the error of psycopg with a SQLSTATE."""
    return psycopg.errors.lookup(state)("Zaphod")


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (by_state("53100"), OutOfResources, "disk of Postgres is full"),
        (by_state("53200"), OutOfResources, "memory"),
        (by_state("53300"), DatabaseUnavailable, "max_connections"),
        (by_state("57P01"), DatabaseUnavailable, "shut down"),
        (by_state("57P02"), DatabaseUnavailable, "crashed"),
        (by_state("57P03"), DatabaseUnavailable, "starts, stops or recovers"),
        (by_state("57014"), DatabaseUnavailable, "statement_timeout"),
        (by_state("40P01"), DatabaseUnavailable, "deadlock"),
        (by_state("55P03"), DatabaseUnavailable, "lock"),
        (by_state("08006"), DatabaseUnavailable, "broke"),
        (by_state("58030"), DatabaseUnavailable, "its log"),
        (by_state("25006"), ConfigurationError, "read-only"),
        (by_state("42501"), ConfigurationError, "fhir_loader"),
        (by_state("42809"), ConfigurationError, "foreign table"),
        (by_state("42P01"), ConfigurationError, "fhir-assets migrate"),
        (by_state("22021"), ConfigurationError, "UTF8"),
        (by_state("26000"), ConfigurationError, "PgBouncer"),
        (by_state("XX001"), PermanentError, "damaged"),
        (psycopg.OperationalError("the connection is lost"), DatabaseUnavailable, "cannot be reached"),
        (psycopg.InterfaceError("closed"), DatabaseUnavailable, "cannot be reached"),
        (PoolTimeout("Zaphod"), DatabaseUnavailable, "cannot be reached"),
        (sqlalchemy.exc.OperationalError("INSERT", ("Zaphod",), by_state("53100")), OutOfResources, "disk"),
        (OSError(errno.ENOSPC, "full", "/Zaphod"), OutOfResources, "free space"),
        (OSError(errno.EDQUOT, "full"), OutOfResources, "quota"),
        (OSError(errno.EROFS, "read-only"), ConfigurationError, "Read-only file system"),
        (PermissionError(errno.EACCES, "denied", "/Zaphod"), ConfigurationError, "give the account"),
        (OSError(errno.EMFILE, "many"), OutOfResources, "ulimit -n"),
        (OSError(errno.EADDRINUSE, "port"), ConfigurationError, "port"),
        (MemoryError(), OutOfResources, "memory"),
        (ConnectionRefusedError(errno.ECONNREFUSED, "refused"), ServerUnavailable, "check the address"),
        (TimeoutError(), ServerUnavailable, "try again"),
        (socket.gaierror(-2, "Zaphod"), ServerUnavailable, "cannot be resolved"),
        (ssl.SSLCertVerificationError("Zaphod"), ConfigurationError, "certificate"),
        (requests.ConnectionError("http://x/Patient?name=Zaphod"), ServerUnavailable, "ConnectionError"),
        (refused("RequestTimeTooSkewed"), ConfigurationError, "clock"),
        (refused("AccessDenied"), StoreForbidden, "grant"),
        (refused("SignatureDoesNotMatch"), ConfigurationError, "credentials"),
        (refused("AuthorizationHeaderMalformed", 400), ConfigurationError, "AWS_DEFAULT_REGION"),
        (refused("SlowDown", 503), StoreUnavailable, "later"),
        (refused("XMinioStorageFull", 507), StoreFull, "full"),
        (refused("KMS.DisabledException", 400), ConfigurationError, "encryption key"),
        (refused("InvalidObjectState"), StoreError, "archived"),
        (refused("NoSuchKey", 404), FileMissing, "does not exist"),
        (EndpointConnectionError(endpoint_url="http://Zaphod"), StoreUnavailable, "cannot be reached"),
        (StoreFull("full"), StoreFull, "full"),
    ],
    ids=lambda value: value.__class__.__name__ if isinstance(value, BaseException) else "",
)
def test_an_error_of_another_program_is_told_by_its_kind(
    error: Exception, kind: type[FhirAssetsError], words: str
) -> None:
    known = translate_error(error)
    assert type(known) is kind
    assert words in str(known)
    assert "Zaphod" not in str(known)


def test_a_refusal_of_s3_that_is_not_about_rights_is_not_told_as_missing_rights() -> None:
    assert "grant" not in str(translate_s3_error(refused("SomethingNew"), action="write x", url="s3://b"))
    assert "SomethingNew" in str(translate_s3_error(refused("SomethingNew"), action="write x", url="s3://b"))


@pytest.mark.parametrize("error", [KeyError("x"), ValueError(), AssertionError(), by_state("22012"), by_state("42601")])
def test_a_defect_stays_a_defect(error: Exception) -> None:
    assert translate_error(error) is None


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (FhirAssetsError, 1),
        (PermanentError, 1),
        (ConfigurationError, 78),
        (DatabaseUnavailable, 75),
        (ServerUnavailable, 75),
        (OutOfResources, 75),
        (StoreError, 1),
        (StoreFull, 75),
        (StoreUnavailable, 75),
        (StoreForbidden, 78),
    ],
)
def test_a_kind_of_error_has_an_exit_code(kind: type[FhirAssetsError], code: int) -> None:
    assert kind.exit_code == code


def test_names_of_files_are_for_the_terminal_only() -> None:
    error = FileNotFoundError(errno.ENOENT, "missing", "/data/Zaphod.ndjson")
    assert "Zaphod" not in str(translate_error(error))
    assert str(translate_error(error, with_names=True)).startswith("/data/Zaphod.ndjson: ")


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOSPC, StoreFull),
        (errno.EROFS, StoreForbidden),
        (errno.EIO, StoreUnavailable),
        (errno.ENOENT, StoreError),
    ],
)
def test_an_error_of_the_folder_of_the_store_has_its_kind(number: int, kind: type[StoreError]) -> None:
    assert choose_store_error(OSError(number, "x")) is kind


def test_a_locked_database_of_sqlite_is_tried_again_later(tmp_path: object) -> None:
    with sqlite3.connect(f"{tmp_path}/a.db") as first, sqlite3.connect(f"{tmp_path}/a.db", timeout=0) as second:
        first.execute("BEGIN EXCLUSIVE")
        with pytest.raises(sqlite3.OperationalError) as caught:
            second.execute("CREATE TABLE a (b)")
    assert isinstance(translate_error(caught.value), OutOfResources)


def test_an_error_that_ctrl_c_caused_is_an_interruption() -> None:
    cleaned_up = psycopg.OperationalError("another command is already in progress")
    cleaned_up.__context__ = KeyboardInterrupt()
    assert was_interrupted(cleaned_up)
    assert was_interrupted(DagsterExecutionInterruptedError())
    assert not was_interrupted(psycopg.OperationalError())


@pytest.mark.parametrize(
    ("setting", "words"),
    [("default_transaction_read_only", "Let DB_URL name the primary"), ("transaction_read_only", "read-only")],
)
def test_a_statement_in_a_read_only_database_is_told(conn: Connection, setting: str, words: str) -> None:
    conn.execute(f"SET {setting} = on".encode())
    conn.commit() if setting.startswith("default") else None
    with pytest.raises(psycopg.Error) as caught:
        conn.execute("DELETE FROM ops.checkpoints")
    assert words in str(translate_error(caught.value))


def test_a_foreign_table_in_place_of_a_partition_is_told(conn: Connection) -> None:
    conn.execute("CREATE FOREIGN DATA WRAPPER nothing")
    conn.execute("CREATE SERVER elsewhere FOREIGN DATA WRAPPER nothing")
    conn.execute("CREATE FOREIGN TABLE elsewhere (id text) SERVER elsewhere")
    for statement in ("CREATE INDEX ON elsewhere (id)", "INSERT INTO elsewhere VALUES ('a')"):
        with pytest.raises(psycopg.Error) as caught, conn.transaction():
            conn.execute(statement.encode())
        assert isinstance(translate_error(caught.value), ConfigurationError), caught.value.sqlstate


@pytest.mark.parametrize("encoding", ["SQL_ASCII", "LATIN1"])
def test_a_database_of_another_encoding_is_refused(postgres: str, encoding: str) -> None:
    with fresh_database(postgres, "template0", encoding=encoding) as url:
        with pytest.raises(ConfigurationError, match=f"has the encoding {encoding}.*ENCODING 'UTF8'"):
            connect(url)


@pytest.mark.parametrize("encoding", ["SQL_ASCII", "LATIN1"])
def test_a_database_of_dagster_with_another_encoding_is_refused_by_name(
    postgres: str, encoding: str, tmp_path: Path
) -> None:
    with fresh_database(postgres, "template0", encoding=encoding) as url:
        told = f"Dagster's own database.*has the encoding {encoding}.*name it in DAGSTER_POSTGRES_URL"
        with pytest.raises(ConfigurationError, match=told):
            require_dagster_database(normalise_url(url, "psycopg2"))
        with pytest.raises(ConfigurationError, match=told):  # As Dagster's own processes open it.
            dagster_instance(tmp_path, url)


def test_the_encoding_of_the_environment_changes_no_text(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGCLIENTENCODING", "LATIN1")
    with connect(database) as conn:
        assert conn.execute("SELECT %s::text", ["Ω"]).fetchone() == ("Ω",)
