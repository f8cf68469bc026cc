"""The lines of an exported file: the type and the time of each, and the resources of a line that is a container."""

from collections.abc import Collection, Iterator
from datetime import datetime

from fhir_assets.fhir.containers import CONTAINERS, ContainedResource, Pages, unpack
from fhir_assets.fhir.record import MalformedResource, parse_instant, read_header

Route = tuple[str, datetime | None]
"""The type to store a line as, and its ``lastUpdated``."""


def route_line(line: bytes, file_type: str, requested: Collection[str]) -> Route | None:
    """Return the type to store a line as, and its ``lastUpdated``; None for a container (see ``unpack_line``).

    A resource of another requested type is stored as its own type. Any other line is stored as the type of its file,
    and becomes a dead letter when it is read.
    """
    try:
        header = read_header(line)
    except MalformedResource:
        return file_type, None
    resource_type = header.resource_type
    if resource_type != file_type and resource_type not in requested:
        if resource_type in CONTAINERS:
            return None
        resource_type = file_type
    return resource_type, parse_instant(header.meta.last_updated) if header.meta else None


def unpack_line(line: bytes, file_type: str, requested: Collection[str]) -> Iterator[tuple[bytes, Route]]:
    """Yield the resources of a line that is a Bundle or Parameters.

    If a part of it cannot be used, such as a deletion or a page whose next page is missing, the line itself is yielded
    too and becomes a dead letter.
    """
    pages = Pages()
    parts = [*unpack(line, "line", pages), *pages.unfollowed()]
    for part in parts:
        if isinstance(part, ContainedResource) and part.body != line:
            yield part.body, route_line(part.body, file_type, requested) or (file_type, None)
    if not parts or any(not isinstance(part, ContainedResource) or part.body == line for part in parts):
        yield line, (file_type, None)
