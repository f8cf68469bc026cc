"""The compute log manager of the project's ``dagster.yaml``."""

from fhir_assets.orchestration.dagster_internals import NoOpComputeLogManager


class DiscardComputeLogs(NoOpComputeLogManager):
    """Discard what steps write to stdout and stderr, because it may quote a resource."""
