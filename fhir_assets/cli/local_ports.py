"""TCP ports of 127.0.0.1 for servers that are started by number and come back on it."""

import random
import socket

from fhir_assets.errors import ConfigurationError

_PORTS = range(20_000, 32_768)
"""Below the ports that systems give to outgoing connections: one of those may be taken while a server restarts."""
_ATTEMPTS = 100


def choose_port(wanted: int) -> int:
    """Return ``wanted`` if no process uses it, else another free port. Raises ConfigurationError if there is none."""
    return wanted if _is_free(wanted) else find_free_port()


def find_free_port() -> int:
    """Return a port that no process uses. Raises ConfigurationError if a hundred random ones are in use."""
    for port in random.SystemRandom().sample(_PORTS, _ATTEMPTS):
        if _is_free(port):
            return port
    raise ConfigurationError("127.0.0.1 has no free port: stop a server, or set DAGSTER_PORT")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True
