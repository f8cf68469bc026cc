"""Every error the project raises on purpose.

::

    FhirAssetsError
    ├── ConfigurationError        a setting is missing, malformed or contradicts another
    ├── TransientError            the same call may succeed later
    │   ├── ServerUnavailable     a FHIR server that is down, overloaded or drops connections
    │   ├── DatabaseUnavailable   Postgres cannot be reached
    │   ├── DagsterUnavailable    Dagster's webserver cannot be reached, or did not start a run
    │   ├── Overtaken             another run changed the same partition meanwhile
    │   └── WorkerLost            a worker process of the load was killed
    └── PermanentError            the same call will fail again
        ├── ServerRefused         a FHIR server answered 4xx: credentials, rights, an unknown search
        ├── NotFhir               an answer or a file that is not what FHIR promises
        ├── StoreError            the store cannot be read or written (disk full, rights, damaged part)
        ├── SealingError          patient data that is sealed with a key that is missing, or was altered
        ├── MissingCipher         patient data was to be read or written through a connection without a cipher
        ├── FhirPathError         an expression that cannot be parsed, resolved or evaluated
        ├── CorrectionRefused     an edit of a dead letter that is no correction
        └── ViewError             a ViewDefinition that is invalid, or a table that it no longer fits

A message says what happened, where, and what to do next. It never holds a patient's data: no resource, no
element's value, no response body.
"""


class FhirAssetsError(Exception):
    """The root of the project's errors."""


class ConfigurationError(FhirAssetsError):
    """A setting is missing, malformed or contradicts another."""


class TransientError(FhirAssetsError):
    """The same call may succeed later."""


class PermanentError(FhirAssetsError):
    """The same call will fail again."""


class ServerUnavailable(TransientError):
    """A FHIR server is down, overloaded or drops connections, and the retries are used up."""


class DatabaseUnavailable(TransientError):
    """Postgres cannot be reached."""


class DagsterUnavailable(TransientError):
    """Dagster's webserver cannot be reached, or did not start a run."""


class Overtaken(TransientError):
    """Another run changed the same partition meanwhile, so that what this one made of it no longer fits."""


class WorkerLost(TransientError):
    """A worker process of the load was killed, or crashed."""


class ServerRefused(PermanentError):
    """A FHIR server answered 4xx: credentials, rights, an unknown search."""


class NotFhir(PermanentError):
    """An answer or a file is not what FHIR promises."""


class StoreError(PermanentError):
    """The store cannot be read or written: disk full, missing rights, a damaged part."""


class EncryptionError(PermanentError):
    """Patient data is sealed with a key that is missing, or was altered."""


class MissingCipher(PermanentError):
    """Patient data was to be read or written through a connection without a cipher: an error of the program."""


class FhirPathError(PermanentError):
    """A FHIRPath expression cannot be parsed, resolved or evaluated."""


class ViewError(PermanentError):
    """A ViewDefinition is invalid, or a table no longer fits it."""


class CorrectionRefused(PermanentError):
    """An edit of a dead letter is no correction: it does not fit the resource, or what it gives is refused again."""
