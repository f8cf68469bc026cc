"""Fixtures for all tests: one real Postgres for the session, a migrated database for each test, and an S3 server."""

import logging
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from fhir_assets.logs import JsonFormatter
from fhir_assets.privacy.encryption import NO_ENCRYPTION
from fhir_assets.warehouse.postgres.db import embedded
from fhir_assets.warehouse.postgres.db.connections import Session, connect
from fhir_assets_tests.support.databases import ensure_template, fresh_database

# No example has a time limit: machines are busy. CI generates the same examples in every run, so that its verdict is
# repeatable; other runs generate new ones.
settings.register_profile("project", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "project")

_HOME = "FHIR_ASSETS_TEST_HOME"
_UMASK = os.umask(0o022)
os.umask(_UMASK)
_DATABASES_BYTES = 4 * 2**30


def pytest_configure(config: pytest.Config) -> None:
    """Create one home for all xdist workers, which inherit the environment of the controller."""
    if not hasattr(config, "workerinput"):
        home = tempfile.mkdtemp(prefix="fhir_assets_test_", dir=_find_memory_folder())
        Path(home).chmod(0o711)
        os.environ[_HOME] = home


def _find_memory_folder() -> Path | None:
    """Return a folder in memory with enough space for the databases of the tests, or None.

    Each test copies a thousand files of the template database, which takes 20 times as long on a disk.
    """
    memory = Path("/dev/shm")
    has_space = memory.is_dir() and shutil.disk_usage(memory).free > _DATABASES_BYTES
    return memory if has_space and os.access(memory, os.W_OK) else None


def pytest_runtest_teardown() -> None:
    """Restore the umask, which an entry point restricts, and remove the log handlers that a test configured.

    The handlers write to streams of pytest that are closed after the test.
    """
    os.umask(_UMASK)
    project_logger = logging.getLogger("fhir_assets")
    for logger in (logging.getLogger(), project_logger):
        logger.handlers[:] = [
            handler for handler in logger.handlers if not isinstance(handler.formatter, JsonFormatter)
        ]
    project_logger.propagate = True


def pytest_unconfigure(config: pytest.Config) -> None:
    """Stop the shared Postgres and remove the home, in the controller, which ends after its workers."""
    if not hasattr(config, "workerinput") and (home := os.environ.pop(_HOME, None)):
        if (Path(home) / "postgres").exists():
            embedded.stop(Path(home))
        shutil.rmtree(home, ignore_errors=True)


@pytest.fixture(scope="session")
def postgres() -> str:
    """The URL of the session's embedded Postgres. Its template database is migrated and has Dagster's tables."""
    home = Path(os.environ[_HOME])
    url = embedded.ensure(home)
    ensure_template(url, home / "dagster")
    return url


@pytest.fixture
def empty_database(postgres: str) -> Iterator[str]:
    """The URL of a fresh database without any schema of the project."""
    with fresh_database(postgres, "template0") as url:
        yield url


@pytest.fixture
def database(postgres: str) -> Iterator[str]:
    """The URL of a fresh, migrated database."""
    with fresh_database(postgres) as url:
        yield url


@pytest.fixture
def conn(database: str) -> Iterator[Session]:
    """A session without encryption in the test's own database."""
    with connect(database, cipher=NO_ENCRYPTION) as session:
        yield session


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The URL of an S3 server (moto) over HTTP."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_url(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The ``s3://…`` URL of a prefix in a fresh bucket; the environment variables that boto3 reads are set."""
    import boto3

    for name, value in {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    name = f"bucket-{uuid.uuid4().hex}"
    boto3.client("s3").create_bucket(Bucket=name)
    return f"s3://{name}/some/prefix"
