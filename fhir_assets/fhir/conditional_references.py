"""Conditional references by identifier, such as ``Patient?identifier=system|value``.

See https://hl7.org/fhir/R4/http.html#trules. A *condition* is the search of such a reference: ``?Patient#<hash>``, the
type and the token of the identifier. The column ``identifiers`` of ``fhir.resource`` contains the tokens of the
resource itself (``#<hash>``), its conditions, and the marks WAITING and UNIDENTIFIED.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from urllib.parse import unquote

import msgspec

from fhir_assets.fhir.identifier_tokens import HashIdentifier, build_search_token
from fhir_assets.fhir.references import CONDITIONAL, Bases

WAITING = "?"
"""Marks resources with a condition that no single resource meets, or whose references were never examined."""

UNIDENTIFIED = "-"
"""Marks resources with conditions whose own identifiers were not determined."""

_REFERENCE = re.compile(rb'("reference"\s*:\s*)("(?:[^"\\]|\\.)*")')
_TYPE = re.compile(r"[A-Z][A-Za-z]+").fullmatch
_SEPARATOR = re.compile(r"(?<!\\)\|")
_LIST = re.compile(r"(?<!\\),").search
_parse_text = msgspec.json.Decoder(str).decode


def has_conditional(keyless: tuple[str, ...]) -> bool:
    """Return whether a description of references (``references.find_keyless``) has a conditional one."""
    return any(form.startswith(CONDITIONAL) for form in keyless)


def list_conditions(body: bytes, bases: Bases, hash_identifier: HashIdentifier) -> Iterator[str]:
    """Yield the conditions of a resource, given as JSON."""
    if b"?identifier" in body or b"\\u003" in body:
        for match in _REFERENCE.finditer(body):
            if condition := _read_condition(match[2], bases, hash_identifier):
                yield condition


def resolve(body: bytes, targets: Mapping[str, str], bases: Bases, hash_identifier: HashIdentifier) -> bytes:
    """Return a resource in which conditional references are replaced by references to the ids in ``targets``.

    ``targets`` are given by condition.
    """

    def replace(match: re.Match[bytes]) -> bytes:
        condition = _read_condition(match[2], bases, hash_identifier)
        target = targets.get(condition) if condition else None
        if condition is None or target is None:
            return match[0]
        return match[1] + msgspec.json.encode(f"{get_type(condition)}/{target}")

    return _REFERENCE.sub(replace, body)


def list_identifiers(
    own: Iterable[str] | None, conditions: Iterable[str], targets: Mapping[str, str]
) -> tuple[str, ...] | None:
    """Return the value of the column ``identifiers``. ``own`` are the tokens of the resource, None if not known."""
    asked = tuple(conditions)
    if not asked:
        return None if own is None else tuple(own)
    marks = [WAITING] if any(condition not in targets for condition in asked) else []
    return (*([UNIDENTIFIED] if own is None else own), *asked, *marks)


def find_unmet(conditions: Mapping[str, Iterable[str]], targets: Mapping[str, str]) -> list[str]:
    """Return the resources with a condition that has no target, from their conditions by id."""
    return [
        resource_id for resource_id, asked in conditions.items() if any(condition not in targets for condition in asked)
    ]


def get_type(condition: str) -> str:
    """Return the resource type of a condition."""
    return condition[1:].partition("#")[0]


def _read_condition(encoded: bytes, bases: Bases, hash_identifier: HashIdentifier) -> str | None:
    """Return the condition of a reference; None for any other reference and for other search parameters."""
    if b"?" not in encoded and b"\\u003" not in encoded:
        return None
    path, question, query = _parse_text(encoded).partition("?")
    base, _, resource_type = path.rpartition("/")
    if not question or not _TYPE(resource_type) or (base and bases is not None and base not in bases):
        return None
    name, _, text = query.partition("=")
    value = unquote(text)
    if name != "identifier" or "&" in text or _LIST(value):
        return None
    parts = [part.replace("\\|", "|").replace("\\,", ",") for part in _SEPARATOR.split(value, maxsplit=1)]
    if not parts[-1].strip():
        return None
    token = build_search_token(parts[0] if len(parts) == 2 else None, parts[-1], hash_identifier)
    return f"?{resource_type}{token}"
