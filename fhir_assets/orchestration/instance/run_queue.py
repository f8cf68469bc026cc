"""Dagster's queue of runs, as long as FHIR_MAX_RUNS says."""

from collections.abc import Mapping
from typing import Any, Self

import dagster as dg

from fhir_assets.orchestration.dagster_internals import ConfigurableClassData
from fhir_assets.settings import load_settings


class RunQueue(dg.QueuedRunCoordinator[dg.DagsterInstance]):
    """Configured as ``run_coordinator`` in dagster.yaml, which could not name a number in the environment itself."""

    @classmethod
    def from_config_value(cls, inst_data: ConfigurableClassData | None, config_value: Mapping[str, Any]) -> Self:
        """What Dagster calls with the ``config`` of dagster.yaml."""
        return cls(inst_data=inst_data, **{**config_value, "max_concurrent_runs": load_settings().fhir_max_runs})
