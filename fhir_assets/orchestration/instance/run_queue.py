"""The run coordinator of the project's ``dagster.yaml``: at most FHIR_MAX_RUNS runs at a time."""

from collections.abc import Mapping
from typing import Any, Self

import dagster as dg

from fhir_assets.orchestration.dagster_internals import ConfigurableClassData
from fhir_assets.settings import load_settings


class RunQueue(dg.QueuedRunCoordinator[dg.DagsterInstance]):
    """Dagster's queued run coordinator with FHIR_MAX_RUNS as its limit.

    The class exists because ``dagster.yaml`` cannot read this number from an environment variable.
    """

    @classmethod
    def from_config_value(cls, inst_data: ConfigurableClassData | None, config_value: Mapping[str, Any]) -> Self:
        """Return the coordinator for the ``config`` of ``dagster.yaml``; Dagster calls this."""
        return cls(inst_data=inst_data, **{**config_value, "max_concurrent_runs": load_settings().fhir_max_runs})
