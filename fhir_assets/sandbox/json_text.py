"""Edits the members of a JSON object without decoding their values, so that digits and the order are preserved."""

from collections.abc import Mapping

import msgspec
import orjson

_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])


def split_members(body: bytes | msgspec.Raw) -> dict[str, bytes]:
    """Return the members of a JSON object as encoded JSON. Raises msgspec.DecodeError if ``body`` is not an object."""
    return {name: bytes(raw) for name, raw in _decoder.decode(body).items()}


def join_members(members: Mapping[str, bytes]) -> bytes:
    """Return the JSON object with the given members, in their order."""
    return b"{%b}" % b",".join(orjson.dumps(name) + b":" + text for name, text in members.items())


def set_id_and_version(body: bytes | msgspec.Raw, resource_id: str, version_id: str, last_updated: str) -> bytes:
    """Return the resource with the given ``id``, ``meta.versionId`` and ``meta.lastUpdated``."""
    members = split_members(body)
    meta = split_members(members.pop("meta")) if "meta" in members else {}
    meta["versionId"] = orjson.dumps(version_id)
    meta["lastUpdated"] = orjson.dumps(last_updated)
    head = {
        "resourceType": members.pop("resourceType"),
        "id": orjson.dumps(resource_id),
        "meta": join_members(meta),
    }
    members.pop("id", None)
    return join_members({**head, **members})
