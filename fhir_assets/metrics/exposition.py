"""The registry of the process's metrics, and the HTTP endpoint that Prometheus scrapes."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector

from fhir_assets.metrics.server import listen

REGISTRY = CollectorRegistry()

_log = logging.getLogger(__name__)


def render_metrics(*collectors: Collector) -> tuple[bytes, str]:
    """Return the metrics of the registry and of ``collectors`` in Prometheus' text format, and their content type.

    Use it in a process that already serves HTTP. ``collectors`` are not added to the registry.
    """
    unregistered = CollectorRegistry()
    for collector in collectors:
        unregistered.register(collector)
    return generate_latest(REGISTRY) + generate_latest(unregistered), CONTENT_TYPE_PLAIN_0_0_4


@contextmanager
def serve_metrics(host: str, port: int) -> Iterator[int | None]:
    """Serve the registry at ``http://host:port/metrics`` during the block. Yield the port or None.

    Nothing is served if ``port`` is 0. If the port is in use, a warning is logged, so that a second connector can run
    on the same machine.
    """
    if port == 0:
        yield None
        return
    with ExitStack() as serving:
        try:
            listening = serving.enter_context(listen(host, port, REGISTRY))
        except OSError as error:
            _log.warning(
                "this process serves no metrics: it cannot listen on METRICS_PORT",
                extra={"port": port, "reason": error.strerror or ""},
            )
            yield None
            return
        yield listening
