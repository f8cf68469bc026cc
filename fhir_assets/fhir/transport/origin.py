"""Origins of URLs (scheme, host and port). Credentials are sent to one origin only."""

import re
from ipaddress import ip_address
from urllib.parse import SplitResult, urlsplit

Origin = tuple[str, str, int | None]
"""Scheme, host and port of a URL."""

DEFAULT_PORTS = {"http": 80, "https": 443}

_AMBIGUOUS = re.compile(r"[\x00-\x20\\\x7f]")
"""Characters that libraries read differently in the part with the host.

The host of ``https://a.example\\@b.example`` is a.example for one, b.example for another.
"""
_REMOVED = re.compile(r"[\t\r\n]")
"""Characters that ``urlsplit`` leaves out."""


def parse_origin(url: str) -> Origin:
    """Return the scheme, host and port of a URL. An invalid port is None.

    Raises ValueError if it is not a URL, or if libraries may read another host from it.
    """
    parts = urlsplit(url)
    if _AMBIGUOUS.search(parts.netloc) or _REMOVED.search(url.partition("?")[0]):
        raise ValueError("the URL has a character that no URL has")
    return parts.scheme.lower(), (parts.hostname or "").lower(), _port(parts)


def format_origin(url: str) -> str:
    """Return the origin of a URL as text for messages, without credentials, path and query."""
    scheme, host, port = parse_origin(url)
    name = f"[{host}]" if ":" in host else host
    return f"{scheme}://{name}" if port == DEFAULT_PORTS.get(scheme) else f"{scheme}://{name}:{port}"


def is_confidential(origin: Origin) -> bool:
    """Return whether nobody between this machine and an origin reads what is sent: TLS, or this machine itself."""
    scheme, host, _ = origin
    return scheme == "https" or (scheme == "http" and _is_this_machine(host))


def _is_this_machine(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _port(parts: SplitResult) -> int | None:
    try:
        return parts.port or DEFAULT_PORTS.get(parts.scheme.lower())
    except ValueError:
        return None
