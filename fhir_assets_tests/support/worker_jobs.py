"""Jobs for worker processes that several programs of a test import."""

import os


def process_of(text: str) -> int:
    """Return the id of the process that runs the job."""
    return os.getpid()
