"""`fhir-assets worker`: takes the deployment's runs from the broker, one after the other."""

import os
import socket
from typing import Annotated

import typer

from fhir_assets.errors import ConfigurationError
from fhir_assets.orchestration.instance import config
from fhir_assets.settings import load_settings


def worker(
    name: Annotated[str | None, typer.Option(help="What it is called in the logs; unset: host and process")] = None,
) -> None:
    """Work for FHIR_EXECUTOR=celery: takes Dagster runs from CELERY_BROKER_URL until it is stopped.

    Start as many as there is room for, on any machine that reaches the broker, Postgres and the store. SIGTERM lets it
    finish the run it is at.
    """
    settings = load_settings()
    broker = settings.require_broker()
    try:
        from fhir_assets.orchestration.instance.celery_launcher import QUEUE, build_app
    except ImportError:
        raise ConfigurationError("Workers need dagster-celery: pip install 'fhir-assets[celery]'") from None
    os.environ.update({**config.build_environment(settings), "CELERY_BROKER_URL": broker})
    name = name or f"{socket.gethostname()}-{os.getpid()}"
    build_app(settings).worker_main(
        ["worker", "--pool", "solo", "--queues", QUEUE, "--hostname", f"{name}@%h", "--loglevel", settings.log_level]
    )
