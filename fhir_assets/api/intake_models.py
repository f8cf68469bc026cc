"""Response models of the routes of intake.py, and the OpenAPI descriptions of their request bodies."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, Field

from fhir_assets.fhir.intake.schemas import load_schema

FHIR_JSON = "application/fhir+json"


def without_keywords(json_schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return a JSON Schema without its ``$`` keywords, for use in an OpenAPI document."""
    return {name: value for name, value in json_schema.items() if not name.startswith("$")}


class IssueFound(BaseModel):
    """An issue that validation found. It never contains a value of the record."""

    severity: Literal["error", "warning"]
    rule: str = Field(examples=["required-binding"])
    path: str = Field(examples=["Patient.gender"])
    message: str


class RecordResult(BaseModel):
    """The result for one record: accepted, or rejected with its issues."""

    index: int
    status: Literal["accepted", "rejected"]
    resource_type: str | None = Field(examples=["Patient"])
    id: str | None = Field(description="The id of the resource, for look-ups")
    issues: list[IssueFound]


class IntakeResult(BaseModel):
    """The answer to a submission. Accepted records are stored in `raw`, and a later run loads them into the tables."""

    request_id: str
    task_id: str | None = Field(
        description="The id of the task; its status is at /ingest/tasks/{task_id}. Null if nothing was accepted",
        examples=["records-3f9a1c2b7d604e583f9a1c2b7d604e58"],
    )
    accepted: int
    rejected: int
    results: list[RecordResult]


class RecordsTask(BaseModel):
    """The progress of a post to /api/v1/ingest or /fhir. What is not known until all of it is loaded is null before."""

    task_id: str = Field(examples=["records-3f9a1c2b7d604e583f9a1c2b7d604e58"])
    status: Literal["received", "loaded"] = Field(description="`received`: in raw; `loaded`: the load has ended")
    records_received: int
    records_rejected: int
    resources: int = Field(description="The resources of the accepted records")
    loaded: int | None = Field(description="Those that are in the tables")
    withheld: int | None = Field(description="Those that consent keeps out of the tables now")
    dead_letters: int | None = Field(description="Those that became dead letters")
    run_ids: list[str] = Field(description="The runs that loaded them")


RECORDS_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["records"],
                    "additionalProperties": False,
                    "properties": {
                        "records": {
                            "type": "array",
                            "items": {
                                "anyOf": [
                                    without_keywords(load_schema("patient_record")),
                                    without_keywords(load_schema("observation_record")),
                                    without_keywords(load_schema("clinical_record")),
                                    {
                                        "type": "object",
                                        "title": "A FHIR R4 resource",
                                        "required": ["resourceType"],
                                        "properties": {"resourceType": {"type": "string"}},
                                    },
                                ]
                            },
                        }
                    },
                },
                "example": {
                    "records": [
                        {
                            "resourceType": "Patient",
                            "mrn": "MRN-0001",
                            "name": {"first": "Ada", "last": "Example"},
                            "birthDate": "1970-01-31",
                            "gender": "female",
                            "consent": {"data_sharing": True, "research": False},
                        },
                        {
                            "resourceType": "Observation",
                            "mrn": "MRN-0001",
                            "code": "8867-4",
                            "value": 72,
                            "unit": "/min",
                            "effectiveDateTime": "2026-01-30T08:15:00+01:00",
                        },
                        {"resourceType": "Condition", "mrn": "MRN-0001", "code": "Asthma", "date": "2026-01-30"},
                        {
                            "resourceType": "Observation",
                            "status": "final",
                            "code": {"text": "Heart rate"},
                            "subject": {"reference": "Patient/example"},
                        },
                    ]
                },
            }
        },
    }
}
FHIR_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            FHIR_JSON: {
                "schema": {
                    "type": "object",
                    "required": ["resourceType"],
                    "properties": {"resourceType": {"type": "string"}},
                },
                "example": {"resourceType": "Patient", "id": "example", "gender": "female"},
            }
        },
    }
}
OPERATION_OUTCOME = {
    "content": {
        FHIR_JSON: {
            "schema": {
                "type": "object",
                "required": ["resourceType", "issue"],
                "properties": {"resourceType": {"const": "OperationOutcome"}, "issue": {"type": "array"}},
            },
            "example": {
                "resourceType": "OperationOutcome",
                "issue": [
                    {
                        "severity": "error",
                        "code": "code-invalid",
                        "diagnostics": "not one of the codes that are allowed here",
                        "expression": ["Bundle.entry[1].resource.gender"],
                    }
                ],
            },
        }
    }
}
