"""Metrics of a connector process. Label values are fixed names and HTTP methods and statuses, never patient data."""

from prometheus_client import Counter, Histogram

from fhir_assets.metrics.exposition import REGISTRY

_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)

PROCESSED = Counter(
    "fhir_connector_processed_total",
    "Changes of the outbox that the FHIR server acknowledged",
    ["source", "outcome"],
    registry=REGISTRY,
)
FAILED = Counter(
    "fhir_connector_failed_total",
    "Failed attempts; fate is `retry` (will be retried) or `dead` (a dead letter)",
    ["source", "fate", "reason"],
    registry=REGISTRY,
)
CALL_LATENCY = Histogram(
    "fhir_call_latency_seconds", "Duration of calls to the FHIR server", ["method"], buckets=_BUCKETS, registry=REGISTRY
)
CALL_ERRORS = Counter(
    "fhir_call_errors_total",
    "Calls to the FHIR server that failed, by HTTP status or kind of failure",
    ["method", "code"],
    registry=REGISTRY,
)
DELIVERY = Histogram(
    "fhir_delivery_seconds",
    "Time from a change in the tables to its acknowledgement by the FHIR server",
    ["source"],
    buckets=(*_BUCKETS, 300, 1800),
    registry=REGISTRY,
)


def start_series(source: str) -> None:
    """Create the series of a source with the value zero, so that rates include its first change."""
    for outcome in ("created", "updated", "deleted"):
        PROCESSED.labels(source=source, outcome=outcome)
    DELIVERY.labels(source=source)
