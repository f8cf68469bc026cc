"""The Dagster instance of a deployment: its ``dagster.yaml``, its database, and the environment of its processes."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from fhir_assets.atomic_files import replace_content
from fhir_assets.errors import ConfigurationError
from fhir_assets.file_modes import create_folders, create_home, narrow_folder
from fhir_assets.settings import Executor, Settings
from fhir_assets.warehouse.postgres.db import connections, embedded

if TYPE_CHECKING:
    import dagster as dg

_CELERY: dict[str, Any] = {
    "run_launcher": {
        "module": "fhir_assets.orchestration.instance.celery_launcher",
        "class": "Launcher",
        "config": {
            "default_queue": "dagster",
            "broker": {"env": "CELERY_BROKER_URL"},
            "backend": {"env": "CELERY_BROKER_URL"},
        },
    },
    # A run waits in the broker until a worker is free. If a worker dies before it starts the run, the broker gives the
    # run to another worker.
    "run_monitoring": {"start_timeout_seconds": 30 * 24 * 3600},
}
CHECKED_DAGSTER_DATABASES: set[str] = set()
"""The URLs of Dagster's database that this process has found usable; Dagster opens it more than once."""

_LAUNCHERS: dict[Executor, dict[str, Any]] = {Executor.CELERY: _CELERY}


def find_dagster_yaml() -> Path:
    """Return the path of the project's ``dagster.yaml``. Raises ConfigurationError if it does not exist."""
    return _find_file("dagster.yaml")


def find_workspace_yaml() -> Path:
    """Return the path of the project's ``workspace.yaml``, which names the code location. Raises ConfigurationError."""
    return _find_file("workspace.yaml")


def _find_file(name: str) -> Path:
    """Return the path of a file that is next to the package in a checkout, and inside it in a wheel."""
    package = Path(__file__).resolve().parents[2]
    for candidate in (package / name, package.parent / name):
        if candidate.exists():
            return candidate
    raise ConfigurationError(f"{name} is missing from the installation: install fhir-assets again")


def render_dagster_yaml(settings: Settings) -> str:
    """Return the text of a deployment's ``dagster.yaml``: the project's, with the run launcher of FHIR_EXECUTOR."""
    text = find_dagster_yaml().read_text()
    changes = _LAUNCHERS.get(settings.fhir_executor)
    if changes is None:
        return text
    config = yaml.safe_load(text)
    for section, values in changes.items():
        config[section] = {**config.get(section, {}), **values}
    return str(yaml.safe_dump(config, sort_keys=False))


def build_environment(settings: Settings) -> dict[str, str]:
    """Return the environment of this process, extended by the variables that a Dagster process needs.

    DAGSTER_HOME and DAGSTER_POSTGRES_URL are kept if they are set. Otherwise DAGSTER_HOME is a folder of
    FHIR_ASSETS_HOME with a ``dagster.yaml``, and Dagster's tables are in a database ``dagster`` on the server of
    DB_URL or, without DB_URL, on the embedded Postgres, which this function starts. Raises DatabaseUnavailable
    and ConfigurationError.
    """
    variables = dict(os.environ)
    if not variables.get("DAGSTER_HOME"):
        home = settings.home / "dagster"
        create_home(settings.home)
        create_folders(home)
        narrow_folder(home)
        _write_dagster_yaml(home / "dagster.yaml", render_dagster_yaml(settings).encode())
        variables["DAGSTER_HOME"] = str(home)
    variables["DAGSTER_POSTGRES_URL"] = find_dagster_url(settings)
    if settings.fhir_executor is Executor.CELERY:
        variables["CELERY_BROKER_URL"] = settings.require_broker()
    variables.setdefault("DAGSTER_EVENT_BATCH_SIZE", "100")
    return variables


def _write_dagster_yaml(path: Path, content: bytes) -> None:
    """Write the file if it differs. Other processes read it at any time: without it, Dagster uses a SQLite database."""
    if not path.exists() or path.read_bytes() != content:
        replace_content(path, content)


def open_instance(settings: Settings) -> "dg.DagsterInstance":
    """Open the Dagster instance and set its environment variables in this process.

    Raises DatabaseUnavailable if its storage cannot be reached, and ConfigurationError as ``require_dagster_database``.
    """
    os.environ.update(build_environment(settings))
    require_dagster_database(os.environ["DAGSTER_POSTGRES_URL"])
    from dagster import DagsterInstance  # Commands that execute no run do not import Dagster.

    return DagsterInstance.get()


def require_dagster_database(url: str) -> None:
    """Check that Dagster's own database can be used. Raises as ``connect_to_dagster_database`` does."""
    connect_to_dagster_database(url).close()
    CHECKED_DAGSTER_DATABASES.add(url)


def connect_to_dagster_database(url: str) -> connections.Connection:
    """Connect to Dagster's own database, to read what Dagster's Python classes would take a second to be imported for.

    Raises DatabaseUnavailable if it cannot be reached, and ConfigurationError if it refuses the connection, is too old
    or has another encoding than UTF8.
    """
    try:
        return connections.connect(url)
    except ConfigurationError as error:
        told = str(error).replace("DB_URL", "DAGSTER_POSTGRES_URL")
        raise ConfigurationError(
            "Dagster's own database (DAGSTER_POSTGRES_URL, or `dagster` on the server of DB_URL) cannot be used. "
            f"{told}"
        ) from None


def find_dagster_url(settings: Settings) -> str:
    """Return DAGSTER_POSTGRES_URL with its password; if it is unset, the URL of the settings' database ``dagster``.

    The database is created if it does not exist, and the embedded Postgres is started. Raises DatabaseUnavailable.
    """
    return settings.find_dagster_url() or connections.normalise_url(ensure_dagster_database(settings), "psycopg2")


def ensure_dagster_database(settings: Settings) -> str:
    """Return the URL of the database ``dagster``. Create the database if it does not exist.

    Raises DatabaseUnavailable.
    """
    if settings.db_url is None:
        return embedded.ensure(settings.home, embedded.DAGSTER_DATABASE, port=settings.fhir_postgres_port)
    url = settings.db_url.get_secret_value()
    connections.ensure_database(url, embedded.DAGSTER_DATABASE)
    return connections.with_database(url, embedded.DAGSTER_DATABASE)
