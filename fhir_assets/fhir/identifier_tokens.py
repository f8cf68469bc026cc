"""Tokens of identifiers: hashes by which resources are found without their identifiers being stored in clear text."""

from collections.abc import Callable, Iterator
from typing import Any

HashIdentifier = Callable[[bytes], bytes]
"""Hashes an identifier, keyed if there are keys."""

_TOKEN = "#"
"""The prefix of every token."""


def list_tokens(identifiers: Any, hash_identifier: HashIdentifier) -> Iterator[str]:
    """Yield the tokens by which a person with these identifiers can be found."""
    for system, value in map(read_identifier, identifiers if isinstance(identifiers, list) else ()):
        if value:
            yield build_token(f"s:{system}|{value}" if system else f"n:{value}", hash_identifier)
            yield build_token(f"v:{value}", hash_identifier)


def list_own_tokens(identifier: Any, hash_identifier: HashIdentifier) -> tuple[str, ...]:
    """Return the tokens of the element ``identifier`` of a resource, which does not repeat in some types."""
    return tuple(
        dict.fromkeys(list_tokens([identifier] if isinstance(identifier, dict) else identifier, hash_identifier))
    )


def build_search_token(system: str | None, value: str, hash_identifier: HashIdentifier) -> str:
    """Return the token of the resources that ``identifier=system|value`` finds.

    An empty ``system`` (``|value``) finds identifiers without a system, None (``value``) those of any system
    (https://hl7.org/fhir/R4/search.html#token).
    """
    kind = "v:" if system is None else f"s:{system.strip()}|" if system.strip() else "n:"
    return build_token(f"{kind}{value.strip()}", hash_identifier)


def read_identifier(identifier: Any) -> tuple[str, str]:
    """Return system and value of an identifier without surrounding white space, each empty if it is absent."""
    if not isinstance(identifier, dict):
        return "", ""
    system, value = identifier.get("system"), identifier.get("value")
    return (system.strip() if isinstance(system, str) else ""), (value.strip() if isinstance(value, str) else "")


def build_token(text: str, hash_identifier: HashIdentifier) -> str:
    """Return the token of a text."""
    return _TOKEN + hash_identifier(text.encode("utf-8", "surrogatepass")).hex()
