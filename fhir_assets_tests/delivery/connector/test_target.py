"""The server that a connector delivers to, and the database that it waits for."""

import logging
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from psycopg.conninfo import conninfo_to_dict
from typer.testing import CliRunner

from fhir_assets.cli import connector as commands
from fhir_assets.errors import ConfigurationError, DatabaseUnavailable
from fhir_assets.retries import RetryPolicy
from fhir_assets.warehouse.postgres.db.connections import normalise_url
from fhir_assets_tests.support.hospital import Hospital
from fhir_assets_tests.support.patient_server import PatientServer


def test_a_connector_has_a_server_and_an_account_of_its_own(hospital: Hospital, server: PatientServer) -> None:
    hospital.admit("1")
    own: dict[str, Any] = {"connector_url": server.url, "fhir_auth_token": "of-the-source"}
    with closing(hospital.connector(**own, connector_auth_username="c", connector_auth_password="p")) as connector:
        connector.run(until_empty=True)
    assert server.families() == {"made-1": "Test"}
    assert {request.headers["Authorization"] for request in server.requests} == {"Basic Yzpw"}
    assert hospital.patients() == {}


def test_no_credentials_of_the_source_reach_another_server(hospital: Hospital, server: PatientServer) -> None:
    hospital.admit("1")
    hospital.deliver(connector_url=server.url, fhir_auth_username="source", fhir_auth_password="secret")
    assert server.families() == {"made-1": "Test"}
    assert not any("Authorization" in request.headers for request in server.requests)


def test_an_invalid_server_is_named_by_its_own_setting(hospital: Hospital) -> None:
    with pytest.raises(ConfigurationError, match="CONNECTOR_URL must be an address"):
        hospital.connector(connector_url="fhir.example.org")
    with pytest.raises(ConfigurationError, match="CONNECTOR_URL is not set"):
        hospital.connector(fhir_base_url="")


@pytest.fixture
def absent_database(hospital: Hospital, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Point DB_URL to a socket folder that does not exist, and return its path."""
    parameters = conninfo_to_dict(normalise_url(hospital.url))
    folder = tmp_path / "sockets"
    monkeypatch.setenv("DB_URL", f"postgresql://{parameters['user']}@/{parameters['dbname']}?host={folder}")
    monkeypatch.setenv("FHIR_BASE_URL", hospital.server.url)
    monkeypatch.setenv("METRICS_PORT", "0")
    return folder


class FirstRecord(logging.Handler):
    """Call a function at the first record of a logger, and keep the messages of all records."""

    def __init__(self, act: Callable[[], None]) -> None:
        super().__init__()
        self.messages: list[str] = []
        self._act = act

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the message."""
        self.messages.append(record.getMessage())
        if len(self.messages) == 1:
            self._act()


def test_a_connector_that_starts_before_its_database_waits_for_it(
    hospital: Hospital, absent_database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hospital.admit("1")
    target = str(conninfo_to_dict(normalise_url(hospital.url))["host"])
    waits = FirstRecord(lambda: absent_database.symlink_to(target))
    monkeypatch.setattr(commands, "DATABASE_WAIT", RetryPolicy(first_wait=0.01, max_wait=0.01, budget=60))
    logger = logging.getLogger(commands.__name__)
    logger.addHandler(waits)
    try:
        result = CliRunner().invoke(commands.app, ["run", "--until-empty"], catch_exceptions=False)
    finally:
        logger.removeHandler(waits)
    assert result.exit_code == 0
    assert waits.messages == ["waiting for the database"]
    assert set(hospital.patients()) == {"1"}


def test_a_database_that_stays_away_is_one_clear_error(absent_database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "DATABASE_WAIT", RetryPolicy(first_wait=0.01, max_wait=0.01, budget=0.03))
    with pytest.raises(DatabaseUnavailable, match="cannot be reached"):
        CliRunner().invoke(commands.app, ["run"], catch_exceptions=False)
