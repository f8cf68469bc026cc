"""What a patient's Consent resources say: permit or deny, for a purpose, at a moment. Pure.

The rules, where FHIR R4 leaves them open (https://hl7.org/fhir/R4/consent.html):

- Only ``active`` consents count, and those whose scope is about disclosure: ``patient-privacy`` (or none given) speaks
  for every purpose, ``research`` for research alone; consent to a treatment and advance directives say nothing here.
- A provision holds while its ``period`` does (the end included, to its precision) and for the purposes it names; none
  named means all. The innermost provision that holds decides; of several beside each other a deny.
- The root provision's type may be missing, as R4 has it: then the policy rule (OPTIN, OPTOUT) is the base.
- Tables cannot give a part of a patient's data to some. So a permit that is narrowed to actors, actions, classes,
  codes, labels or single data is none, and a deny so narrowed holds for all.
- Of several consents that contradict each other the deny holds.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any, Literal

Verdict = Literal["permit", "deny"]


class Policy(StrEnum):
    """CONSENT_POLICY."""

    OFF = "off"
    OPT_OUT = "opt-out"
    OPT_IN = "opt-in"


class Purpose(StrEnum):
    """What data is used for."""

    DATA_SHARING = "data-sharing"
    RESEARCH = "research"


@dataclass(frozen=True, slots=True)
class ConsentGate:
    """What the tables follow: a policy, and the purpose that they serve."""

    policy: Policy = Policy.OFF
    purpose: Purpose = Purpose.DATA_SHARING

    @property
    def closed(self) -> bool:
        """Whether anything may be withheld."""
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
"""Codes of provision.purpose (v3-ActReason, and the plain names), in lower case, by what they mean here."""

_SCOPES: Mapping[str, frozenset[Purpose]] = {
    "patient-privacy": frozenset(Purpose),
    "research": frozenset({Purpose.RESEARCH}),
    "treatment": frozenset(),
    "adr": frozenset(),
}
_NARROWING = ("actor", "action", "securityLabel", "class", "code", "data", "dataPeriod")
_RULES: Mapping[str, Verdict] = {"optin": "permit", "optinr": "permit", "optout": "deny", "optoute": "deny"}


@dataclass(frozen=True, slots=True)
class Period:
    """From ``start`` up to ``end``, half-open; None is open."""

    start: datetime | None = None
    end: datetime | None = None

    def holds(self, at: datetime) -> bool:
        return (self.start is None or self.start <= at) and (self.end is None or at < self.end)


@dataclass(frozen=True, slots=True)
class Provision:
    """A rule and its exceptions. ``path`` is where it stands in the resource."""

    path: str
    verdict: Verdict | None
    purposes: frozenset[Purpose]
    period: Period
    narrowed: bool
    exceptions: tuple["Provision", ...]


@dataclass(frozen=True, slots=True)
class Consent:
    """What matters of a Consent resource."""

    id: str
    patient: str
    provision: Provision | None


@dataclass(frozen=True, slots=True)
class Decision:
    """For one patient and purpose. ``consent`` and ``path`` say which provision decided."""

    verdict: Verdict
    consent: str
    path: str


def read_consent(resource: Mapping[str, Any], patient: str | None) -> Consent | None:
    """The Consent of a resource about ``patient``; None if it says nothing: not active, another scope, no patient."""
    if patient is None or resource.get("status") != "active":
        return None
    purposes = _scope(resource)
    if not purposes:
        return None
    base = next((_RULES[code] for code in _codes([resource.get("policyRule")]) if code in _RULES), None)
    root = resource.get("provision")
    if not isinstance(root, dict):
        root = {}
        if base is None:
            return None
    identity = str(resource.get("id"))
    return Consent(identity, patient, _provision(root, "Consent.provision", purposes, base))


def decide(consents: Iterable[Consent], purpose: Purpose, at: datetime) -> Decision | None:
    """What the consents of one patient say at a moment; None if they say nothing."""
    decision: Decision | None = None
    for consent in sorted(consents, key=lambda each: each.id):
        found = _decide(consent.provision, purpose, at) if consent.provision else None
        if found and (decision is None or (found[0] == "deny" and decision.verdict == "permit")):
            decision = Decision(found[0], consent.id, found[1])
    return decision


def next_change(consents: Iterable[Consent], after: datetime) -> datetime | None:
    """When a decision may next be another one because a period begins or ends; None if never."""
    moments = (moment for each in consents if each.provision for moment in _moments(each.provision))
    return min((moment for moment in moments if moment > after), default=None)


def _decide(provision: Provision, purpose: Purpose, at: datetime) -> tuple[Verdict, str] | None:
    if purpose not in provision.purposes or not provision.period.holds(at):
        return None
    inner = [found for each in provision.exceptions if (found := _decide(each, purpose, at))]
    if inner:
        return next((found for found in inner if found[0] == "deny"), inner[0])
    if provision.verdict is None or (provision.verdict == "permit" and provision.narrowed):
        return None
    return provision.verdict, provision.path


def _moments(provision: Provision) -> Iterator[datetime]:
    for moment in (provision.period.start, provision.period.end):
        if moment is not None:
            yield moment
    for each in provision.exceptions:
        yield from _moments(each)


def _provision(
    node: Mapping[str, Any], path: str, purposes: frozenset[Purpose], base: Verdict | None = None
) -> Provision:
    kind = node.get("type")
    named = node.get("purpose")
    if isinstance(named, list) and named:
        codes = frozenset(_codes([{"coding": named}]))
        purposes = frozenset(each for each in purposes if codes & _CODES[each])
    nested = node.get("provision")
    return Provision(
        path,
        kind if kind in ("permit", "deny") else base,
        purposes,
        _period(node.get("period")),
        any(node.get(name) for name in _NARROWING),
        tuple(
            _provision(each, f"{path}.provision[{place}]", purposes)
            for place, each in enumerate(nested if isinstance(nested, list) else ())
            if isinstance(each, dict)
        ),
    )


def _scope(resource: Mapping[str, Any]) -> frozenset[Purpose]:
    codes = list(_codes([resource.get("scope")]))
    if not codes:
        return frozenset(Purpose)
    return frozenset().union(*(_SCOPES.get(code, frozenset()) for code in codes))


def _codes(concepts: Iterable[Any]) -> Iterator[str]:
    """The codes of CodeableConcepts, in lower case."""
    for concept in concepts:
        codings = concept.get("coding") if isinstance(concept, dict) else None
        for coding in codings if isinstance(codings, list) else ():
            if isinstance(coding, dict) and isinstance(coding.get("code"), str):
                yield coding["code"].lower()


def _period(node: Any) -> Period:
    if not isinstance(node, dict):
        return Period()
    return Period(_moment(node.get("start")), _moment(node.get("end"), after=True))


def _moment(text: Any, *, after: bool = False) -> datetime | None:
    """A dateTime as a moment; ``after`` gives the one just after all that it may mean. None if it is absent.

    What cannot be read leaves the period open, which shows in what is decided: nothing is guessed.
    """
    if not isinstance(text, str):
        return None
    try:
        if len(text) == 4:
            year = int(text)
            return datetime(year + after, 1, 1, tzinfo=UTC)
        if len(text) == 7:
            year, month = int(text[:4]), int(text[5:])
            first = datetime(year, month, 1, tzinfo=UTC)
            return (first + timedelta(days=32)).replace(day=1) if after else first
        moment = datetime.fromisoformat(text)
    except (ValueError, OverflowError):
        return None
    moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    if not after:
        return moment
    return moment + (timedelta(days=1) if len(text) == 10 else timedelta(microseconds=1))
