"""Validation of files of resources, for the command ``fhir-assets validate FILE…``."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from fhir_assets.fhir.files.json_texts import UnreadableText, find_files, read_json_texts
from fhir_assets.fhir.validation.issues import Issue, build_operation_outcome
from fhir_assets.fhir.validation.validator import ValidationResult, Validator

_RESOURCE_OF_ENTRY = re.compile(r"Bundle\.entry\[\d+\]\.resource\b")
_INDEX = re.compile(r"\[\d+\]")


class CheckedResource(NamedTuple):
    """A resource of a file with its validation result.

    ``line`` counts from 1. ``entry`` is the index of the entry if the resource is in a Bundle, counted from 0.
    """

    file: Path
    line: int
    entry: int | None
    result: ValidationResult

    @property
    def location(self) -> str:
        """File, line and entry, such as ``patients.ndjson.gz:17`` or ``bundle.json:1 entry[3]``."""
        return f"{self.file}:{self.line}" + ("" if self.entry is None else f" entry[{self.entry}]")


class UnreadablePart(NamedTuple):
    """A part of a file that cannot be read: a line that is too long, or the end of a damaged file."""

    file: Path
    line: int
    message: str

    @property
    def location(self) -> str:
        """File and line, such as ``patients.ndjson.gz:17``."""
        return f"{self.file}:{self.line}"


class _Entry(msgspec.Struct):
    resource: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


class _Bundle(msgspec.Struct, tag_field="resourceType", tag="Bundle"):
    entry: list[_Entry] = []


def validate_files(files: Iterable[Path], validator: Validator) -> Iterator[CheckedResource | UnreadablePart]:
    """Validate each resource of the files in turn.

    A file is NDJSON (blank lines are skipped) or one JSON document, gzipped or not; the format is detected from the
    content. For a Bundle, the resources of its entries are validated, and the Bundle itself is yielded only if it has
    issues outside the resources of its entries. A part of a file that cannot be read, such as the end of a
    damaged one, is yielded as such. Raises NotFhir, before anything is read, if a file does not exist or cannot be
    opened.
    """
    for file in find_files(files):
        for text in read_json_texts(file):
            if isinstance(text, UnreadableText):
                yield UnreadablePart(file, text.line, text.message)
            else:
                yield from _check_document(file, text.line, text.body, validator)


def _check_document(file: Path, line: int, body: bytes, validator: Validator) -> Iterator[CheckedResource]:
    result = None
    if b'"Bundle"' in body:
        try:
            entries = msgspec.json.decode(body, type=_Bundle).entry
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            entries = []
        for number, entry in enumerate(entries):
            if isinstance(entry.resource, msgspec.Raw):
                yield CheckedResource(file, line, number, validator.check(bytes(entry.resource)))
        if entries:
            bundle_result = validator.check(body)
            outside = tuple(issue for issue in bundle_result.issues if not _RESOURCE_OF_ENTRY.match(issue.path))
            result = ValidationResult(body, outside) if outside else None
            if result is None:
                return
    yield CheckedResource(file, line, None, result or validator.check(body))


@dataclass
class ValidationSummary:
    """The numbers of resources, invalid resources, unreadable parts of files, and issues.

    ``findings`` counts issues by severity, rule and path without indexes.
    """

    resources: int = 0
    invalid: int = 0
    unreadable: int = 0
    findings: Counter[tuple[str, str, str]] = field(default_factory=Counter)

    def add(self, result: ValidationResult) -> None:
        """Count the result of one resource."""
        self.resources += 1
        self.invalid += not result.valid
        for issue in result.issues:
            self.findings[issue.severity, issue.rule, _INDEX.sub("", issue.path)] += 1

    def rows(self) -> list[dict[str, Any]]:
        """Return the findings as rows for a table or JSON: errors first, then by descending count."""
        ordered = sorted(self.findings.items(), key=lambda item: (item[0][0], -item[1], item[0]))
        return [
            {"severity": severity, "rule": rule, "path": path, "count": count}
            for (severity, rule, path), count in ordered
        ]


def build_located_outcome(checked: CheckedResource) -> dict[str, Any]:
    """Return the issues of a resource as an OperationOutcome, with file and line as the ``location`` of each issue."""
    outcome = build_operation_outcome(checked.result.issues)
    for issue in outcome["issue"]:
        issue["location"] = [checked.location]
    return outcome


__all__ = ["CheckedResource", "Issue", "UnreadablePart", "ValidationSummary", "build_located_outcome", "validate_files"]
