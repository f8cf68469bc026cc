"""The validator: takes the bytes of a resource and returns its issues."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from decimal import Decimal
from typing import Any

import msgspec

from fhir_assets.fhir.json_size import MAX_VALUES, has_more_values
from fhir_assets.fhir.validation.fast_path import FastPath
from fhir_assets.fhir.validation.issues import JSON, MAX_ISSUES, Issue
from fhir_assets.fhir.validation.rules import load_rules
from fhir_assets.fhir.validation.strict_json import InvalidJson, parse_strictly
from fhir_assets.fhir.validation.walker import Walker

MAX_BYTES = 64 * 1024 * 1024
MAX_DEPTH = 100

_parse = msgspec.json.Decoder(float_hook=Decimal).decode


class ValidationResult:
    """The issues of one resource, and the resource itself."""

    __slots__ = ("_body", "_resource", "issues")

    def __init__(self, body: bytes, issues: tuple[Issue, ...] = ()) -> None:
        self._body: bytes | None = body
        self.issues = issues

    def __repr__(self) -> str:
        return f"ValidationResult(issues={self.issues!r})"

    @property
    def valid(self) -> bool:
        """True if no issue has the severity ``error``."""
        return not any(issue.severity == "error" for issue in self.issues)

    @property
    def resource(self) -> dict[str, Any] | None:
        """The parsed JSON; numbers with a fraction are Decimals and keep their digits. It is parsed on first use.

        None if the text is not valid JSON (rule ``json``) or not an object.
        """
        if self._body is not None:
            value = None if any(issue.rule == JSON for issue in self.issues) else _parse(self._body)
            self._resource: dict[str, Any] | None = value if isinstance(value, dict) else None
            self._body = None
        return self._resource


class Validator:
    """Validates resources against the base definitions of FHIR R4 (4.0.1).

    ``warn_rules`` demotes rules to warnings: by name (``invariant:obs-6``), by prefix (``invariant``), or by name and
    path without indexes (``required-binding:Patient.gender``). The rule ``json`` is always an error. ``max_bytes``,
    ``max_values`` and ``max_depth`` limit the size, the values and the nesting of a resource, ``max_issues`` the errors
    and the warnings that are listed. Threads may share an instance; a pickled instance keeps its settings.
    """

    def __init__(
        self,
        *,
        warn_rules: Sequence[str] = (),
        max_bytes: int = MAX_BYTES,
        max_depth: int = MAX_DEPTH,
        max_values: int = MAX_VALUES,
        max_issues: int = MAX_ISSUES,
    ) -> None:
        self.warn_rules = tuple(warn_rules)
        self.max_bytes = max_bytes
        self.max_depth = max_depth
        self.max_values = max_values
        self.max_issues = max_issues
        self._fast = FastPath(max_depth)

    def __reduce__(self) -> tuple[Any, ...]:
        return _build, (self.warn_rules, self.max_bytes, self.max_depth, self.max_values, self.max_issues)

    @property
    def rules_version(self) -> str:
        """The FHIR version and a hash of the rules."""
        rules = load_rules()
        return f"{rules.fhir_version}-{rules.digest}"

    @property
    def ruleset(self) -> str:
        """The version of the rules and a hash of the settings. Equal rulesets give equal results."""
        # The issues of a resource that are listed do not decide whether it is valid.
        limits = () if self.max_values == MAX_VALUES else (self.max_values,)
        settings = repr((self.warn_rules, self.max_bytes, self.max_depth, *limits)).encode()
        return f"{self.rules_version}-{hashlib.sha256(settings).hexdigest()[:8]}"

    def check(self, body: bytes) -> ValidationResult:
        """Validate one resource, given as JSON. Does not raise for any input."""
        if len(body) <= self.max_bytes and not has_more_values(body, self.max_values) and self._fast.accepts(body):
            return ValidationResult(body)
        return self.explain(body)

    def explain(self, body: bytes) -> ValidationResult:
        """Validate like ``check``, but without the fast path."""
        if len(body) > self.max_bytes:
            return _invalid_json(body, f"the resource is larger than {self.max_bytes} bytes", "")
        if has_more_values(body, self.max_values):
            return _invalid_json(body, f"the resource has more than {self.max_values} values", "")
        try:
            value = parse_strictly(body, self.max_depth)
        except InvalidJson as error:
            return _invalid_json(body, error.message, error.path)
        return ValidationResult(body, Walker(load_rules(), self._demote, self.max_issues).walk(value))

    def _demote(self, issue: Issue) -> Issue:
        if issue.severity == "error" and self.warn_rules and self._is_warning(issue):
            return replace(issue, severity="warning")
        return issue

    def _is_warning(self, issue: Issue) -> bool:
        name = f"{issue.rule}:{_without_indexes(issue.path)}"
        return any(name == rule or name.startswith(rule + ":") for rule in self.warn_rules)


def _build(warn_rules: tuple[str, ...], max_bytes: int, max_depth: int, max_values: int, max_issues: int) -> Validator:
    return Validator(
        warn_rules=warn_rules, max_bytes=max_bytes, max_depth=max_depth, max_values=max_values, max_issues=max_issues
    )


def _without_indexes(path: str) -> str:
    return "".join(part.partition("]")[2] if n else part for n, part in enumerate(path.split("[")))


def _invalid_json(body: bytes, message: str, path: str) -> ValidationResult:
    return ValidationResult(body, (Issue(JSON, "error", path or "Resource", message),))
