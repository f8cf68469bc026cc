"""The CapabilityStatement of the sandbox server."""

from collections.abc import Sequence

import orjson

from fhir_assets.sandbox.parameters import PARAMETER_TYPES, list_parameters

_INTERACTIONS = (
    "read",
    "vread",
    "update",
    "delete",
    "history-instance",
    "history-type",
    "create",
    "search-type",
)
_COMMON_PARAMETERS = (("_id", "token"), ("_lastUpdated", "date"))


def build_capability_statement(base_url: str, resource_types: Sequence[str], date: str) -> bytes:
    """Return the CapabilityStatement as JSON (https://hl7.org/fhir/R4/capabilitystatement.html).

    ``base_url`` is the URL of the server, ``date`` the date of the statement as a FHIR dateTime.
    """
    return orjson.dumps(
        {
            "resourceType": "CapabilityStatement",
            "status": "active",
            "date": date,
            "kind": "instance",
            "software": {"name": "fhir-assets sandbox"},
            "implementation": {"description": "fhir-assets sandbox FHIR server", "url": base_url},
            "fhirVersion": "4.0.1",
            "format": ["application/fhir+json", "json"],
            "rest": [
                {
                    "mode": "server",
                    "resource": [_describe_type(name) for name in resource_types],
                    "interaction": [{"code": code} for code in ("transaction", "batch", "history-system")],
                }
            ],
        }
    )


def _describe_type(resource_type: str) -> dict[str, object]:
    parameters = _COMMON_PARAMETERS + tuple((name, PARAMETER_TYPES[name]) for name in list_parameters(resource_type))
    return {
        "type": resource_type,
        "interaction": [{"code": code} for code in _INTERACTIONS],
        "versioning": "versioned",
        "readHistory": True,
        "updateCreate": True,
        "conditionalCreate": True,
        "conditionalRead": "not-match",
        "conditionalUpdate": True,
        "conditionalDelete": "single",
        "searchParam": [{"name": name, "type": kind} for name, kind in parameters],
    }
