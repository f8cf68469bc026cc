"""Sources: the systems that a deployment loads resources from. A short key identifies each of them.

Ids of resources are unique within one source only. The key of the source is therefore part of every key of the state:
of the tables (column ``source``, in the tables of views ``_source``), of manifests and of the layout of the store.
``Settings.source`` is the key of a deployment's source; its warehouse passes it to every session, and its store to
every manifest.
"""

import re

DEFAULT_SOURCE = "default"
"""The key of the source that the settings describe."""

_KEY = re.compile(r"[a-z][a-z0-9_]{0,31}")


def require_source_key(key: str) -> str:
    """Return the key of a source. Raises ValueError unless it is a lower-case word of a to z, 0 to 9 and ``_``."""
    if not _KEY.fullmatch(key):
        raise ValueError(f"{key!r} is not the key of a source: it is a lower-case word of at most 32 characters")
    return key
