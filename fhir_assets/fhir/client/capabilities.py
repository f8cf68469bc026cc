"""What a FHIR server says it can do (https://hl7.org/fhir/R4/capabilitystatement.html)."""

from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from fhir_assets.errors import NotFhir


@dataclass(frozen=True, slots=True)
class Capabilities:
    """``interactions`` holds the interaction codes by resource type; None for a type that lists none."""

    fhir_version: str | None
    interactions: Mapping[str, frozenset[str] | None]

    def offers(self, interaction: str) -> frozenset[str] | None:
        """The types that have the interaction (``search-type``, ``read``, ``update``…), or do not say what they
        have; None if the server names no types at all.
        """
        if not self.interactions:
            return None
        return frozenset(name for name, codes in self.interactions.items() if codes is None or interaction in codes)


class _Interaction(msgspec.Struct):
    code: str = ""


class _Resource(msgspec.Struct):
    type: str = ""
    interaction: list[_Interaction] = []


class _Rest(msgspec.Struct):
    mode: str = "server"
    resource: list[_Resource] = []


class _CapabilityStatement(msgspec.Struct):
    resourceType: str  # noqa: N815
    fhirVersion: str | None = None  # noqa: N815
    rest: list[_Rest] = []


_decoder = msgspec.json.Decoder(_CapabilityStatement)


def read_capabilities(body: bytes) -> Capabilities:
    """Read a CapabilityStatement. Raises ValueError if it is not JSON, NotFhir if it is not R4's: the rest of a
    sentence that begins with the server's name.
    """
    try:
        statement = _decoder.decode(body)
    except msgspec.ValidationError:
        raise NotFhir("answers /metadata with JSON that is no CapabilityStatement: is FHIR_BASE_URL right?") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise ValueError("not JSON") from None
    if statement.resourceType != "CapabilityStatement":
        raise NotFhir("answers /metadata with another resource than a CapabilityStatement: is FHIR_BASE_URL right?")
    if statement.fhirVersion and not statement.fhirVersion.startswith("4."):
        raise NotFhir("serves another version than FHIR R4 (4.0 or 4.3): is there an R4 base URL?")
    return Capabilities(
        statement.fhirVersion,
        {
            resource.type: frozenset(each.code for each in resource.interaction) or None
            for rest in statement.rest
            if rest.mode == "server"
            for resource in rest.resource
            if resource.type
        },
    )
