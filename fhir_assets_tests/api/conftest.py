"""Fixtures that start the HTTP API on a test's own database and folders."""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from fhir_assets.settings import load_settings
from fhir_assets.warehouse.postgres.db.connections import connect
from fhir_assets_tests.support.api import Api, Serve, api_in_threads, api_process, api_processes, api_settings
from fhir_assets_tests.support.database_users import user as user
from fhir_assets_tests.support.databases import fresh_database


@pytest.fixture
def serve_in_threads(database: str, tmp_path: Path) -> Iterator[Serve]:
    """A function that serves the API, with settings by name, from threads of this process."""
    with ExitStack() as running:

        def start(**more: object) -> Api:
            (tmp_path / "landing").mkdir(exist_ok=True)
            return running.enter_context(api_in_threads(load_settings(**api_settings(database, tmp_path, more))))

        yield start


@pytest.fixture
def serve(database: str, tmp_path: Path) -> Iterator[Serve]:
    """A function that starts `fhir-assets api` with settings by name."""
    with api_processes(database, tmp_path) as start:
        yield start


@pytest.fixture(scope="module")
def shared_api(postgres: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """One process for the tests of a module, because its start takes longer than a test."""
    folder = tmp_path_factory.mktemp("api")
    (folder / "landing").mkdir()
    with (
        fresh_database(postgres) as database,
        api_process(api_settings(database, folder, {}), folder) as api,
    ):
        yield api


@pytest.fixture
def api(shared_api: Api) -> Api:
    """The module's API without any received record."""
    assert shared_api.settings.db_url
    with connect(shared_api.settings.db_url.get_secret_value()) as conn:
        conn.execute("TRUNCATE ops.received, ops.idempotency")
    shutil.rmtree(Path(shared_api.settings.store_url) / "raw", ignore_errors=True)
    shared_api.log.write_bytes(b"")
    return shared_api
