"""What a literal reference points at (https://hl7.org/fhir/R4/references.html#literal)."""

import re
from functools import lru_cache

from fhir_assets.fhir.validation.rules import load_rules

_RELATIVE = re.compile(
    r"([A-Za-z]+)(/[A-Za-z0-9\-.]{1,64}(/_history/[A-Za-z0-9\-.]{1,64})?(#[^\s]+)?|\?[^\s]+)"
).fullmatch
_REST_URL = re.compile(
    r"[a-z][a-z0-9+.\-]*:[^\s]*/([A-Z][A-Za-z]+)/[A-Za-z0-9\-.]{1,64}(/_history/[A-Za-z0-9\-.]{1,64})?(#[^\s]+)?"
).fullmatch
_ABSOLUTE = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*:[^\s]+").fullmatch

ANY = ""
"""The target of a reference that may be good, but does not tell its type."""


@lru_cache(maxsize=65_536)
def resolve_target_type(reference: str) -> str | None:
    """The resource type that a reference names (``Patient/1``, ``https://…/Patient/1/_history/2``,
    ``Patient?identifier=…``), ANY where it names none (``urn:uuid:…``, ``#contained``, other URLs), None if it
    is no reference, or one to a type that R4 has not.
    """
    if reference.startswith("#"):
        return None if re.search(r"\s", reference) else ANY
    relative = _RELATIVE(reference)
    if relative:
        return relative[1] if relative[1] in load_rules().resource_types else None
    found = _REST_URL(reference)
    if found and found[1] in load_rules().resource_types:
        return found[1]
    return ANY if _ABSOLUTE(reference) else None
