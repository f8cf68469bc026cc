"""Credentials at FHIR servers: FHIR_AUTH_* at FHIR_BASE_URL, FHIR_DELIVERY_* at FHIR_DELIVERY_URL, CONNECTOR_AUTH_* at
CONNECTOR_URL.
"""

from enum import StrEnum
from pathlib import Path

from pydantic import SecretStr

from fhir_assets.deployment.labels import CONNECTOR_LABELS, DELIVERY_LABELS, SOURCE_LABELS
from fhir_assets.deployment.limits import build_client_limits
from fhir_assets.errors import ConfigurationError
from fhir_assets.fhir.auth.credentials import Credentials, build_credentials
from fhir_assets.fhir.labels import ServerLabels
from fhir_assets.settings import Settings


class Account(StrEnum):
    """An account at a FHIR server. The value is the prefix of its settings."""

    SOURCE = "fhir_auth"
    DELIVERY = "fhir_delivery"
    CONNECTOR = "connector_auth"

    @property
    def labels(self) -> ServerLabels:
        """The setting names for error messages about the account's server."""
        return _LABELS[self]


_LABELS = {
    Account.SOURCE: SOURCE_LABELS,
    Account.DELIVERY: DELIVERY_LABELS,
    Account.CONNECTOR: CONNECTOR_LABELS,
}


class Scope(StrEnum):
    """The default scope of a requested token."""

    READ = "system/*.read"
    WRITE = "system/*.read system/*.write"


def build_account_credentials(
    settings: Settings, url: str, *, account: Account = Account.SOURCE, scope: Scope = Scope.READ
) -> Credentials:
    """Return the credentials of an account at the server at ``url``.

    These are Basic authentication, a fixed bearer token, or tokens of SMART Backend Services
    (https://hl7.org/fhir/smart-app-launch/backend-services.html). Raises ConfigurationError.
    """

    def read_setting(name: str) -> str | None:
        value = getattr(settings, f"{account}_{name}")
        return value.get_secret_value() if isinstance(value, SecretStr) else value

    if account is Account.SOURCE and not settings.fhir_auth_enabled:
        return build_credentials(None, None, None, labels=account.labels)
    client_id = read_setting("client_id")
    if not client_id:
        return build_credentials(
            read_setting("username"), read_setting("password"), read_setting("token"), labels=account.labels
        )
    key, secret = read_setting("private_key") or _read_key_file(settings, account), read_setting("client_secret")
    prefix = account.upper()
    if (key is None) == (secret is None):
        raise ConfigurationError(
            f"{prefix}_CLIENT_ID needs either {prefix}_PRIVATE_KEY (or _FILE) or {prefix}_CLIENT_SECRET"
        )
    # Imported here: it loads a library of JSON Web Tokens, which takes a tenth of a second.
    from fhir_assets.fhir.auth.smart import BackendServices, parse_private_key

    return BackendServices(
        url,
        client_id,
        key=parse_private_key(key, read_setting("key_id"), labels=account.labels) if key else None,
        secret=secret,
        token_url=read_setting("token_url"),
        scope=read_setting("scope") or scope,
        labels=account.labels,
        limits=build_client_limits(settings, account.labels).answer,
    )


def _read_key_file(settings: Settings, account: Account) -> str | None:
    path: Path | None = getattr(settings, f"{account}_private_key_file")
    if path is None:
        return None
    try:
        return path.expanduser().read_text("ascii")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not a text file"
        raise ConfigurationError(f"{account.upper()}_PRIVATE_KEY_FILE cannot be read: {reason}") from None
