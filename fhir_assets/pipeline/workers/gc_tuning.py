"""The garbage collector while resources stream by the hundred thousand."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_ALLOCATIONS = 100_000


@contextmanager
def infrequent_gc() -> Iterator[None]:
    """Have the collector run some hundred times less often, and not walk what is there already.

    Parsed resources and their rows hold no cycles, so they go when the last reference does; all the collector does
    is to walk each batch, and Dagster's definitions with it, over and over: a tenth of a load's time. It stays on,
    for the few cycles of exceptions and connections. As a decorator it serves each call.
    """
    before = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(_ALLOCATIONS, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()
