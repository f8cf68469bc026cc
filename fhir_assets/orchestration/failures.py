"""Failures of steps and sensors: step records in ``ops.ingestion_runs``, and error messages without patient data.

Every failure is permanent for its step: ``allow_retries`` is off, because a step that failed would fail again on the
same input. Transient errors of a FHIR server or of S3 are retried where they occur, by ``retries.py`` and by boto3, and
become a failure after the last attempt. Dagster's daemon starts a crashed run again, and a run that failed because the
server was unavailable: see ``run_retries`` in ``dagster.yaml``.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import perf_counter
from traceback import extract_tb

import dagster as dg
import psycopg

from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.errors import DEFECT_EXIT_CODE, FhirAssetsError, ServerUnavailable
from fhir_assets.foreign_errors import translate_error, was_interrupted
from fhir_assets.orchestration.run_context import RunContext
from fhir_assets.warehouse.ops import runs

EXIT_CODE = "exit_code"
"""The metadata of a failure with the exit code for a command that executes the run."""

_log = logging.getLogger(__name__)


@contextmanager
def record_step(
    run: RunContext, warehouse: Warehouse, resource_types: list[str], *, check: Callable[[], None] | None = None
) -> Iterator[None]:
    """Record a step in ``ops.ingestion_runs``: RUNNING at its start, then SUCCESS, or FAILED with the reason.

    ``check`` is called first, and its error fails the step before it does anything.

    A step yields its outputs inside the block, so that an error of the IO manager is recorded too. Raises
    ``dagster.Failure`` for every exception. Its description is the message of a ``FhirAssetsError``, but only the type
    and the code line of any other exception, whose message may quote a resource. Its metadata has the exit code for
    the command that executes the run.
    """
    with sanitized_errors(), warehouse.connect() as conn:
        runs.start(conn, run.run_id, resource_types, run.partition_keys, triggered_by=run.triggered_by, at=run.now)
    started = perf_counter()
    fields = {
        "run": run.run_id,
        "types": resource_types,
        "window": run.partition_keys[0],
        "windows": len(run.partition_keys),
    }
    try:
        if check is not None:
            check()
        yield
    except BaseException as error:
        reason = describe_interruption(run) if was_interrupted(error) else describe_error(error)
        _log.error("step failed", extra={**fields, "reason": reason})
        # Without a database the failure cannot be recorded: the next load sees that the run holds no advisory lock.
        with suppress(FhirAssetsError, psycopg.Error), warehouse.connect() as conn:
            seconds = (perf_counter() - started) / len(resource_types)
            runs.fail(conn, run.run_id, resource_types, run.partition_keys, error=reason, seconds=seconds)
        if isinstance(error, ServerUnavailable):
            run.request_retry()
        if isinstance(error, dg.DagsterExecutionInterruptedError):
            raise dg.DagsterExecutionInterruptedError(reason) from None  # Not a Failure: it also ends the run.
        if isinstance(error, Exception):
            raise build_failure(error) from None
        raise
    with sanitized_errors(), warehouse.connect() as conn:
        seconds = (perf_counter() - started) / len(resource_types)
        runs.finish(conn, run.run_id, resource_types, run.partition_keys, seconds=seconds)
    _log.info("step finished", extra={**fields, "seconds": round(perf_counter() - started, 3)})


@contextmanager
def sanitized_errors() -> Iterator[None]:
    """Replace every exception in the block by a ``dagster.Failure``, as ``record_step`` does.

    Use it for steps and sensors that ``ops.ingestion_runs`` does not list. Dagster stores the messages of an exception
    and of its causes, which may quote a resource.
    """
    try:
        yield
    except dg.Failure:
        raise
    except Exception as error:
        raise build_failure(error) from None


def describe_interruption(run: RunContext) -> str:
    """Return why a step was interrupted: the run is being cancelled, or its process received a signal."""
    with suppress(Exception):  # The instance's database raises the errors of its driver.
        if run.is_being_cancelled():
            return "the run was cancelled by a person, or because it took too long"
    return (
        "the process of the run received signal 15 (SIGTERM) or 2 (SIGINT, Ctrl-C): an operator, or the system that "
        "runs it (systemd, Docker, Kubernetes), stopped it. Run these windows again: nothing is lost"
    )


def build_failure(error: BaseException) -> dg.Failure:
    """Return the failure of a step: the reason, and as metadata the exit code for a command that executes the run."""
    known = translate_error(error)
    code = known.exit_code if known else DEFECT_EXIT_CODE
    return dg.Failure(describe_error(error), metadata={EXIT_CODE: code}, allow_retries=False)


def describe_error(error: BaseException) -> str:
    """Return the message of a ``FhirAssetsError`` or of what it is translated to; else only type and code line."""
    known = translate_error(error)
    if known is not None:
        return str(known)
    if isinstance(error, GeneratorExit):
        return "the step's output could not be stored: the page of the run in the Dagster UI shows the reason"
    frame = extract_tb(error.__traceback__)[-1]
    state = f", SQLSTATE {error.sqlstate}" if isinstance(error, psycopg.Error) else ""
    return f"unexpected {type(error).__name__}{state} in {Path(frame.filename).name}, line {frame.lineno}"
