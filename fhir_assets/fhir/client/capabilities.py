"""The capabilities that a FHIR server declares (https://hl7.org/fhir/R4/capabilitystatement.html)."""

from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from fhir_assets.errors import NotFhir
from fhir_assets.fhir.labels import DEFAULT_LABELS, ServerLabels


@dataclass(frozen=True, slots=True)
class Capabilities:
    """The FHIR version and the interactions of a server.

    ``interactions`` maps a resource type to its interaction codes, or to None if the server lists none for the type.
    """

    fhir_version: str | None
    interactions: Mapping[str, frozenset[str] | None]

    def list_types(self, interaction: str) -> frozenset[str] | None:
        """Return the types that have an interaction such as ``search-type``, ``read`` or ``update``.

        A type without a list of interactions counts as having it. Returns None if the server names no types at all.
        """
        if not self.interactions:
            return None
        return frozenset(name for name, codes in self.interactions.items() if codes is None or interaction in codes)


class _Interaction(msgspec.Struct):
    code: str = ""


class _Resource(msgspec.Struct):
    type: str = ""
    interaction: list[_Interaction] | None = None


class _Rest(msgspec.Struct):
    mode: str = "server"
    resource: list[_Resource] | None = None


class _CapabilityStatement(msgspec.Struct, rename="camel"):
    resource_type: str
    fhir_version: str | None = None
    rest: list[_Rest] | None = None


_decoder = msgspec.json.Decoder(_CapabilityStatement)


def parse_capabilities(body: bytes, labels: ServerLabels = DEFAULT_LABELS) -> Capabilities:
    """Parse a CapabilityStatement of R4.

    Raises ValueError if ``body`` is not JSON, and NotFhir if it is JSON but not a CapabilityStatement of R4. The
    message of NotFhir is a predicate: the caller puts the server's URL before it.
    """
    try:
        statement = _decoder.decode(body)
    except msgspec.ValidationError:
        raise NotFhir(
            f"answers /metadata with JSON that is not a CapabilityStatement: is {labels.base_url} right?"
        ) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise ValueError("not JSON") from None
    if statement.resource_type != "CapabilityStatement":
        raise NotFhir(
            f"answers /metadata with a resource other than a CapabilityStatement: is {labels.base_url} right?"
        )
    if statement.fhir_version and not statement.fhir_version.startswith("4."):
        raise NotFhir("serves a FHIR version other than R4 (4.0 or 4.3): is there an R4 base URL?")
    return Capabilities(
        statement.fhir_version,
        {
            resource.type: frozenset(interaction.code for interaction in resource.interaction or ()) or None
            for rest in statement.rest or ()
            if rest.mode == "server"
            for resource in rest.resource or ()
            if resource.type
        },
    )
