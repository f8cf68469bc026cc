"""JSON Patch (RFC 6902) of a resource. The digits of its decimals are preserved."""

from decimal import Decimal
from typing import Any

import jsonpatch
import jsonpointer
import msgspec

from fhir_assets.errors import CorrectionRefused

_parse = msgspec.json.Decoder(float_hook=Decimal).decode
_encode = msgspec.json.Encoder(decimal_format="number").encode


def apply_patch(resource: bytes, patch: bytes) -> bytes:
    """Apply the operations of ``patch`` to ``resource`` and return the result as JSON on one line.

    Raises CorrectionRefused with the number of the operation that cannot be applied. The message contains no value of
    the resource or of the patch.
    """
    try:
        value: Any = _parse(resource)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise CorrectionRefused(
            "the dead letter's resource is not JSON, so it cannot be patched: pass the resource with --resource"
        ) from None
    try:
        operations = _parse(patch)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise CorrectionRefused("the patch is not JSON: it must be an array of operations (RFC 6902)") from None
    if not isinstance(operations, list):
        raise CorrectionRefused("the patch is not an array of operations (RFC 6902)")
    for number, operation in enumerate(operations, 1):
        try:
            value = jsonpatch.JsonPatch([operation]).apply(value)
        except (jsonpatch.JsonPatchException, jsonpointer.JsonPointerException, KeyError, TypeError, AttributeError):
            name = operation.get("op") if isinstance(operation, dict) else None
            raise CorrectionRefused(
                f"operation {number} of the patch ({name or 'no operation'}) does not fit the resource: check that "
                "its path exists (`fhir-assets dead-letters show ID --resource`)"
            ) from None
    return _encode(value)
