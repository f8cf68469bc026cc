"""The check ``patients_known`` of deployments with a consent policy: the patients whom resources and Consents name."""

from dataclasses import dataclass, field
from typing import Any

import dagster as dg

from fhir_assets.orchestration.checks.metadata import rows_table
from fhir_assets.pipeline.consent.unknown_denials import describe_unknown_denials
from fhir_assets.privacy.consent import ConsentGate
from fhir_assets.warehouse.ops import consents, withheld_changes
from fhir_assets.warehouse.postgres.db.connections import Connection

DESCRIPTION = "The patients whom resources and Consents name are known."


@dataclass(frozen=True, slots=True)
class KnownPatients:
    """The result of the check for one resource type."""

    description: str
    passed: bool = True
    severity: dg.AssetCheckSeverity = dg.AssetCheckSeverity.WARN
    metadata: dict[str, Any] = field(default_factory=dict)


def evaluate_known_patients(conn: Connection, consent_gate: ConsentGate, resource_type: str) -> KnownPatients:
    """Return the result for a type. A denial whose patient is not known is an error, a withheld resource a warning."""
    unresolved = withheld_changes.count_unresolved(conn, resource_type)
    total = sum(count for _, count in unresolved)
    faults = []
    if total:
        forms = ", ".join(f"{count} by {form}" for form, count in unresolved)
        faults.append(
            f"{total} resources are withheld because their patient is not known ({forms}). Load the Patients with "
            "these identifiers, or have the source refer to them as Patient/id; if the URLs of the references are the "
            "source's own, set FHIR_LINK_BASE"
        )
    denials = dead = 0
    if resource_type == "Consent":
        denials = consents.count_unknown_denials(conn, consent_gate)
        dead = consents.count_dead_consents(conn)
        if denials:
            faults.append(describe_unknown_denials(denials))
        if dead:
            faults.append(
                f"{dead} Consents are dead letters. Those that may deny withhold the resources of their patients, or "
                "of the same file or request if their patient is not known. Correct or discard them "
                "(`fhir-assets dead-letters list --type Consent`)"
            )
    return KnownPatients(
        "; ".join(faults) or "all patients are known",
        not faults,
        dg.AssetCheckSeverity.ERROR if denials or dead else dg.AssetCheckSeverity.WARN,
        {
            "withheld": total,
            "unknown_denials": denials,
            "by_form": rows_table(("form", "resources:int"), unresolved),
        },
    )
