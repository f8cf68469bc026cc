"""What to tell a person about denials of consent whose patient is not known."""


def describe_unknown_denials(count: int) -> str:
    """Describe the effect of Consents that deny and whose patient is not known, and what to do about them."""
    return (
        f"{count} Consents deny, and their patient is not known: resources that arrived in the same file or request, "
        "and those with the same identifier, are withheld. Load the Patient with this identifier, or correct "
        "Consent.patient at the source; `fhir-assets consents list` shows the decisions"
    )
