"""Runs the compiled rules on bytes: True for a resource that is surely good, with no issue at all."""

import re
from functools import cache
from typing import Any

import msgspec

from fhir_assets.fhir.validation.compiled import Compiler
from fhir_assets.fhir.validation.rules import load_rules
from fhir_assets.fhir.validation.scope import FastScope

_TYPE_FIRST = re.compile(rb'\s*\{\s*"resourceType"\s*:\s*"([A-Za-z]+)"').match
_CONTROL = re.compile(rb"\\(?:u00|[bf])").search


class _Type(msgspec.Struct):
    resourceType: str  # noqa: N815


_type = msgspec.json.Decoder(_Type)
_encode = msgspec.json.Encoder().encode


@cache
def compiler() -> Compiler:
    """The compiler of the process."""
    return Compiler(load_rules())


def accepts(body: bytes, max_depth: int) -> bool:
    """Is the body surely a resource without any issue? False says nothing. Never raises."""
    try:
        if b"\\" in body and _CONTROL(body):
            return False
        return _accept(body, None, max_depth)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return False


def _accept(body: Any, container: FastScope | None, max_depth: int) -> bool:
    first = _TYPE_FIRST(body)
    name = first[1].decode() if first else _type.decode(body).resourceType
    rules = load_rules()
    if name not in rules.resource_types:
        return False
    decoder, check = compiler().compiled(name)
    resource = decoder.decode(body)
    again = _encode(resource)
    # Names that stand twice are decoded once, so a colon is missing. Colons in strings are the same in both.
    if bytes(body).count(b":") != again.count(b":") or b"{}" in again:
        return False
    contained = getattr(resource, "contained", None)
    if container is None:
        if (again.count(b"{") + again.count(b"[")) > max_depth and not is_shallow(again, max_depth):
            return False
        scope = FastScope(name, lambda inner, outer: _accept(inner, outer, max_depth))
        if contained is not None and not scope.announce(contained):
            return False
    else:
        scope = container
        meta = resource.meta
        if contained is not None or (
            meta is not None
            and (meta.versionId is not None or meta.lastUpdated is not None or meta.security is not None)
        ):
            return False
    return check(resource, scope)


_OTHERS = bytes(set(range(256)) - set(b"{}[]"))


def is_shallow(body: bytes, max_depth: int) -> bool:
    """Is the nesting at most ``max_depth``? Brackets in strings that do not pair make it False."""
    brackets = body.translate(None, _OTHERS)
    for _ in range(max_depth):
        brackets = brackets.replace(b"{}", b"").replace(b"[]", b"")
        if not brackets:
            return True
    return False
