"""Edit the top level of JSON objects as text, so that all other bytes, digits and the key order are preserved."""

from collections.abc import Mapping

import msgspec
import orjson

_members = msgspec.json.Decoder(dict[str, msgspec.Raw])


def members(body: bytes | msgspec.Raw) -> dict[str, bytes]:
    """Return the members of a JSON object as JSON texts. Raises msgspec.DecodeError if it is not an object."""
    return {name: bytes(raw) for name, raw in _members.decode(body).items()}


def assemble(parts: Mapping[str, bytes]) -> bytes:
    """Return the JSON object with these members, in this order."""
    return b"{%b}" % b",".join(orjson.dumps(name) + b":" + text for name, text in parts.items())


def stamp(body: bytes | msgspec.Raw, resource_id: str, version_id: str, last_updated: str) -> bytes:
    """Return the resource with the ``id``, ``meta.versionId`` and ``meta.lastUpdated`` that the server assigns."""
    parts = members(body)
    meta = members(parts.pop("meta")) if "meta" in parts else {}
    meta["versionId"] = orjson.dumps(version_id)
    meta["lastUpdated"] = orjson.dumps(last_updated)
    head = {
        "resourceType": parts.pop("resourceType"),
        "id": orjson.dumps(resource_id),
        "meta": assemble(meta),
    }
    parts.pop("id", None)
    return assemble({**head, **parts})
