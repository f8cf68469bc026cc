"""Translation of errors of Postgres, the operating system, S3 and the network into errors of the project.

``translate_error`` is the one place that decides what such an error means: what happened, what to do next, and whether
the same call may succeed later (a ``TransientError``) or settings or rights have to change (a ``ConfigurationError``).
The command line, the steps, the API, the post loader and the connector call it. An error that it does not know is a
defect of the project. Drivers are recognized by the attributes of their errors, so that none has to be imported.
"""

from fhir_assets.errors import FhirAssetsError
from fhir_assets.foreign_errors.network import translate_network_error
from fhir_assets.foreign_errors.postgres import LOST, note_login, translate_postgres_error
from fhir_assets.foreign_errors.s3 import translate_s3_error
from fhir_assets.foreign_errors.system import choose_error, choose_store_error, translate_system_error

__all__ = [
    "LOST",
    "choose_error",
    "choose_store_error",
    "note_login",
    "translate_error",
    "translate_s3_error",
    "was_interrupted",
]

_MAX_CAUSES = 10


def translate_error(error: BaseException, *, with_names: bool = False) -> FhirAssetsError | None:
    """Return the error of the project for ``error``, or None if it is a defect of the project.

    ``with_names`` adds the names of files, for the operator's terminal; elsewhere a name may be a patient's. The text
    of the error is left out, because a driver may quote a row in it. The errors that Dagster and SQLAlchemy wrap are
    found.
    """
    cause: BaseException | None = error
    for _ in range(_MAX_CAUSES):
        if cause is None:
            return None
        if isinstance(cause, FhirAssetsError):
            return cause
        found = (
            translate_postgres_error(cause)
            or translate_s3_error(cause)
            or translate_network_error(cause)
            or translate_system_error(cause, with_names=with_names)
        )
        if found is not None:
            return found
        cause = _find_wrapped(cause)
    return None


def was_interrupted(error: BaseException) -> bool:
    """Return whether Ctrl-C caused an error: a driver that it interrupts may fail while it cleans up."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        if isinstance(cause, KeyboardInterrupt) or type(cause).__name__ == "DagsterExecutionInterruptedError":
            return True
        seen.add(id(cause))
        cause = cause.__cause__ or cause.__context__
    return False


def _find_wrapped(error: BaseException) -> BaseException | None:
    """Return the error that an error of SQLAlchemy or Dagster wraps, or None."""
    package = type(error).__module__.partition(".")[0]
    if package == "sqlalchemy":
        return getattr(error, "orig", None)
    if package.startswith("dagster"):
        wrapped = getattr(error, "user_exception", None)
        return wrapped if isinstance(wrapped, BaseException) else error.__cause__
    return None
