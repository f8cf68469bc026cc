"""The consent gate of a deployment, from CONSENT_POLICY and CONSENT_PURPOSE."""

from fhir_assets.privacy.consent import ConsentGate, Policy, Purpose
from fhir_assets.settings import Settings, SourceKind


def build_consent_gate(settings: Settings) -> ConsentGate:
    """Return the consent gate, which decides whose data is withheld from the tables."""
    return ConsentGate(
        Policy(settings.consent_policy),
        Purpose(settings.consent_purpose),
        by_file=settings.fhir_source is SourceKind.NDJSON,
    )
