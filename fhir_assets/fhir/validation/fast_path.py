"""The fast path of validation: runs the compiled rules on bytes and accepts resources without any issue.

The fast path only answers yes or no. Every resource that it does not accept is validated again by the walker (module
``walker``), which reports the issues.
"""

import re
from functools import cache
from typing import Any

import msgspec

from fhir_assets.fhir.validation.contained import ContainedScope
from fhir_assets.fhir.validation.fast_compiler import CompiledType, FastPathCompiler
from fhir_assets.fhir.validation.rules import load_rules

_START = b'{"resourceType":"'
"""The beginning of most resources, from which the type is read without decoding the JSON."""
_find_escaped_control_character = re.compile(rb"\\(?:u00|[bf])").search


class _Type(msgspec.Struct, rename="camel"):
    resource_type: str


_type = msgspec.json.Decoder(_Type)
_encode = msgspec.json.Encoder().encode


BASE_DEPTH = 20
"""The maximum JSON nesting, in levels, of a resource with contained resources but without recursive structures."""
DEPTH_PER_RECURSION = 14
"""The JSON levels that one recursive structure may add."""


@cache
def get_compiler() -> FastPathCompiler:
    """Return the compiler that all instances in this process share."""
    return FastPathCompiler(load_rules())


class FastPath:
    """Accepts resources without any issue, up to a nesting of ``max_depth`` levels. Threads may share an instance."""

    def __init__(self, max_depth: int) -> None:
        self._recursions = (max_depth - BASE_DEPTH) // DEPTH_PER_RECURSION
        self._compiled: dict[bytes, CompiledType] = {}
        self._empty_scope = ContainedScope(self._accept_contained)

    def accepts(self, body: bytes) -> bool:
        """Return True if the body is a resource without any issue. False means that the walker must decide.

        Does not raise for any input.
        """
        try:
            if self._recursions < 0 or (b"\\" in body and _find_escaped_control_character(body)):
                return False
            resource, compiled = self._decode(body)
            if compiled is None:
                return False
            if not compiled.may_contain or resource.contained is None:
                return compiled.check(resource, self._empty_scope, self._recursions)
            scope = ContainedScope(self._accept_contained)
            return scope.register(resource.contained) and compiled.check(resource, scope, self._recursions)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return False

    def _accept_contained(self, body: msgspec.Raw, scope: ContainedScope) -> bool:
        resource, compiled = self._decode(bytes(body))
        return compiled is not None and may_be_contained(resource) and compiled.check(resource, scope, self._recursions)

    def _decode(self, body: bytes) -> tuple[Any, CompiledType | None]:
        """Return the resource as a Struct, and its compiled type or None if the resource cannot be accepted.

        The type is None if it is unknown, or if the resource may contain a property twice.
        """
        if body.startswith(_START):
            name = body[len(_START) : body.find(b'"', len(_START))]
        else:
            name = _type.decode(body).resource_type.encode()
        compiled = self._compiled.get(name)
        if compiled is None:
            type_name = name.decode()
            if type_name not in load_rules().resource_types:
                return None, None
            compiled = self._compiled[name] = get_compiler().get_compiled(type_name)
        resource = compiled.decode(body)
        # If a property is duplicated, the decoder keeps one of the two, so the encoded resource has fewer colons than
        # the body. Colons within strings are in both.
        return resource, compiled if body.count(b":") == _encode(resource).count(b":") else None


def may_be_contained(resource: Any) -> bool:
    """Return True if a contained resource satisfies the invariants dom-2, dom-4 and dom-5."""
    meta = resource.meta
    return getattr(resource, "contained", None) is None and (
        meta is None or (meta.versionId is None and meta.lastUpdated is None and meta.security is None)
    )
