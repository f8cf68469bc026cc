"""The CapabilityStatement of the sandbox server."""

from collections.abc import Sequence

import orjson

from fhir_assets.sandbox.parameters import KIND, list_parameters

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
_COMMON = (("_id", "token"), ("_lastUpdated", "date"))


def build_capability_statement(base: str, resource_types: Sequence[str], date: str) -> bytes:
    """Return the CapabilityStatement as JSON (https://hl7.org/fhir/R4/capabilitystatement.html)."""
    return orjson.dumps(
        {
            "resourceType": "CapabilityStatement",
            "status": "active",
            "date": date,
            "kind": "instance",
            "software": {"name": "fhir-assets sandbox"},
            "implementation": {"description": "fhir-assets sandbox FHIR server", "url": base},
            "fhirVersion": "4.0.1",
            "format": ["application/fhir+json", "json"],
            "rest": [
                {
                    "mode": "server",
                    "resource": [_resource(name) for name in resource_types],
                    "interaction": [{"code": code} for code in ("transaction", "batch", "history-system")],
                }
            ],
        }
    )


def _resource(resource_type: str) -> dict[str, object]:
    parameters = _COMMON + tuple((name, KIND[name]) for name in list_parameters(resource_type))
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
