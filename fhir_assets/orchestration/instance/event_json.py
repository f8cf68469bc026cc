"""Dagster's events as the JSON that Dagster keeps, packed faster: what many events of a batch share is packed once.

A range of windows tells the same of each window: of a hundred materializations all differ in partition and time, and
hardly one in its step, its asset or its metadata. Dagster packs each event from the ground up, which was a third of the
time of a run whose windows are empty.
"""

from collections.abc import Callable, Iterable, Mapping
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


def texts(events: Iterable[dg.EventLogEntry]) -> list[str]:
    """As ``serialize_value`` of each: Dagster reads the same from it."""
    pack = _Packing()
    return [_text(event, pack) for event in events]


def _text(event: dg.EventLogEntry, pack: "_Packing") -> str:
    try:
        return orjson.dumps(pack(event)).decode()
    except (TypeError, ValueError):
        # What JSON does not know but Python writes: NaN, keys that are no text, half a character.
        return serialize_value(event)


class _Serializers(dict[type[Any], ObjectSerializer[Any] | None]):
    """What Dagster packs a class with, if it does no more than ``_Packing`` knows of."""

    def __missing__(self, kind: type[Any]) -> ObjectSerializer[Any] | None:
        self[kind] = _simple(kind)
        return self[kind]


def _simple(kind: type[Any]) -> ObjectSerializer[Any] | None:
    found = SERIALIZABLE_CLASSES.object_serializers.get(kind.__name__)
    if found is None or found.klass is not kind or type(found).pack_items is not ObjectSerializer.pack_items:
        return None
    if found.skip_when_empty_fields or found.skip_when_none_fields:
        return None
    known = all(isinstance(each, MetadataFieldSerializer) for each in found.field_serializers.values())
    return found if known else None


_SERIALIZERS = _Serializers()


class _Packing:
    """Makes of values what orjson takes. An object that comes by again is from then on a piece of text."""

    def __init__(self) -> None:
        # With each object, so that it lives on and no other gets its id.
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
        # Most values are plain, and a call of each costs more than the question.
        if kind is dict:
            return {key: each if type(each) in _PLAIN else self(each) for key, each in value.items()}
        if kind is list or kind is tuple:
            return [each if type(each) in _PLAIN else self(each) for each in value]
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
        """As ``ObjectSerializer.pack_items`` has it."""
        names, customs = serializer.storage_field_names, serializer.field_serializers
        packed: dict[str, object] = {"__class__": serializer.get_storage_name()}
        fields: Mapping[str, Any] = serializer.object_as_mapping(serializer.before_pack(value))
        for name, field in fields.items():
            if name in customs:
                field = [self._entry(label, each) for label, each in field.items()]
            elif type(field) not in _PLAIN:
                field = self(field)
            packed[names.get(name, name)] = field
        packed.update(serializer.old_fields)
        return packed

    def _entry(self, label: str, value: object) -> object:
        """An entry of a metadata dict, as MetadataFieldSerializer has it."""

        def pack(value: object) -> dict[str, object]:
            return {"__class__": "EventMetadataEntry", "label": label, "entry_data": self(value), "description": None}

        return self._once((label, id(value)), value, pack)
