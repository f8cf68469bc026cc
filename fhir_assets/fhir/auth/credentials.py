"""How a client shows who it is. The client sends credentials to the origin of its base URL only."""

import re
from base64 import b64encode

from requests import PreparedRequest
from requests.auth import AuthBase

from fhir_assets.errors import ConfigurationError

_SCHEME = re.compile(r"^\s*Bearer\s+", re.IGNORECASE)
_TOKEN = re.compile(r"[!-~]+")


class Credentials(AuthBase):
    """No credentials, and what all kinds have in common.

    Always given to requests, also when empty: it would otherwise take some from ``~/.netrc`` unseen.
    """

    remedy = "it asks for credentials: set FHIR_AUTH_TOKEN, or FHIR_AUTH_USERNAME and FHIR_AUTH_PASSWORD"
    """The rest of a sentence that begins with "the server answered 401", naming the settings to look at."""

    def __call__(self, request: PreparedRequest) -> PreparedRequest:
        """Sign a request."""
        return request

    def renew(self) -> bool:
        """Get fresh credentials after a 401; True if there are some, and the request is worth another try."""
        return False


class Basic(Credentials):
    """User name and password, UTF-8 (https://www.rfc-editor.org/rfc/rfc7617). Raises ConfigurationError for a colon
    in the name: a server would take what follows for the password.
    """

    remedy = "it refuses the user name or the password: check FHIR_AUTH_USERNAME and FHIR_AUTH_PASSWORD"

    def __init__(self, username: str, password: str) -> None:
        if ":" in username:
            raise ConfigurationError("FHIR_AUTH_USERNAME has a colon, which Basic authentication cannot send")
        self._header = "Basic " + b64encode(f"{username}:{password}".encode()).decode()

    def __call__(self, request: PreparedRequest) -> PreparedRequest:
        """Sign a request."""
        request.headers["Authorization"] = self._header
        return request


class Bearer(Credentials):
    """A fixed token (https://www.rfc-editor.org/rfc/rfc6750), with or without the word Bearer before it.

    Raises ConfigurationError for characters that cannot stand in a header.
    """

    remedy = "it refuses the token: check FHIR_AUTH_TOKEN, it may have expired"

    def __init__(self, token: str) -> None:
        bare = _SCHEME.sub("", token).strip()
        if not _TOKEN.fullmatch(bare):
            raise ConfigurationError("FHIR_AUTH_TOKEN is not a token: it is empty, or has blanks or odd characters")
        self._header = f"Bearer {bare}"

    def __call__(self, request: PreparedRequest) -> PreparedRequest:
        """Sign a request."""
        request.headers["Authorization"] = self._header
        return request


def build_credentials(
    username: str | None = None, password: str | None = None, token: str | None = None
) -> Credentials:
    """The credentials that the settings FHIR_AUTH_* describe."""
    if token:
        return Bearer(token)
    if username:
        return Basic(username, password or "")
    return Credentials()
