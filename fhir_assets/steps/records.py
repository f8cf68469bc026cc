"""Records of steps in ``ops.ingestion_runs``, and the reasons of failures without patient data."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from time import perf_counter
from traceback import extract_tb

import psycopg

from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.errors import DEFECT_EXIT_CODE, FhirAssetsError, ServerUnavailable
from fhir_assets.foreign_errors import translate_error, was_interrupted
from fhir_assets.steps.run_context import RunContext
from fhir_assets.warehouse.ops import runs

_log = logging.getLogger(__name__)


class StepFailed(Exception):
    """A step has failed. ``reason`` contains no patient data; ``exit_code`` is that of a command that executes it."""

    def __init__(self, reason: str, exit_code: int) -> None:
        super().__init__(reason, exit_code)
        self.reason = reason
        self.exit_code = exit_code


@contextmanager
def record_step(
    run: RunContext, warehouse: Warehouse, resource_types: Sequence[str], *, check: Callable[[], None] | None = None
) -> Iterator[None]:
    """Record a step in ``ops.ingestion_runs``: RUNNING at its start, then SUCCESS, or FAILED with the reason.

    ``check`` is called first, and its error fails the step before it does anything.

    Raises StepFailed for every exception. Its reason is the message of a ``FhirAssetsError``, but only the type and the
    code line of any other exception, whose message may quote a resource. An interruption stays one, whatever error of a
    driver it has caused.
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
        if was_interrupted(error):
            # Not a failure of the step alone: it also ends the run.
            raise (KeyboardInterrupt if isinstance(error, Exception) else type(error))(reason) from None
        if isinstance(error, Exception):
            raise build_failure(error) from None
        raise
    with sanitized_errors(), warehouse.connect() as conn:
        seconds = (perf_counter() - started) / len(resource_types)
        runs.finish(conn, run.run_id, resource_types, run.partition_keys, seconds=seconds)
    _log.info("step finished", extra={**fields, "seconds": round(perf_counter() - started, 3)})


@contextmanager
def sanitized_errors() -> Iterator[None]:
    """Replace every exception in the block by StepFailed, as ``record_step`` does, but record nothing."""
    try:
        yield
    except Exception as error:
        if was_interrupted(error):  # A driver that Ctrl-C interrupts may fail while it cleans up.
            raise KeyboardInterrupt from None
        raise build_failure(error) from None


def build_failure(error: BaseException) -> StepFailed:
    """Return the failure of a step: its reason and exit code."""
    if isinstance(error, StepFailed):
        return error
    known = translate_error(error)
    return StepFailed(describe_error(error), known.exit_code if known else DEFECT_EXIT_CODE)


def describe_interruption(run: RunContext) -> str:
    """Return why a step was interrupted: the run is being cancelled, or its process received a signal."""
    with suppress(Exception):  # The instance's database raises the errors of its driver.
        if run.is_being_cancelled():
            return "the run was cancelled by a person, or because it took too long"
    return (
        "the process of the run received signal 15 (SIGTERM) or 2 (SIGINT, Ctrl-C): an operator, or the system that "
        "runs it (systemd, Docker, Kubernetes), stopped it. Run these windows again: nothing is lost"
    )


def describe_error(error: BaseException) -> str:
    """Return the message of a ``FhirAssetsError`` or of what it is translated to; else only type and code line."""
    if isinstance(error, StepFailed):
        return error.reason
    known = translate_error(error)
    if known is not None:
        return str(known)
    if isinstance(error, GeneratorExit):
        return "the step's output could not be stored: the page of the run in the Dagster UI shows the reason"
    frame = extract_tb(error.__traceback__)[-1]
    state = f", SQLSTATE {error.sqlstate}" if isinstance(error, psycopg.Error) else ""
    return f"unexpected {type(error).__name__}{state} in {Path(frame.filename).name}, line {frame.lineno}"
