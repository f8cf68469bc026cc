"""`fhir-assets worker`: execute Dagster runs from a Celery broker, one at a time."""

import os
import socket
from typing import Annotated

import typer

from fhir_assets.errors import ConfigurationError
from fhir_assets.orchestration.instance import config
from fhir_assets.settings import load_settings


def worker(
    name: Annotated[str | None, typer.Option(help="Name in the logs; default: host name and process id")] = None,
) -> None:
    """Execute Dagster runs from the queue at CELERY_BROKER_URL until stopped; for FHIR_EXECUTOR=celery.

    Each worker executes one run at a time. Start any number, on machines that can reach the broker, Postgres and the
    store. After SIGTERM a worker finishes its current run.
    """
    settings = load_settings()
    broker = settings.require_broker()
    try:
        from fhir_assets.orchestration.instance.celery_launcher import QUEUE, build_app
        from fhir_assets.orchestration.instance.lost_messages import keeps_messages
    except ImportError:
        raise ConfigurationError("Workers need dagster-celery: run pip install 'fhir-assets[celery]'") from None
    os.environ.update({**config.build_environment(settings), "CELERY_BROKER_URL": broker})
    name = name or f"{socket.gethostname()}-{os.getpid()}"
    celery = build_app(settings)
    try:
        is_kept = keeps_messages(celery)
    except Exception:
        is_kept = None  # The worker itself waits for a broker that cannot be reached yet, and says so.
    if is_kept is False:
        typer.echo(
            "The broker keeps its messages in memory only: runs that wait in it are sent again within minutes after "
            "its restart. Set `appendonly yes` in its configuration to keep them.",
            err=True,
        )
    celery.worker_main(
        ["worker", "--pool", "solo", "--queues", QUEUE, "--hostname", f"{name}@%h", "--loglevel", settings.log_level]
    )
