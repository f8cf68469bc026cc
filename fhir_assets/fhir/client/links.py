"""Links in the answers of a FHIR server, which may have another base URL than the one that the client uses.

A server behind a proxy often writes links with its own address. ``link_base`` is that address: links that begin with it
are rewritten to the base URL.
"""

import re
from urllib.parse import urlsplit, urlunsplit

from fhir_assets.fhir.transport.origin import DEFAULT_PORTS, format_origin, parse_origin

_BASE_SEGMENT = re.compile(r"(?![A-Z][a-z]+[A-Za-z]*$)(?!.*\d{4})[A-Za-z0-9][A-Za-z0-9._~-]{0,23}")
"""A path segment that is neither a resource type nor likely to be an id."""


def is_http_url(text: str) -> bool:
    """Return whether a text is an HTTP URL with a host."""
    try:
        parts = urlsplit(text)
    except ValueError:
        return False
    return parts.scheme in DEFAULT_PORTS and bool(parts.hostname)


def is_below(url: str, base: str) -> bool:
    """Return whether a URL is a base URL or lies below it. Raises ValueError if one of them is not a URL."""
    path, base_path = urlsplit(url).path, urlsplit(base).path.rstrip("/")
    return parse_origin(url) == parse_origin(base) and (path == base_path or path.startswith(base_path + "/"))


def rewrite_link(url: str, link_base: str, base_url: str) -> str:
    """Return a URL below ``link_base`` as one below ``base_url``; any other URL is unchanged. Raises ValueError."""
    if not link_base or not is_below(url, link_base):
        return url
    rest = urlsplit(url)
    base = urlsplit(base_url)
    path = base.path.rstrip("/") + rest.path[len(urlsplit(link_base).path.rstrip("/")) :]
    return urlunsplit((base.scheme, base.netloc, path, rest.query, ""))


def guess_base(url: str) -> str:
    """Return the base URL that a link seems to have, for messages: its origin and the path before the resource type.

    Path segments that may be an id are left out. Raises ValueError if it is not a URL.
    """
    segments = []
    for segment in urlsplit(url).path.strip("/").split("/"):
        if not _BASE_SEGMENT.fullmatch(segment):
            break
        segments.append(segment)
    return "/".join([format_origin(url), *segments])
