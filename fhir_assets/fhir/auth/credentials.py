"""HTTP credentials of a FHIR client: none, Basic or a fixed Bearer token.

The client sends credentials to the origin of its base URL only. Tokens that are requested from a server belong in
``smart``.
"""

import re
from base64 import b64encode

from requests import PreparedRequest
from requests.auth import AuthBase

from fhir_assets.errors import ConfigurationError
from fhir_assets.fhir.labels import DEFAULT_LABELS, ServerLabels

_SCHEME = re.compile(r"^\s*Bearer\s+", re.IGNORECASE)
_TOKEN = re.compile(r"[!-~]+")


def is_valid_token(text: str) -> bool:
    """Return whether a text can be sent as a token: visible characters of ASCII, at least one."""
    return _TOKEN.fullmatch(text) is not None


class Credentials(AuthBase):
    """No credentials; the base class of all other kinds.

    Every request gets an instance, even without credentials: otherwise ``requests`` reads ``~/.netrc``.
    """

    is_token: bool = False
    """Whether the credentials are an access token.

    A file server of another origin may request a token, but not a password.
    """

    def __init__(self, *, labels: ServerLabels = DEFAULT_LABELS) -> None:
        self.labels = labels

    @property
    def remedy(self) -> str:
        """The advice after status 401, to be appended to "the server answered 401: "."""
        return f"it asks for credentials: set {self.labels.token}, or {self.labels.username} and {self.labels.password}"

    def __call__(self, request: PreparedRequest) -> PreparedRequest:
        """Sign a request."""
        return request

    def renew(self) -> bool:
        """Discard credentials that were refused with status 401. Return True if the request should be repeated."""
        return False


class Basic(Credentials):
    """A user name and a password in UTF-8 (https://www.rfc-editor.org/rfc/rfc7617).

    Raises ConfigurationError if the user name contains a colon: a server would read the rest as the password.
    """

    def __init__(self, username: str, password: str, *, labels: ServerLabels = DEFAULT_LABELS) -> None:
        super().__init__(labels=labels)
        if ":" in username:
            raise ConfigurationError(f"{labels.username} has a colon, which Basic authentication cannot send")
        self._header = "Basic " + b64encode(f"{username}:{password}".encode()).decode()

    @property
    def remedy(self) -> str:
        """The advice after status 401."""
        return f"it refuses the user name or the password: check {self.labels.username} and {self.labels.password}"

    def __call__(self, request: PreparedRequest) -> PreparedRequest:
        """Sign a request."""
        request.headers["Authorization"] = self._header
        return request


class Bearer(Credentials):
    """A fixed token (https://www.rfc-editor.org/rfc/rfc6750), with or without the word Bearer before it.

    Raises ConfigurationError if the token is empty or contains characters that a header cannot hold.
    """

    is_token = True

    def __init__(self, token: str, *, labels: ServerLabels = DEFAULT_LABELS) -> None:
        super().__init__(labels=labels)
        bare = _SCHEME.sub("", token).strip()
        if not is_valid_token(bare):
            raise ConfigurationError(
                f"{labels.token} is not a token: it is empty, or contains blanks or characters outside of ASCII"
            )
        self._header = f"Bearer {bare}"

    @property
    def remedy(self) -> str:
        """The advice after status 401."""
        return f"it refuses the token: check {self.labels.token}, it may have expired"

    def __call__(self, request: PreparedRequest) -> PreparedRequest:
        """Sign a request."""
        request.headers["Authorization"] = self._header
        return request


def build_credentials(
    username: str | None = None,
    password: str | None = None,
    token: str | None = None,
    *,
    labels: ServerLabels = DEFAULT_LABELS,
) -> Credentials:
    """Return Bearer credentials if there is a token, else Basic if there is a user name, else empty Credentials.

    Raises ConfigurationError for a value that cannot be sent.
    """
    if token:
        return Bearer(token, labels=labels)
    if username:
        return Basic(username, password or "", labels=labels)
    return Credentials(labels=labels)
