"""The end of a worker process when the process that started it has ended."""

import multiprocessing
import os
import signal
from threading import Thread


def end_with_parent() -> None:
    """Let this worker process stop, as with SIGTERM, when its parent process has ended in any way.

    Workers that outlive a killed parent would hold the port, and `fhir-assets api` could not be started again. Does
    nothing in a process that ``multiprocessing`` did not start.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def wait() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)

    Thread(target=wait, name="parent", daemon=True).start()
