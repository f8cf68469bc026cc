"""The target types of literal references (https://hl7.org/fhir/R4/references.html#literal)."""

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
"""The target type of a valid reference that does not name a resource type."""


@lru_cache(maxsize=65_536)
def resolve_target_type(reference: str) -> str | None:
    """Return the resource type that a literal reference names.

    Returns the type for ``Patient/1``, ``https://…/Patient/1/_history/2`` and ``Patient?identifier=…``; ANY for
    ``urn:uuid:…``, ``#contained`` and other URLs; None if the text is not a reference, or if R4 does not define the
    type.
    """
    if reference.startswith("#"):
        return None if re.search(r"\s", reference) else ANY
    relative = _RELATIVE(reference)
    if relative:
        return relative[1] if relative[1] in load_rules().resource_types else None
    rest_url = _REST_URL(reference)
    if rest_url and rest_url[1] in load_rules().resource_types:
        return rest_url[1]
    return ANY if _ABSOLUTE(reference) else None
