"""Serialize Dagster's events to the JSON that Dagster stores. Objects that events of a batch share are packed once.

The events of a range of windows share almost everything: a hundred materializations differ in partition and time, but
hardly in step, asset or metadata. Dagster packs each event separately, which takes a third of the time of a run over
empty windows.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from math import isfinite
from typing import Any

import dagster as dg
import orjson
from dagster_shared.serdes import pack_value, serialize_value

from fhir_assets.orchestration.dagster_internals import (
    SERIALIZABLE_CLASSES,
    MetadataFieldSerializer,
    ObjectSerializer,
)

_PLAIN = frozenset({str, int, bool, type(None)})


def pack_events(events: Iterable[dg.EventLogEntry]) -> list[str]:
    """Return the JSON of each event. Dagster deserializes it to the same event as ``serialize_value(event)``."""
    pack = _Packer()
    return [_pack_event(event, pack) for event in events]


@lru_cache(maxsize=65_536, typed=True)
def pack_entry(label: str, value: int | str) -> str:
    """Return the JSON of one entry of a metadata dict, as in the JSON of its event."""
    return pack_metadata({label: value})


def pack_metadata(metadata: Mapping[str, Any]) -> str:
    """Return the JSON of the entries of a metadata dict, without the brackets. Raises as ``orjson.dumps`` does."""
    normalized = dg.AssetMaterialization("asset", metadata=metadata).metadata
    pack = _Packer()
    return orjson.dumps([pack._entry(label, entry) for label, entry in normalized.items()])[1:-1].decode()


def _pack_event(event: dg.EventLogEntry, pack: "_Packer") -> str:
    try:
        return orjson.dumps(pack(event)).decode()
    except (TypeError, ValueError):
        # Values that orjson refuses but Python's json module writes: NaN, keys that are not strings, lone surrogates.
        return serialize_value(event)


class _Serializers(dict[type[Any], ObjectSerializer[Any] | None]):
    """Dagster's serializer of a class, or None if the serializer does more than ``_Packer`` supports."""

    def __missing__(self, kind: type[Any]) -> ObjectSerializer[Any] | None:
        self[kind] = _find_serializer(kind)
        return self[kind]


def _find_serializer(kind: type[Any]) -> ObjectSerializer[Any] | None:
    serializer = SERIALIZABLE_CLASSES.object_serializers.get(kind.__name__)
    if (
        serializer is None
        or serializer.klass is not kind
        or type(serializer).pack_items is not ObjectSerializer.pack_items
    ):
        return None
    if serializer.skip_when_empty_fields or serializer.skip_when_none_fields:
        return None
    supported = all(isinstance(field, MetadataFieldSerializer) for field in serializer.field_serializers.values())
    return serializer if supported else None


_SERIALIZERS = _Serializers()


class _Packer:
    """Turn values into values that orjson accepts. An object that occurs again is kept as a fragment of JSON."""

    def __init__(self) -> None:
        # By id. The value includes the object, which keeps it alive, so that no other object gets its id.
        self._known: dict[object, tuple[object, orjson.Fragment | None]] = {}

    def __call__(self, value: Any) -> object:
        return value if type(value) in _PLAIN else self._once(id(value), value, self._packed)

    def _once(self, key: object, value: object, pack: Callable[[Any], object]) -> object:
        known = self._known.get(key)
        if known is None:
            self._known[key] = (value, None)
            return pack(value)
        _, fragment = known
        if fragment is None:
            fragment = orjson.Fragment(orjson.dumps(pack(value)))
            self._known[key] = (value, fragment)
        return fragment

    def _packed(self, value: Any) -> object:
        kind = type(value)
        # Most values are plain, and this test takes less time than a call.
        if kind is dict:
            return {key: item if type(item) in _PLAIN else self(item) for key, item in value.items()}
        if kind is list or kind is tuple:
            return [item if type(item) in _PLAIN else self(item) for item in value]
        if kind is float:
            if not isfinite(value):
                raise ValueError(value)
            return value
        serializer = _SERIALIZERS[kind]
        if serializer is None:
            packed = pack_value(value)
            return self._packed(packed) if type(packed) in (dict, list) else packed
        return self._object(value, serializer)

    def _object(self, value: Any, serializer: ObjectSerializer[Any]) -> dict[str, object]:
        """Pack an object as ``ObjectSerializer.pack_items`` does."""
        names, customs = serializer.storage_field_names, serializer.field_serializers
        packed: dict[str, object] = {"__class__": serializer.get_storage_name()}
        fields: Mapping[str, Any] = serializer.object_as_mapping(serializer.before_pack(value))
        for name, field in fields.items():
            if name in customs:
                field = [self._entry(label, entry) for label, entry in field.items()]
            elif type(field) not in _PLAIN:
                field = self(field)
            packed[names.get(name, name)] = field
        packed.update(serializer.old_fields)
        return packed

    def _entry(self, label: str, value: object) -> object:
        """Pack an entry of a metadata dict as MetadataFieldSerializer does."""

        def pack(value: object) -> dict[str, object]:
            return {"__class__": "EventMetadataEntry", "label": label, "entry_data": self(value), "description": None}

        return self._once((label, id(value)), value, pack)
