"""JSON Patch (RFC 6902) of a resource, its digits untouched."""

from decimal import Decimal
from typing import Any

import jsonpatch
import jsonpointer
import msgspec

from fhir_assets.errors import CorrectionRefused

_parse = msgspec.json.Decoder(float_hook=Decimal).decode
_encode = msgspec.json.Encoder(decimal_format="number").encode


def apply_patch(resource: bytes, patch: bytes) -> bytes:
    """``resource`` after the operations of ``patch``, on one line.

    Raises CorrectionRefused, which names the operation that does not fit; no value of either is in it.
    """
    try:
        value: Any = _parse(resource)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise CorrectionRefused(
            "the dead letter's resource is no JSON, so it cannot be patched: give the whole resource with --resource"
        ) from None
    try:
        operations = _parse(patch)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise CorrectionRefused("the patch is no JSON: it must be an array of operations (RFC 6902)") from None
    if not isinstance(operations, list):
        raise CorrectionRefused("the patch is no array of operations (RFC 6902)")
    for number, operation in enumerate(operations, 1):
        try:
            value = jsonpatch.JsonPatch([operation]).apply(value)
        except (jsonpatch.JsonPatchException, jsonpointer.JsonPointerException, KeyError, TypeError, AttributeError):
            what = operation.get("op") if isinstance(operation, dict) else None
            raise CorrectionRefused(
                f"operation {number} of the patch ({what or 'no operation'}) does not fit the resource: see that its "
                "path is there (`fhir-assets dead-letters show ID --resource`)"
            ) from None
    return _encode(value)
