"""The fingerprint of a ViewDefinition: a hash of the parts that determine its rows."""

import hashlib
import json
from typing import Any

_RELEVANT_KEYS = frozenset(
    {
        *("resource", "name", "path", "type", "collection", "constant", "where", "select", "column", "unionAll"),
        *("forEach", "forEachOrNull", "repeat"),
    }
)


def compute_fingerprint(definition: dict[str, Any]) -> str:
    """Return a hash of 16 hex digits. It ignores texts such as titles and descriptions."""
    text = json.dumps(_relevant_parts(definition), sort_keys=True, separators=(",", ":"), default=float)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _relevant_parts(node: Any) -> Any:
    if isinstance(node, dict):
        return {
            key: _relevant_parts(value)
            for key, value in node.items()
            if key in _RELEVANT_KEYS or (key.startswith("value") and "name" in node)
        }
    return [_relevant_parts(item) for item in node] if isinstance(node, list) else node
