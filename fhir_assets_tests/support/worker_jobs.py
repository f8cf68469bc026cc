"""Jobs for worker processes that several programs of a test import."""

import os
import resource
from pathlib import Path


def process_of(text: str) -> int:
    """Return the id of the process that runs the job."""
    return os.getpid()


def allocate(megabytes: str) -> int:
    """Use so much memory that the kernel must provide it."""
    return len(bytearray(b"x") * (int(megabytes) << 20))


def allocate_above_limit(megabytes: str) -> int:
    """Use more memory than this process is allowed to have."""
    limit_memory("50")
    return allocate(megabytes)


def limit_memory(megabytes: str) -> None:
    """Allow this process so much more memory than it has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + (int(megabytes) << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
