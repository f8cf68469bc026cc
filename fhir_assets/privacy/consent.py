"""Evaluates Consent resources: permit or deny, for a purpose, at a given time. Performs no I/O.

Rules for cases that FHIR R4 leaves open (https://hl7.org/fhir/R4/consent.html):

- Only ``active`` consents count, and of these only the ones about disclosure. Scope ``patient-privacy``, or no scope,
  covers every purpose; ``research`` covers research alone; treatment and advance directives cover no purpose. These are
  the codes of HL7's code system. Any other scope may be about disclosure: its denials count, its permits do not.
- A provision applies during its ``period`` (the end is included, to its precision) and for the purposes it names;
  without a purpose it applies to all. The innermost provision that applies decides; among siblings a deny takes
  precedence.
- R4 allows the root provision to have no type; then the policy rule (OPTIN, OPTOUT) is the base decision. An exception
  without a type is a deny.
- Unreadable parts never permit: a deny for a purpose that is not a code of v3-ActReason applies to every purpose, and a
  permit is ignored if its period is unreadable or its Consent has a ``modifierExtension``.
- Tables cannot show a part of a patient's data to some readers. Therefore a permit that is limited to actors, actions,
  classes, codes, labels or data does not count as a permit, and a deny that is limited in this way counts in full.
- If consents contradict each other, the deny takes precedence.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any, Literal

Verdict = Literal["permit", "deny"]


class Policy(StrEnum):
    """The values of CONSENT_POLICY, which decides whose resources are withheld."""

    OFF = "off"
    OPT_OUT = "opt-out"
    OPT_IN = "opt-in"


class Purpose(StrEnum):
    """The values of CONSENT_PURPOSE, the purpose that the tables are used for."""

    DATA_SHARING = "data-sharing"
    RESEARCH = "research"


@dataclass(frozen=True, slots=True)
class ConsentGate:
    """The rule that withholds patients from the tables: a policy, and the purpose that the tables serve."""

    policy: Policy = Policy.OFF
    purpose: Purpose = Purpose.DATA_SHARING
    by_file: bool = field(default=False, compare=False)
    """Whether the source consists of files, so that resources with an equal time of arrival belong to one file."""

    @property
    def withholds(self) -> bool:
        """Whether any resource may be withheld."""
        return self.policy is not Policy.OFF


_CODES: Mapping[Purpose, frozenset[str]] = {
    Purpose.RESEARCH: frozenset(
        {"research", "hresch", "biorch", "clintrch", "clintrchnpc", "clintrchpc", "preclintrch", "dsrch", "poarsch"}
        | {"transrch", "disclosure-research"}
    ),
    Purpose.DATA_SHARING: frozenset(
        {"data-sharing", "treat", "etreat", "btg", "caremgt", "coc", "hoperat", "hpaymt", "hsysadmin", "pubhlth"}
        | {"patadmin", "patsfty", "qualimp", "directtreat", "clintreat", "popgtreat"}
    ),
}
"""The codes of ``provision.purpose`` (v3-ActReason and plain names, in lower case) that each purpose covers."""

_OTHER_PURPOSES = frozenset(
    {"purposeofuse", "hmarkt", "donat", "fraud", "gov", "haccred", "hcompl", "hdecd", "hdirect", "hdm", "hlegal"}
    | {"houtcoms", "hprgrp", "hqualimp", "labeling", "metamgt", "memadmin", "milcdm", "perfmsr", "recordmgt"}
    | {"sysdev", "htest", "train", "clmattch", "covauth", "coverage", "eligdtrm", "eligver", "enrollm", "mildcrg"}
    | {"remitadv", "patrqt", "famrqt", "pwatrny", "supnwk", "disaster", "threat", "clintrl", "ertreat"}
    | {"pophlth", "treatds"}
)
"""Further codes of v3-ActReason, which name purposes that the tables do not serve."""
_KNOWN_PURPOSES = frozenset().union(*_CODES.values()) | _OTHER_PURPOSES

_SCOPE_SYSTEM = "http://terminology.hl7.org/CodeSystem/consentscope"
_SCOPES: Mapping[str, frozenset[Purpose]] = {
    "patient-privacy": frozenset(Purpose),
    "research": frozenset({Purpose.RESEARCH}),
    "treatment": frozenset(),
    "adr": frozenset(),
}
_INACTIVE_STATUSES = ("draft", "proposed", "rejected", "inactive", "entered-in-error")
"""The values of Consent.status other than ``active``."""

_LIMITING_ELEMENTS = ("actor", "action", "securityLabel", "class", "code", "data", "dataPeriod")
_POLICY_RULES: Mapping[str, Verdict] = {"optin": "permit", "optinr": "permit", "optout": "deny", "optoute": "deny"}
_UNREADABLE = datetime.max.replace(tzinfo=UTC)
"""Stands for a dateTime that cannot be parsed."""


@dataclass(frozen=True, slots=True)
class Period:
    """A half-open interval from ``start`` to ``end``; None means unbounded."""

    start: datetime | None = None
    end: datetime | None = None

    def contains(self, at: datetime) -> bool:
        """Return whether the period contains a moment."""
        return (self.start is None or self.start <= at) and (self.end is None or at < self.end)


@dataclass(frozen=True, slots=True)
class Provision:
    """A provision and its exceptions. ``path`` is its FHIRPath location in the Consent."""

    path: str
    verdict: Verdict | None
    purposes: frozenset[Purpose]
    period: Period
    limited: bool
    exceptions: tuple["Provision", ...]


@dataclass(frozen=True, slots=True)
class Consent:
    """The parts of a Consent resource that a decision depends on."""

    id: str
    patient: str
    provision: Provision | None


@dataclass(frozen=True, slots=True)
class Decision:
    """The decision for one patient and purpose; ``consent`` and ``path`` name the provision that decided."""

    verdict: Verdict
    consent: str
    path: str


def read_consent(resource: Mapping[str, Any], patient: str | None, *, may_permit: bool = True) -> Consent | None:
    """Read a Consent resource about ``patient``.

    Return None if it decides nothing: it is not active, has another scope, or has no patient. Without ``may_permit``
    its permits do not count.
    """
    if patient is None or resource.get("status") != "active":
        return None
    purposes, is_known_scope = _read_scope(resource.get("scope"))
    if not purposes:
        return None
    base = _read_policy_rule(resource.get("policyRule"))
    root = resource.get("provision")
    if not isinstance(root, dict):
        root = {}
        if base is None:
            return None
    reader = _ProvisionReader(may_permit and is_known_scope and not resource.get("modifierExtension"))
    return Consent(str(resource.get("id")), patient, reader.read(root, "Consent.provision", purposes, base))


def may_deny(resource: Mapping[str, Any]) -> bool:
    """Return whether an invalid Consent may be a denial. An unreadable one may be."""
    if resource.get("status") in _INACTIVE_STATUSES or not _read_scope(resource.get("scope"))[0]:
        return False
    provision = resource.get("provision")
    if provision is None:
        return _read_policy_rule(resource.get("policyRule")) == "deny"
    return not _is_permit(provision)


def _is_permit(provision: Any) -> bool:
    """Return whether a provision and its exceptions are readable and permit. An exception without a type is a deny."""
    if not isinstance(provision, dict) or provision.get("type") != "permit":
        return False
    nested = provision.get("provision", [])
    return isinstance(nested, list) and all(_is_permit(exception) for exception in nested)


def decide(consents: Iterable[Consent], purpose: Purpose, at: datetime) -> Decision | None:
    """Return the decision of the consents of one patient at a given time, or None if they decide nothing."""
    decision: Decision | None = None
    for consent in sorted(consents, key=lambda consent: consent.id):
        result = _decide(consent.provision, purpose, at) if consent.provision else None
        if result and (decision is None or (result[0] == "deny" and decision.verdict == "permit")):
            decision = Decision(result[0], consent.id, result[1])
    return decision


def next_change(consents: Iterable[Consent], after: datetime) -> datetime | None:
    """Return the next moment at which a period begins or ends, and a decision may change; None if no period does."""
    provisions = (consent.provision for consent in consents if consent.provision)
    moments = (moment for provision in provisions for moment in _list_boundaries(provision))
    return min((moment for moment in moments if moment > after), default=None)


def _decide(provision: Provision, purpose: Purpose, at: datetime) -> tuple[Verdict, str] | None:
    if purpose not in provision.purposes or not provision.period.contains(at):
        return None
    results = [result for exception in provision.exceptions if (result := _decide(exception, purpose, at))]
    if results:
        return next((result for result in results if result[0] == "deny"), results[0])
    if provision.verdict is None or (provision.verdict == "permit" and provision.limited):
        return None
    return provision.verdict, provision.path


def _list_boundaries(provision: Provision) -> Iterator[datetime]:
    for moment in (provision.period.start, provision.period.end):
        if moment is not None:
            yield moment
    for exception in provision.exceptions:
        yield from _list_boundaries(exception)


@dataclass(frozen=True, slots=True)
class _ProvisionReader:
    """Reads the provisions of one Consent. Without ``may_permit`` its permits are ignored."""

    may_permit: bool

    def read(self, node: Mapping[str, Any], path: str, purposes: frozenset[Purpose], base: Verdict | None) -> Provision:
        """Read a provision and its exceptions. ``base`` is its verdict if it has no type."""
        kind = node.get("type")
        verdict: Verdict | None = kind if kind in ("permit", "deny") else base
        nested = node.get("provision")
        period = _read_period(node.get("period"))
        is_readable = _UNREADABLE not in (period.start, period.end) and not node.get("modifierExtension")
        purposes = _select_purposes(purposes, node.get("purpose"), verdict)
        return Provision(
            path,
            verdict,
            purposes,
            Period(*(None if moment is _UNREADABLE else moment for moment in (period.start, period.end))),
            not (self.may_permit and is_readable) or any(node.get(name) for name in _LIMITING_ELEMENTS),
            tuple(
                self.read(child, f"{path}.provision[{index}]", purposes, "deny")
                for index, child in enumerate(nested if isinstance(nested, list) else ())
                if isinstance(child, dict)
            ),
        )


def _select_purposes(purposes: frozenset[Purpose], named: Any, verdict: Verdict | None) -> frozenset[Purpose]:
    """Return those of ``purposes`` that the codings ``named`` cover. Unknown codings cover all, unless they permit."""
    if not isinstance(named, list) or not named:
        return purposes
    codes = set(_read_codes([{"coding": named}]))
    if verdict != "permit" and (len(codes) < len(named) or codes - _KNOWN_PURPOSES):
        return purposes
    return frozenset(purpose for purpose in purposes if codes & _CODES[purpose])


def _read_scope(scope: Any) -> tuple[frozenset[Purpose], bool]:
    """Return the purposes that a scope covers, and whether a Consent of this scope may permit.

    The codings of a scope are translations of one concept: a known coding determines the meaning of the others.
    """
    if not scope:
        return frozenset(Purpose), True
    codings = scope.get("coding") if isinstance(scope, dict) else None
    known = [
        _SCOPES[code]
        for coding in (codings if isinstance(codings, list) else ())
        if isinstance(coding, dict) and coding.get("system", _SCOPE_SYSTEM) == _SCOPE_SYSTEM
        for code in _read_codes([{"coding": [coding]}])
        if code in _SCOPES
    ]
    return (frozenset().union(*known), True) if known else (frozenset(Purpose), False)


def _read_policy_rule(rule: Any) -> Verdict | None:
    """Return the base decision of ``policyRule``, None if it is neither opt-in nor opt-out. Text counts like a code."""
    texts = list(_read_codes([rule]))
    if isinstance(rule, dict) and isinstance(rule.get("text"), str):
        texts.append(rule["text"].lower())
    verdicts = {_POLICY_RULES.get(re.sub(r"[^a-z]", "", text)) for text in texts}
    return "deny" if "deny" in verdicts else "permit" if "permit" in verdicts else None


def _read_codes(concepts: Iterable[Any]) -> Iterator[str]:
    """Yield the codes of CodeableConcepts in lower case."""
    for concept in concepts:
        codings = concept.get("coding") if isinstance(concept, dict) else None
        for coding in codings if isinstance(codings, list) else ():
            if isinstance(coding, dict) and isinstance(coding.get("code"), str):
                yield coding["code"].lower()


def _read_period(node: Any) -> Period:
    if not isinstance(node, dict):
        return Period()
    return Period(_parse_datetime(node.get("start")), _parse_datetime(node.get("end"), after=True))


def _parse_datetime(text: Any, *, after: bool = False) -> datetime | None:
    """Return the first moment of a FHIR dateTime, or with ``after`` the first moment after it; None if it is absent.

    A dateTime that cannot be parsed is _UNREADABLE. An end in the year 9999 counts as no end.
    """
    if text is None or (after and isinstance(text, str) and text.startswith("9999")):
        return None
    if not isinstance(text, str):
        return _UNREADABLE
    try:
        if len(text) == 4:
            year = int(text)
            return datetime(year + after, 1, 1, tzinfo=UTC)
        if len(text) == 7:
            year, month = int(text[:4]), int(text[5:])
            first = datetime(year, month, 1, tzinfo=UTC)
            return (first + timedelta(days=32)).replace(day=1) if after else first
        moment = datetime.fromisoformat(text)
        moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
        if not after:
            return moment
        return moment + (timedelta(days=1) if len(text) == 10 else timedelta(microseconds=1))
    except ValueError:
        return _UNREADABLE
    except OverflowError:
        return None
