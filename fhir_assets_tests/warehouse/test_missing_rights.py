"""A process whose login lacks a right says which login, and which right."""

import os
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest

from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.errors import ConfigurationError
from fhir_assets.foreign_errors import translate_error
from fhir_assets.privacy.encryption import NO_ENCRYPTION
from fhir_assets.settings import load_settings
from fhir_assets.warehouse.postgres.db import role_rights
from fhir_assets.warehouse.postgres.db.connections import connect, connection_pool
from fhir_assets_tests.support.database_users import User
from fhir_assets_tests.support.databases import dagster_instance


def find_login(url: str) -> str:
    return url.partition("@")[0].rpartition("/")[2]


def read_consents(kind: str, url: str, other: str) -> None:
    """Read a table that the login may not read, with each kind of connection."""
    if kind == "connection":
        with connect(url) as conn:
            conn.execute("SELECT FROM ops.consents")
    elif kind == "beside another":
        with connect(url) as conn, connect(other), conn.transaction():
            conn.execute("SELECT FROM ops.consents")
    elif kind == "warehouse":
        with Warehouse(load_settings(db_url=url)).connect() as session:
            session.execute("SELECT FROM ops.consents")
    else:
        with connection_pool(url, cipher=NO_ENCRYPTION) as pool, pool.connection() as session:
            session.execute("SELECT FROM ops.consents")


@pytest.mark.parametrize("kind", ["connection", "beside another", "warehouse", "pool"])
def test_the_message_names_the_login_and_what_it_may_not(kind: str, database: str, user: User) -> None:
    url = user(role_rights.OPERATOR)
    with pytest.raises(psycopg.errors.InsufficientPrivilege) as caught:
        read_consents(kind, url, database)
    error = translate_error(caught.value)
    assert isinstance(error, ConfigurationError)
    assert f"the login {find_login(url)} lacks a right in Postgres: permission denied for table consents" in str(error)


def test_a_refusal_of_a_trigger_is_not_repeated_because_it_may_quote_a_row(database: str) -> None:
    with pytest.raises(psycopg.errors.InsufficientPrivilege) as caught, connect(database) as conn:
        conn.execute("DO $$ BEGIN RAISE 'Chalmers, Peter' USING ERRCODE = 'insufficient_privilege'; END $$")
    assert "Chalmers" not in str(translate_error(caught.value))
    assert "the login postgres lacks a right in Postgres." in str(translate_error(caught.value))


def test_an_error_of_dagsters_storage_names_its_login(database: str, user: User, tmp_path: Path) -> None:
    url = user(role_rights.CONNECTOR)
    with pytest.raises(Exception) as caught, dagster_instance(tmp_path, url) as instance:  # noqa: PT011
        instance.get_runs()
    error = translate_error(caught.value)
    assert isinstance(error, ConfigurationError)
    assert f"the login {find_login(url)} lacks a right in Postgres: permission denied" in str(error)


@pytest.mark.parametrize(
    ("role", "command", "right"),
    [
        (role_rights.LOADER, ("migrate",), ""),
        (role_rights.LOADER, ("connector", "install"), "may not create tables and triggers in schema health"),
        (role_rights.API, ("roles",), "is not the owner of all schemas and tables"),
        (role_rights.OPERATOR, ("sources", "start-anew", "--yes"), ""),
        (role_rights.DAGSTER, ("runs", "list"), "has no rights to schema ops"),
        (role_rights.AUDITOR, ("dead-letters", "list"), "permission denied for table dead_letters"),
    ],
)
def test_a_command_with_the_login_of_another_process_ends_with_the_code_of_configuration(
    role: str, command: tuple[str, ...], right: str, database: str, user: User, tmp_path: Path
) -> None:
    url = user(role)
    environment = {**os.environ, "DB_URL": url, "FHIR_ASSETS_HOME": str(tmp_path)}
    result = subprocess.run(
        [Path(sys.executable).with_name("fhir-assets"), *command], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 78
    assert "defect" not in result.stderr
    assert right in result.stderr
    assert find_login(url) in result.stderr
