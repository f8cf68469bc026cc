"""Failures of single resource types, collected so that one type does not stop the others."""

from collections.abc import Iterator
from contextlib import contextmanager

from fhir_assets.errors import FhirAssetsError, NotFhir, ServerRefused, ServerUnavailable


class TypeFailures:
    """The types whose requests a server refused, or answered with errors, with the error of each.

    Other errors (of the database, the store, the settings) are not collected, because they concern all types.
    """

    def __init__(self) -> None:
        self.errors: dict[str, ServerRefused | ServerUnavailable | NotFhir] = {}

    def __contains__(self, resource_type: str) -> bool:
        return resource_type in self.errors

    def __len__(self) -> int:
        return len(self.errors)

    @contextmanager
    def collect(self, resource_type: str) -> Iterator[None]:
        """Collect the error that the block raises about ``resource_type``, instead of raising it."""
        try:
            yield
        except (ServerRefused, ServerUnavailable, NotFhir) as error:
            self.errors[resource_type] = error

    def raise_collected(self) -> None:
        """Raise the collected errors as one, whose message names the types of each; do nothing if there are none.

        The class is that of the first error.
        """
        if not self.errors:
            return
        types: dict[str, list[str]] = {}
        for name, error in self.errors.items():
            types.setdefault(str(error), []).append(name)
        raise _family(next(iter(self.errors.values())))(
            "; ".join(f"{', '.join(names)}: {message}" for message, names in types.items())
        )


def _family(error: FhirAssetsError) -> type[FhirAssetsError]:
    """Return the class of the hierarchy in errors.py to which the error belongs."""
    return next(family for family in (ServerRefused, ServerUnavailable, NotFhir) if isinstance(error, family))
