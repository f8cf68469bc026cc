"""The Dagster instance of a deployment: DAGSTER_HOME, its storage, its processes' environment."""

import os
from pathlib import Path
from typing import Any

import dagster as dg
import yaml

from fhir_assets.errors import ConfigurationError
from fhir_assets.settings import Executor, Settings
from fhir_assets.warehouse.postgres.db import connections, embedded

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
    # A run waits in the broker until a worker is free, and a worker that dies as it begins gives it back.
    "run_monitoring": {"start_timeout_seconds": 30 * 24 * 3600},
}
_LAUNCHERS: dict[Executor, dict[str, Any]] = {Executor.CELERY: _CELERY}


def find_dagster_yaml() -> Path:
    """The project's ``dagster.yaml``: beside the package in a checkout, inside it in a wheel."""
    here = Path(__file__).resolve().parents[2]
    for candidate in (here / "dagster.yaml", here.parent / "dagster.yaml"):
        if candidate.exists():
            return candidate
    raise ConfigurationError("dagster.yaml is missing from the installation: install fhir-assets again")


def render_dagster_yaml(settings: Settings) -> str:
    """The ``dagster.yaml`` of a deployment: the project's, with the launcher of its FHIR_EXECUTOR."""
    text = find_dagster_yaml().read_text()
    changes = _LAUNCHERS.get(settings.fhir_executor)
    if changes is None:
        return text
    config = yaml.safe_load(text)
    for section, values in changes.items():
        config[section] = {**config.get(section, {}), **values}
    return str(yaml.safe_dump(config, sort_keys=False))


def build_environment(settings: Settings) -> dict[str, str]:
    """What every Dagster process needs in its environment: DAGSTER_HOME and where its storage is.

    A DAGSTER_HOME that is set already is kept. Starts the embedded Postgres where there is no DB_URL; with a DB_URL
    Dagster's tables live in a database ``dagster`` beside the project's, unless DAGSTER_POSTGRES_URL says otherwise.
    """
    found = dict(os.environ)
    if "DAGSTER_HOME" not in found:
        home = settings.home / "dagster"
        home.mkdir(parents=True, exist_ok=True)
        (home / "dagster.yaml").write_text(render_dagster_yaml(settings))
        found["DAGSTER_HOME"] = str(home)
    if "DAGSTER_POSTGRES_URL" not in found:
        found["DAGSTER_POSTGRES_URL"] = connections.normalise_url(ensure_dagster_database(settings), "psycopg2")
    if settings.fhir_executor is Executor.CELERY:
        found["CELERY_BROKER_URL"] = settings.require_broker()
    found.setdefault("DAGSTER_EVENT_BATCH_SIZE", "100")
    return found


def open_instance(settings: Settings) -> dg.DagsterInstance:
    """The Dagster instance, for this process. Raises DatabaseUnavailable if its storage cannot be reached."""
    os.environ.update(build_environment(settings))
    connections.connect(os.environ["DAGSTER_POSTGRES_URL"]).close()
    return dg.DagsterInstance.get()


def ensure_dagster_database(settings: Settings) -> str:
    """The URL of the database ``dagster`` beside the project's, created if need be. Raises DatabaseUnavailable."""
    if settings.db_url is None:
        return embedded.ensure(settings.home, embedded.DAGSTER_DATABASE)
    url = settings.db_url.get_secret_value()
    connections.ensure_database(url, embedded.DAGSTER_DATABASE)
    return connections.with_database(url, embedded.DAGSTER_DATABASE)
