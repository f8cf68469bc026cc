"""Errors of connections to servers, of sockets and of the HTTP clients."""

import errno
import os

from fhir_assets.errors import ConfigurationError, FhirAssetsError, ServerUnavailable

_BROKEN = {
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.ECONNABORTED,
    errno.ETIMEDOUT,
    errno.EHOSTUNREACH,
    errno.EHOSTDOWN,
    errno.ENETUNREACH,
    errno.ENETDOWN,
    errno.ENETRESET,
    errno.ENOTCONN,
    errno.EPIPE,
}
_CLIENTS = {"httpx", "httpcore", "requests", "urllib3", "http", "redis", "kombu", "amqp"}
_WORDS = ("Connect", "Timeout", "Protocol", "Network", "Read", "Write", "Transport", "Disconnected", "IncompleteRead")
_ADVICE = "check the address, the server and the network, then try again"


def translate_network_error(error: BaseException) -> FhirAssetsError | None:
    """Return the error of the project for a connection that cannot be opened or broke; None for other errors.

    The message has the type of the error only, because that of a client may contain an address with an identifier.
    """
    name = type(error).__name__
    # Compared by name, because importing ssl and socket takes longer than most commands.
    names = {base.__name__ for base in type(error).__mro__}
    if "SSLCertVerificationError" in names:
        return ConfigurationError("the certificate of a server is not valid here: correct it, or install its authority")
    if "gaierror" in names:
        return ServerUnavailable(f"the name of a server cannot be resolved: {_ADVICE}")
    if isinstance(error, OSError) and error.errno in _BROKEN:
        return ServerUnavailable(f"a connection failed ({os.strerror(error.errno or 0)}): {_ADVICE}")
    if isinstance(error, TimeoutError | ConnectionError) or "SSLError" in names:
        return ServerUnavailable(f"a connection failed ({name}): {_ADVICE}")
    if type(error).__module__.partition(".")[0] in _CLIENTS and any(word in name for word in _WORDS):
        return ServerUnavailable(f"a connection failed ({name}): {_ADVICE}")
    return None
