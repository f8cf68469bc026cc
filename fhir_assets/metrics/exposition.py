"""The registry of the process's metrics, and the endpoint that Prometheus scrapes."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, generate_latest, start_http_server
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector

REGISTRY = CollectorRegistry()

_log = logging.getLogger(__name__)


def render_metrics(*more: Collector) -> tuple[bytes, str]:
    """The registry, and ``more`` that is not in it, in Prometheus' text format, and its content type: for a process
    that serves HTTP already.
    """
    added = CollectorRegistry()
    for each in more:
        added.register(each)
    return generate_latest(REGISTRY) + generate_latest(added), CONTENT_TYPE_PLAIN_0_0_4


@contextmanager
def serve_metrics(host: str, port: int) -> Iterator[int | None]:
    """Serve the registry at ``http://host:port/metrics``; yields the port, None if it is 0 or taken.

    A taken port is only warned of: a second connector on a machine does its work all the same.
    """
    if port == 0:
        yield None
        return
    try:
        server, thread = start_http_server(port, host, registry=REGISTRY)
    except OSError as error:
        _log.warning(
            "no metrics from this process: METRICS_PORT cannot be listened on",
            extra={"port": port, "reason": error.strerror or ""},
        )
        yield None
        return
    try:
        yield port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
