"""What a worker process does: read work from its standard input, answer on its standard output, end with its parent."""

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
from fhir_assets.pipeline.workers.gc_tuning import infrequent_gc


@lru_cache(64)
def _job(packed: bytes) -> Callable[[Any], Any]:
    return cast(Callable[[Any], Any], pickle.loads(packed))


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Work until the requests end."""
    while True:
        try:
            packed, items = pickle.load(requests)
        except EOFError:
            return
        pickle.dump(_answer(packed, items), answers, pickle.HIGHEST_PROTOCOL)
        answers.flush()


def _answer(packed: bytes, items: list[Any]) -> list[Any] | FhirAssetsError:
    """The results, or the error that ends the work. Of an error that is not the project's own only type and place
    are told: its message may quote what it choked on.
    """
    try:
        job = _job(packed)
        return [job(item) for item in items]
    except FhirAssetsError as error:
        return error
    except Exception as error:
        place = extract_tb(error.__traceback__)[-1]
        name = Path(place.filename).name
        return PermanentError(f"unexpected {type(error).__name__} in {name}, line {place.lineno}, in a worker process")


def main() -> None:
    """Serve the parent. Ctrl-C is the parent's to handle; what anybody prints does not get between the answers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    with infrequent_gc():
        try:
            serve(sys.stdin.buffer, answers)
        except BrokenPipeError:
            os._exit(1)


if __name__ == "__main__":
    main()
