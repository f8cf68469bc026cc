"""Failures of steps and sensors as Dagster shows them, without patient data.

Every failure is permanent for its step: ``allow_retries`` is off, because a step that failed would fail again on the
same input. Transient errors of a FHIR server or of S3 are retried where they occur, by ``retries.py`` and by boto3, and
become a failure after the last attempt. Dagster's daemon starts a crashed run again, and a run that failed because the
server was unavailable: see ``run_retries`` in ``dagster.yaml``.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import dagster as dg
import psycopg

from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.errors import FhirAssetsError
from fhir_assets.foreign_errors import was_interrupted
from fhir_assets.steps import records
from fhir_assets.steps.run_context import RunContext
from fhir_assets.warehouse.ops import runs

EXIT_CODE = "exit_code"
"""The metadata of a failure with the exit code for a command that executes the run."""


@contextmanager
def record_step(
    run: RunContext, warehouse: Warehouse, resource_types: Sequence[str], *, check: Callable[[], None] | None = None
) -> Iterator[None]:
    """Record a step as ``steps.records.record_step`` does, and raise ``dagster.Failure`` in place of StepFailed.

    A step that yields its outputs inside the block also records an error of the IO manager.
    """
    with sanitized_errors(), records.record_step(run, warehouse, resource_types, check=check):
        yield


@contextmanager
def record_unreported(run: RunContext, warehouse: Warehouse, resource_types: Sequence[str]) -> Iterator[None]:
    """Record in ``ops.ingestion_runs`` that the result of a step that has succeeded was not recorded in Dagster.

    A step yields its outputs inside the block, so that an error of the IO manager is recorded too.
    """
    try:
        with sanitized_errors():
            yield
    except BaseException as error:
        if was_interrupted(error):
            reason = records.describe_interruption(run)
        else:
            reason = (error.description if isinstance(error, dg.Failure) else None) or records.describe_error(error)
        with suppress(FhirAssetsError, psycopg.Error), warehouse.connect() as conn:
            runs.fail_ended(conn, run.run_id, resource_types, run.partition_keys, error=reason)
        raise


@contextmanager
def sanitized_errors() -> Iterator[None]:
    """Replace every exception in the block by a ``dagster.Failure``, whose message contains no patient data.

    Dagster stores the messages of an exception and of its causes, which may quote a resource.
    """
    try:
        yield
    except dg.Failure:
        raise
    except Exception as error:
        raise build_failure(error) from None


def build_failure(error: BaseException) -> dg.Failure:
    """Return the failure of a step: the reason, and as metadata the exit code for a command that executes the run."""
    failed = records.build_failure(error)
    return dg.Failure(failed.reason, metadata={EXIT_CODE: failed.exit_code}, allow_retries=False)
