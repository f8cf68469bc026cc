"""Decisions from Consent resources, for each rule of privacy/consent.py."""

from datetime import UTC, datetime
from typing import Any

import pytest

from fhir_assets.privacy.consent import Consent, Purpose, decide, next_change, read_consent

NOW = datetime(2024, 6, 15, 12, tzinfo=UTC)
SHARING, RESEARCH = Purpose


def consent(
    provision: dict[str, Any] | None = None, *, scope: str | dict[str, Any] = "patient-privacy", **more: Any
) -> Consent | None:
    resource = {
        "resourceType": "Consent",
        "id": more.pop("id", "c"),
        "status": "active",
        "scope": {"coding": [{"code": scope}]} if isinstance(scope, str) else scope,
        **({"provision": provision} if provision is not None else {}),
        **more,
    }
    return read_consent(resource, "p")


def decide_all(*consents: Consent | None) -> tuple[str | None, str | None]:
    """Return the verdicts for data sharing and for research."""
    readable = [consent for consent in consents if consent]
    sharing, research = [decide(readable, purpose, NOW) for purpose in Purpose]
    return (sharing.verdict if sharing else None), (research.verdict if research else None)


def purpose(*codes: str) -> dict[str, Any]:
    return {"purpose": [{"code": code} for code in codes]}


PERMIT: dict[str, Any] = {"type": "permit"}
DENY: dict[str, Any] = {"type": "deny"}


@pytest.mark.parametrize(
    ("resource", "expected"),
    [
        (consent(PERMIT), ("permit", "permit")),
        (consent(DENY), ("deny", "deny")),
        (consent(PERMIT, scope="research"), (None, "permit")),
        (consent(PERMIT, scope="treatment"), (None, None)),
        (consent(PERMIT, scope="adr"), (None, None)),
        (consent(PERMIT, status="proposed"), (None, None)),
        (consent(PERMIT, status="rejected"), (None, None)),
        (consent(DENY, status="inactive"), (None, None)),
        (consent(DENY, status="entered-in-error"), (None, None)),
        (consent({**PERMIT, **purpose("HRESCH")}), (None, "permit")),
        (consent({**DENY, **purpose("TREAT", "HPAYMT")}), ("deny", None)),
        (consent({**DENY, **purpose("HMARKT")}), (None, None)),
        (consent({**PERMIT, "provision": [{**DENY, **purpose("HRESCH")}]}), ("permit", "deny")),
        (consent({**DENY, "provision": [{**PERMIT, **purpose("HRESCH")}]}), ("deny", "permit")),
        (consent({**DENY, "provision": [{**PERMIT, "provision": [DENY]}]}), ("deny", "deny")),
        (consent({**DENY, "provision": [PERMIT, {**DENY, **purpose("HRESCH")}]}), ("permit", "deny")),
        (consent({"provision": [{**PERMIT, **purpose("HRESCH")}]}), (None, "permit")),
        (consent(policyRule={"coding": [{"code": "OPTIN"}]}), ("permit", "permit")),
        (
            consent({"provision": [{**PERMIT, **purpose("HRESCH")}]}, policyRule={"coding": [{"code": "OPTOUT"}]}),
            ("deny", "permit"),
        ),
        (consent(), (None, None)),
        (consent({**PERMIT, "actor": [{"role": {}}]}), (None, None)),
        (consent({**DENY, "class": [{"code": "Observation"}]}), ("deny", "deny")),
        (consent({**PERMIT, "provision": [{**DENY, "code": [{}]}]}), ("deny", "deny")),
        (consent(DENY, scope="disclosure"), ("deny", "deny")),
        (consent(PERMIT, scope="disclosure"), (None, None)),
        (consent({**DENY, "provision": [PERMIT]}, scope="disclosure"), ("deny", "deny")),
        (consent(DENY, scope={"text": "Privacy"}), ("deny", "deny")),
        (consent(DENY, scope={"coding": [{"system": "urn:local", "code": "treatment"}]}), ("deny", "deny")),
        (consent(DENY, scope={"coding": [{"code": "adr"}, {"system": "urn:local", "code": "9"}]}), (None, None)),
        (consent(DENY, scope={"coding": [{"system": "urn:local", "code": "9"}, {"code": "research"}]}), (None, "deny")),
        (consent(DENY, scope={}), ("deny", "deny")),
        (consent(PERMIT, scope={}), ("permit", "permit")),
        (consent(DENY, modifierExtension=[{"url": "urn:x"}]), ("deny", "deny")),
        (consent(PERMIT, modifierExtension=[{"url": "urn:x"}]), (None, None)),
        (consent({**PERMIT, "provision": [{"purpose": [{"code": "HRESCH"}]}]}), ("permit", "deny")),
        (consent({"provision": [{"period": {"start": "2024"}}]}), ("deny", "deny")),
        (consent({**DENY, **purpose("sharing")}), ("deny", "deny")),
        (consent({**DENY, **purpose("HMARKT", "sharing")}), ("deny", "deny")),
        (consent({**DENY, "purpose": [{"display": "Sharing"}]}), ("deny", "deny")),
        (consent({**PERMIT, **purpose("sharing")}), (None, None)),
        (consent({**DENY, **purpose("sharing")}, scope="research"), (None, "deny")),
        (consent(policyRule={"coding": [{"system": "urn:local", "code": "opt-out"}]}), ("deny", "deny")),
        (consent(policyRule={"text": "Opt Out"}), ("deny", "deny")),
        (consent({**DENY, "period": {"start": "soon"}}), ("deny", "deny")),
        (consent({**PERMIT, "period": {"start": "2024", "end": 7}}), (None, None)),
        (consent({**PERMIT, "period": {"start": "2024", "end": "9999-12-31"}}), ("permit", "permit")),
        (consent({**PERMIT, "period": {"end": "2024-06-15"}}), ("permit", "permit")),
        (consent({**PERMIT, "period": {"end": "2024-06-14"}}), (None, None)),
        (consent({**PERMIT, "period": {"end": "2024-06"}}), ("permit", "permit")),
        (consent({**PERMIT, "period": {"start": "2024-06-16"}}), (None, None)),
        (consent({**PERMIT, "period": {"start": "2024"}}), ("permit", "permit")),
        (consent({**PERMIT, "period": {"end": "2024-06-15T11:59:59Z"}}), (None, None)),
        (consent({**PERMIT, "period": {"end": "2024-06-15T11:59:59-02:00"}}), ("permit", "permit")),
    ],
)
def test_a_consent_permits_denies_or_decides_nothing(
    resource: Consent | None, expected: tuple[str | None, str | None]
) -> None:
    assert decide_all(resource) == expected


def test_a_deny_wins_over_a_permit_in_any_order() -> None:
    permit, deny = consent(PERMIT, id="a"), consent(DENY, id="b")
    assert decide_all(permit, deny) == decide_all(deny, permit) == ("deny", "deny")
    assert permit
    assert deny
    decision = decide([permit, deny], SHARING, NOW)
    assert decision is not None
    assert (decision.consent, decision.path) == ("b", "Consent.provision")


def test_a_decision_names_the_provision_that_decided() -> None:
    deny_with_permit = consent({**DENY, "provision": [{**PERMIT, **purpose("HRESCH")}]})
    assert deny_with_permit
    decision = decide([deny_with_permit], RESEARCH, NOW)
    assert decision is not None
    assert decision.path == "Consent.provision.provision[0]"


def test_the_next_change_is_the_next_start_or_end_of_any_period() -> None:
    with_periods = consent(
        {
            **PERMIT,
            "period": {"start": "2024-01-01", "end": "2025-01-31"},
            "provision": [{**DENY, "period": {"start": "2024-07-01", "end": "2024-07-31"}}],
        }
    )
    assert with_periods
    moments = []
    moment = next_change([with_periods], NOW)
    while moment:
        moments.append(moment.date().isoformat())
        moment = next_change([with_periods], moment)
    assert moments == ["2024-07-01", "2024-08-01", "2025-02-01"]


def test_a_consent_without_a_patient_decides_nothing() -> None:
    assert read_consent({"resourceType": "Consent", "id": "c", "status": "active", "provision": PERMIT}, None) is None
