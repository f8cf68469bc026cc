"""Who we are to a FHIR server: FHIR_AUTH_* at FHIR_BASE_URL, FHIR_DELIVERY_* at FHIR_DELIVERY_URL."""

from enum import StrEnum
from pathlib import Path

from pydantic import SecretStr

from fhir_assets.deployment.labels import DELIVERY_LABELS, SOURCE_LABELS
from fhir_assets.errors import ConfigurationError
from fhir_assets.fhir.auth.credentials import Credentials, build_credentials
from fhir_assets.fhir.auth.smart import BackendServices, parse_private_key
from fhir_assets.fhir.labels import ServerLabels
from fhir_assets.settings import Settings


class Account(StrEnum):
    """The settings of one account begin with this word."""

    SOURCE = "fhir_auth"
    DELIVERY = "fhir_delivery"

    @property
    def labels(self) -> ServerLabels:
        """The settings that messages about the account's server name."""
        return SOURCE_LABELS if self is Account.SOURCE else DELIVERY_LABELS


class Scope(StrEnum):
    """What a token is asked for where the settings do not say."""

    READ = "system/*.read"
    WRITE = "system/*.read system/*.write"


def build_account_credentials(
    settings: Settings, url: str, *, account: Account = Account.SOURCE, scope: Scope = Scope.READ
) -> Credentials:
    """What the settings of an account show the server at ``url``: Basic, a fixed token, or tokens of SMART Backend
    Services. Raises ConfigurationError.
    """

    def text(name: str) -> str | None:
        value = getattr(settings, f"{account}_{name}")
        return value.get_secret_value() if isinstance(value, SecretStr) else value

    client_id = text("client_id")
    if not client_id:
        return build_credentials(text("username"), text("password"), text("token"), labels=account.labels)
    key, secret = text("private_key") or _content(settings, account), text("client_secret")
    word = account.upper()
    if (key is None) == (secret is None):
        raise ConfigurationError(f"{word}_CLIENT_ID needs either {word}_PRIVATE_KEY (or _FILE) or {word}_CLIENT_SECRET")
    return BackendServices(
        url,
        client_id,
        key=parse_private_key(key, text("key_id"), labels=account.labels) if key else None,
        secret=secret,
        token_url=text("token_url"),
        scope=text("scope") or scope,
        labels=account.labels,
    )


def _content(settings: Settings, account: Account) -> str | None:
    path: Path | None = getattr(settings, f"{account}_private_key_file")
    if path is None:
        return None
    try:
        return path.expanduser().read_text("ascii")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise ConfigurationError(f"{account.upper()}_PRIVATE_KEY_FILE cannot be read: {why}") from None
