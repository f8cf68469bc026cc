"""Runs the compiled rules on bytes: True for a resource that is surely good, with no issue at all."""

import re
from functools import cache
from typing import Any

import msgspec

from fhir_assets.fhir.validation.contained import ContainedScope
from fhir_assets.fhir.validation.fast_compiler import CompiledType, FastPathCompiler
from fhir_assets.fhir.validation.rules import load_rules

_START = b'{"resourceType":"'
_CONTROL = re.compile(rb"\\(?:u00|[bf])").search


class _Type(msgspec.Struct):
    resourceType: str  # noqa: N815


_type = msgspec.json.Decoder(_Type)
_encode = msgspec.json.Encoder().encode


DEPTH = 20
DEPTH_OF_RECURRENCE = 14
"""The deepest nesting of a resource and what it contains, without structures that recur; how much each adds."""


@cache
def compiler() -> FastPathCompiler:
    """The compiler of the process."""
    return FastPathCompiler(load_rules())


class FastPath:
    """Accepts or passes on. Holds no state of a check."""

    def __init__(self, max_depth: int) -> None:
        self._recurrences = (max_depth - DEPTH) // DEPTH_OF_RECURRENCE
        self._compiled: dict[bytes, CompiledType] = {}
        self._plain_scope = ContainedScope(self._accept_contained)

    def accepts(self, body: bytes) -> bool:
        """Is the body surely a resource without any issue? False says nothing. Never raises."""
        try:
            if self._recurrences < 0 or (b"\\" in body and _CONTROL(body)):
                return False
            resource, compiled = self._decode(body)
            if compiled is None:
                return False
            if not compiled.may_contain or resource.contained is None:
                return compiled.check(resource, self._plain_scope, self._recurrences)
            scope = ContainedScope(self._accept_contained)
            return scope.announce(resource.contained) and compiled.check(resource, scope, self._recurrences)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return False

    def _accept_contained(self, body: msgspec.Raw, scope: ContainedScope) -> bool:
        resource, compiled = self._decode(bytes(body))
        return (
            compiled is not None
            and is_fit_to_be_contained(resource)
            and compiled.check(resource, scope, self._recurrences)
        )

    def _decode(self, body: bytes) -> tuple[Any, CompiledType | None]:
        """The resource as a Struct with its compiled type; None for the type when a name may stand twice."""
        if body.startswith(_START):
            name = body[len(_START) : body.find(b'"', len(_START))]
        else:
            name = _type.decode(body).resourceType.encode()
        compiled = self._compiled.get(name)
        if compiled is None:
            known = name.decode()
            if known not in load_rules().resource_types:
                return None, None
            compiled = self._compiled[name] = compiler().compiled(known)
        resource = compiled.decode(body)
        # A name that stands twice is decoded once, so its colon is missing. Those in strings are in both.
        return resource, compiled if body.count(b":") == _encode(resource).count(b":") else None


def is_fit_to_be_contained(resource: Any) -> bool:
    """dom-2, dom-4 and dom-5 for a contained resource."""
    meta = resource.meta
    return getattr(resource, "contained", None) is None and (
        meta is None or (meta.versionId is None and meta.lastUpdated is None and meta.security is None)
    )
