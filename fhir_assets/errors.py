"""The exceptions that the project raises.

Transient and permanent are types: a caller may retry a ``TransientError``, never a ``PermanentError``.

::

    FhirAssetsError               exit code 1
    ├── ConfigurationError        a setting is missing, malformed or contradicts another (78)
    ├── TransientError            the same call may succeed later (75)
    │   ├── ServerUnavailable     a FHIR server is down, overloaded or drops connections
    │   ├── DatabaseUnavailable   Postgres cannot be reached
    │   ├── DagsterUnavailable    Dagster's webserver cannot be reached, or did not start a run
    │   ├── OutOfResources        a disk is full, or memory, locks or open files are used up
    │   ├── Overtaken             another run changed the same partition in the meantime
    │   └── WorkerLost            a worker process of the load was killed
    └── PermanentError            the same call will fail again
        ├── ServerRefused         a FHIR server responded with 4xx: credentials, rights, an unknown search
        ├── NotFhir               a response or a file that is not valid FHIR
        ├── StoreError            the store cannot be read or written (disk full, rights, damaged part)
        │   ├── FileMissing       the store does not have a file
        │   ├── StoreForbidden    rights to the store are missing, or it is read-only (78)
        │   ├── StoreFull         the store has no space left (75)
        │   └── StoreUnavailable  the server of the store is busy or cannot be reached (75)
        ├── EncryptionError       encrypted patient data was altered, or its key is missing
        ├── MissingCipher         a connection without a cipher was used for patient data
        ├── FhirPathError         a FHIRPath expression cannot be parsed, resolved or evaluated
        ├── CorrectionRefused     an edit of a dead letter is not a valid correction
        └── ViewError             a ViewDefinition is invalid, or its table does not match it

An error knows the exit code of the command that it ends, as ``sysexits.h`` numbers them: 75 to try again later, 78 for
settings and rights, 70 for a defect of the project, 1 for everything else. ``foreign_errors`` translates errors of
Postgres, the operating system, S3 and the network into these.

A message states what happened, where, and what to do next. It contains no patient data: no resource, no value of an
element, no response body.
"""

from typing import ClassVar

from fhir_assets.control_characters import escape_control_characters

DEFECT_EXIT_CODE = 70
"""The exit code of a command that ends with a defect of the project (EX_SOFTWARE)."""


class FhirAssetsError(Exception):
    """The base class of all errors of the project. The message is one line without control characters."""

    exit_code: ClassVar[int] = 1
    """The exit code of a command that ends with this error."""

    def __str__(self) -> str:
        return escape_control_characters(super().__str__())


class ConfigurationError(FhirAssetsError):
    """A setting is missing, malformed or contradicts another."""

    exit_code = 78


class TransientError(FhirAssetsError):
    """The same call may succeed later."""

    exit_code = 75


class PermanentError(FhirAssetsError):
    """The same call will fail again."""


class ServerUnavailable(TransientError):
    """A FHIR server is down, overloaded or drops connections, and the retries are used up."""


class DatabaseUnavailable(TransientError):
    """Postgres cannot be reached."""


class DagsterUnavailable(TransientError):
    """Dagster's webserver cannot be reached, or did not start a run."""


class OutOfResources(TransientError):
    """A disk is full, or memory, locks or open files are used up."""


class Overtaken(TransientError):
    """Another run changed the same partition in the meantime, so that the result of this run is outdated."""


class WorkerLost(TransientError):
    """A worker process of the load was killed, or crashed."""


class ServerRefused(PermanentError):
    """A FHIR server responded with 4xx: credentials, rights, an unknown search."""


class NotFhir(PermanentError):
    """A response or a file is not valid FHIR."""


class StoreError(PermanentError):
    """The store cannot be read or written: disk full, missing rights, a damaged part."""


class FileMissing(StoreError):
    """The store was read, and does not have a file."""


class StoreForbidden(StoreError):
    """Rights to the store are missing, or it is read-only."""

    exit_code = 78


class StoreFull(StoreError):
    """The store has no space left."""

    exit_code = 75


class StoreUnavailable(StoreError):
    """The server of the store is busy or cannot be reached."""

    exit_code = 75


class EncryptionError(PermanentError):
    """Encrypted patient data was altered, or the key that encrypts it is missing."""


class MissingCipher(PermanentError):
    """A connection without a cipher was used for patient data. This is an error in the program, not in its input."""

    exit_code = DEFECT_EXIT_CODE


class FhirPathError(PermanentError):
    """A FHIRPath expression cannot be parsed, resolved or evaluated."""


class ViewError(PermanentError):
    """A ViewDefinition is invalid, or its table does not match it."""


class CorrectionRefused(PermanentError):
    """An edit of a dead letter is not a valid correction: it cannot be applied, or its result is invalid again."""
