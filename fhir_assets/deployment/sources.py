"""The binding of the source of a deployment to its settings."""

from datetime import UTC
from urllib.parse import urlsplit, urlunsplit

from fhir_assets.deployment.store import build_store
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.pipeline.sources.binding import BoundSetting, Effect, SourceBinding
from fhir_assets.settings import Settings, SourceKind
from fhir_assets.storage.store import Store

_PORTS = {"http": 80, "https": 443}


def build_binding(settings: Settings, warehouse: Warehouse, store: Store | None = None) -> SourceBinding:
    """Return the binding of the source of the settings; nothing is read or compared."""
    return SourceBinding(
        list_bound_settings(settings),
        warehouse.connect,
        store or build_store(settings),
        settings.window_scheme,
        source=settings.source,
        labels="FHIR_STORE_URL, FHIR_ASSETS_HOME and DB_URL",
    )


def list_bound_settings(settings: Settings) -> list[BoundSetting]:
    """Return the settings on which the state of the source depends, with their current values.

    A change of one of them makes the state invalid. The files of FHIR_SOURCE=ndjson are not among them: their
    fingerprint is part of the state, and changed files are read again.
    """
    start = settings.fhir_last_updated_gte
    bound = [
        BoundSetting("FHIR_PARTITION", settings.fhir_partition.value, Effect.WINDOWS),
        BoundSetting("FHIR_LAST_UPDATED_GTE", start.astimezone(UTC).isoformat() if start else "", Effect.START),
    ]
    if not settings.fhir_base_url:
        return bound
    bound.append(BoundSetting("FHIR_SOURCE", settings.fhir_source.value, Effect.COVERAGE))
    if settings.fhir_source is SourceKind.NDJSON:
        return bound
    bound += [
        BoundSetting("FHIR_BASE_URL", describe_server(settings.fhir_base_url), Effect.SERVER),
        BoundSetting("FHIR_AUTH_SCOPE", _list_filters(settings.fhir_auth_scope or ""), Effect.COVERAGE),
    ]
    if settings.fhir_source is SourceKind.BULK:
        bound += [
            BoundSetting("FHIR_BULK_LEVEL", settings.fhir_bulk_level, Effect.COVERAGE),
            BoundSetting("FHIR_BULK_TYPE_FILTER", settings.fhir_bulk_type_filter, Effect.COVERAGE),
        ]
    return bound


def describe_server(url: str) -> str:
    """Return the address of a server without user, password, query and fragment.

    Different spellings of one address give the same result.
    """
    parts = urlsplit(url)
    scheme, host = parts.scheme.lower(), parts.hostname or ""
    port = parts.port
    name = f"[{host}]" if ":" in host else host
    netloc = name if port is None or port == _PORTS.get(scheme) else f"{name}:{port}"
    return urlunsplit((scheme, netloc, parts.path.rstrip("/"), "", ""))


def _list_filters(scope: str) -> str:
    """Return the scopes that filter resources (SMART 2 search parameters). Other scopes do not hide resources."""
    return " ".join(sorted(part for part in scope.split() if "?" in part))
