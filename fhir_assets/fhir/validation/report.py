"""Validates files of resources: what ``fhir-assets validate FILE…`` does."""

import gzip
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from fhir_assets.errors import NotFhir
from fhir_assets.fhir.validation.issues import Issue, build_operation_outcome
from fhir_assets.fhir.validation.validator import ValidationResult, Validator

_INDEX = re.compile(r"\[\d+\]")


class CheckedResource(NamedTuple):
    """One resource of a file: ``line`` counts from 1; in a Bundle, ``entry`` counts its entries from 0."""

    file: Path
    line: int
    entry: int | None
    result: ValidationResult

    @property
    def location(self) -> str:
        """``patients.ndjson.gz:17``, ``bundle.json:1 entry[3]``."""
        return f"{self.file}:{self.line}" + ("" if self.entry is None else f" entry[{self.entry}]")


class _Entry(msgspec.Struct):
    resource: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


class _Bundle(msgspec.Struct, tag_field="resourceType", tag="Bundle"):
    entry: list[_Entry] = []


def validate_files(files: Iterable[Path], validator: Validator) -> Iterator[CheckedResource]:
    """Each resource of the files in turn, with its verdict.

    Files are NDJSON (blank lines are skipped) or one JSON document, gzipped or not, told apart by their content. A
    Bundle counts as the resources of its entries, then as itself if something is wrong outside them. Raises NotFhir
    if a file cannot be read.
    """
    for file in files:
        for line, body in _documents(file):
            yield from _check_document(file, line, body, validator)


def _documents(file: Path) -> Iterator[tuple[int, bytes]]:
    """The JSON texts of a file: the whole, if its first line is none by itself, else its lines."""
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as lines:
            first = b""
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                if not first and number == 1 and not _is_document(line):
                    rest = lines.read()
                    yield 1, line + rest
                    return
                first = line
                yield number, line.strip()
    except (OSError, EOFError) as error:
        raise NotFhir(
            f"{file} cannot be read ({type(error).__name__}): check its path and that it is complete"
        ) from None


def _is_document(line: bytes) -> bool:
    """Does the line end as an object does? A pretty-printed document's first line does not."""
    return line.strip().endswith(b"}")


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
            whole = validator.check(body)
            outside = tuple(issue for issue in whole.issues if not issue.path.startswith("Bundle.entry["))
            result = ValidationResult(body, outside) if outside else None
            if result is None:
                return
    yield CheckedResource(file, line, None, result or validator.check(body))


@dataclass
class ValidationSummary:
    """Counts what was found. ``findings`` counts (severity, rule, path without indexes)."""

    resources: int = 0
    invalid: int = 0
    findings: Counter[tuple[str, str, str]] = field(default_factory=Counter)

    def add(self, result: ValidationResult) -> None:
        self.resources += 1
        self.invalid += not result.valid
        for issue in result.issues:
            self.findings[issue.severity, issue.rule, _INDEX.sub("", issue.path)] += 1

    def rows(self) -> list[dict[str, Any]]:
        """The findings as rows for a table or JSON: errors first, the most frequent first."""
        ordered = sorted(self.findings.items(), key=lambda item: (item[0][0], -item[1], item[0]))
        return [
            {"severity": severity, "rule": rule, "path": path, "count": count}
            for (severity, rule, path), count in ordered
        ]


def locate_outcome(checked: CheckedResource) -> dict[str, Any]:
    """The issues of a checked resource as an OperationOutcome that says in which file and line it stands."""
    found = build_operation_outcome(checked.result.issues)
    for issue in found["issue"]:
        issue["location"] = [checked.location]
    return found


__all__ = ["CheckedResource", "Issue", "ValidationSummary", "locate_outcome", "validate_files"]
