"""`fhir-assets metrics`: serve the metrics of the database for Prometheus, without the connector or the API."""

import signal
from threading import Event

from fhir_assets.cli.output import console
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.errors import ConfigurationError
from fhir_assets.metrics.exposition import serve_metrics
from fhir_assets.metrics.pipeline import register_database_metrics
from fhir_assets.settings import load_settings


def metrics() -> None:
    """Serve the metrics of windows, runs, checks, dead letters and the outbox until SIGTERM or Ctrl-C.

    Prometheus scrapes http://METRICS_HOST:METRICS_PORT/metrics. The database is read when it scrapes.
    """
    settings = load_settings()
    if settings.metrics_port == 0:
        raise ConfigurationError("METRICS_PORT is 0, so that no metrics are served: set it to a port, for example 9464")
    warehouse = Warehouse(settings)
    warehouse.url()
    stop = Event()
    for sign in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sign, lambda *_: stop.set())
    with (
        register_database_metrics(settings, warehouse.connect),
        serve_metrics(settings.metrics_host, settings.metrics_port) as port,
    ):
        if port is None:
            raise ConfigurationError(
                f"METRICS_PORT: cannot listen on {settings.metrics_host}:{settings.metrics_port}. Set another port, or "
                "stop the process that listens there"
            )
        console.print(f"Metrics: http://{settings.metrics_host}:{port}/metrics  (Ctrl-C stops it)", markup=False)
        stop.wait()
