"""Origins of URLs (scheme, host and port). Credentials are sent to one origin only."""

from urllib.parse import SplitResult, urlsplit

Origin = tuple[str, str, int | None]
"""Scheme, host and port of a URL."""

DEFAULT_PORTS = {"http": 80, "https": 443}


def parse_origin(url: str) -> Origin:
    """Return the scheme, host and port of a URL. An invalid port is None. Raises ValueError if it is not a URL."""
    parts = urlsplit(url)
    return parts.scheme.lower(), (parts.hostname or "").lower(), _port(parts)


def format_origin(url: str) -> str:
    """Return the origin of a URL as text for messages, without credentials, path and query."""
    scheme, host, port = parse_origin(url)
    return f"{scheme}://{host}" if port == DEFAULT_PORTS.get(scheme) else f"{scheme}://{host}:{port}"


def _port(parts: SplitResult) -> int | None:
    try:
        return parts.port or DEFAULT_PORTS.get(parts.scheme.lower())
    except ValueError:
        return None
