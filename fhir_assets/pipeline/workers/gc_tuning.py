"""Settings of the garbage collector for steps that stream many resources."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_THRESHOLD = 100_000


@contextmanager
def infrequent_gc() -> Iterator[None]:
    """Run the garbage collector about a hundred times less often, and exclude the objects that exist already.

    Parsed resources and their rows contain no cycles and are freed by reference counting. The collector would only
    traverse each batch and Dagster's definitions repeatedly, which takes a tenth of a load's time. It stays enabled for
    the few cycles of exceptions and connections. Usable as a context manager and as a decorator.
    """
    before = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(_THRESHOLD, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()
