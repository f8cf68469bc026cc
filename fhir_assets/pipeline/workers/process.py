"""The main module of a worker process: reads jobs from standard input, and writes results to standard output."""

import os
import pickle
import signal
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from traceback import extract_tb
from typing import Any, BinaryIO, cast

from fhir_assets.errors import FhirAssetsError, PermanentError
from fhir_assets.file_modes import restrict_umask
from fhir_assets.foreign_errors import translate_error
from fhir_assets.pipeline.workers.gc_tuning import infrequent_gc
from fhir_assets.process_ends import OUT_OF_MEMORY_EXIT_CODE


@lru_cache(64)
def _unpickle_job(packed: bytes) -> Callable[[Any], Any]:
    return cast(Callable[[Any], Any], pickle.loads(packed))


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer requests until the input ends."""
    while True:
        try:
            packed, items = pickle.load(requests)
        except EOFError:
            return
        pickle.dump(_answer(packed, items), answers, pickle.HIGHEST_PROTOCOL)
        answers.flush()


def _answer(packed: bytes, items: list[Any]) -> list[Any] | FhirAssetsError:
    """Return the results of a job, or its error.

    An error that is not a FhirAssetsError, and cannot be translated to one, becomes a PermanentError with its type and
    location only, because its message may contain patient data.
    """
    try:
        job = _unpickle_job(packed)
        return [job(item) for item in items]
    except FhirAssetsError as error:
        return error
    except Exception as error:
        if (known := translate_error(error)) is not None:
            return known
        frame = extract_tb(error.__traceback__)[-1]
        name = Path(frame.filename).name
        return PermanentError(f"unexpected {type(error).__name__} in {name}, line {frame.lineno}, in a worker process")


def main() -> None:
    """Serve the parent process.

    The parent handles Ctrl-C. Standard output is redirected to standard error, so that printed text does not corrupt
    the results.
    """
    restrict_umask()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    with infrequent_gc():
        try:
            serve(sys.stdin.buffer, answers)
        except BrokenPipeError:
            os._exit(1)
        except MemoryError:  # A request or an answer does not fit, so that there is no answer to send.
            os._exit(OUT_OF_MEMORY_EXIT_CODE)


if __name__ == "__main__":
    main()
