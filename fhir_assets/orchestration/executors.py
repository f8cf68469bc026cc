"""The Dagster executor that FHIR_EXECUTOR selects."""

import dagster as dg

from fhir_assets.errors import ConfigurationError
from fhir_assets.settings import Executor, Settings


def build_executor(settings: Settings) -> dg.ExecutorDefinition:
    """Return the executor for runs of assets that are selected in the UI or in a backfill.

    The project's jobs always execute their steps in one process. Raises ConfigurationError if the package of the
    executor is not installed.
    """
    match settings.fhir_executor:
        case Executor.MULTIPROCESS:
            return dg.multiprocess_executor
        case Executor.K8S:
            try:
                from dagster_k8s import k8s_job_executor
            except ImportError:
                raise ConfigurationError(
                    "FHIR_EXECUTOR=k8s needs dagster-k8s: pip install 'fhir-assets[k8s]'"
                ) from None
            return k8s_job_executor
        case _:
            return dg.in_process_executor
