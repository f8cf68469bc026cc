"""The contents of a bulk export other than resources: deletions, errors, and counts of lines."""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from datetime import datetime
from itertools import islice

import orjson

from fhir_assets.fhir.bulk.manifest import ExportFile
from fhir_assets.fhir.deletions import read_deleted_entries
from fhir_assets.fhir.record import Deletion
from fhir_assets.notices import Notices
from fhir_assets.pipeline.dead_letter_buffer import DeadLetterBuffer, WriteDeadLetters
from fhir_assets.warehouse.ops.dead_letters import DeadLetter

_HARMLESS = frozenset({"warning", "information", "success"})
"""The severities of issues that are not errors (https://hl7.org/fhir/R5/valueset-issue-severity.html)."""


def read_deletions(
    lines: Iterable[bytes], at: datetime, export_id: str, write_dead_letters: WriteDeadLetters
) -> Iterator[Deletion]:
    """Yield the deletions of ``deleted`` files. A line with an unreadable deletion becomes a dead letter."""
    unreadable = DeadLetterBuffer(write_dead_letters)
    for line in lines:
        is_readable = True
        for deletion in read_deleted_entries(line, at):
            if deletion is not None:
                yield deletion
            elif is_readable:
                is_readable = False
                unreadable.add(_build_deletion_dead_letter(line, export_id))
    unreadable.flush()


def read_errors(lines: Iterable[bytes], export_id: str, notices: Notices) -> Iterator[DeadLetter]:
    """Yield a dead letter for each line of an error file that reports an error, or that cannot be read.

    OperationOutcomes with warnings and information only are counted in a notice.
    """
    harmless: Counter[str] = Counter()
    for line in lines:
        severities = _read_severities(line)
        if severities and severities <= _HARMLESS:
            harmless["warnings" if "warning" in severities else "informations"] += 1
        else:
            yield _build_dead_letter(line, export_id)
    if harmless:
        counts = ", ".join(f"{count:,} {kind}" for kind, count in sorted(harmless.items(), reverse=True))
        notices.add(
            "warning",
            "export-outcomes",
            f"export {export_id}: the server reports {counts} in addition to the resources",
        )


def check_count(file: ExportFile, count: int, notices: Notices) -> None:
    """Add a notice of severity ``error`` if the number of lines of a file differs from the number in the manifest."""
    if file.count is None or count == file.count:
        return
    difference = f"ends after {count:,} of" if count < file.count else f"has {count:,} resources instead of"
    notices.add(
        "error",
        "export-count",
        f"a file of {file.resource_type} {difference} the {file.count:,} that the server's manifest states: its "
        "resources are loaded. Load with --full-refresh, and ask the server's administrator if it happens again",
        None if file.resource_type in ("OperationOutcome", "Bundle") else file.resource_type,
    )


def _read_severities(line: bytes) -> set[str]:
    """Return the severities of an OperationOutcome; an empty set if it cannot be read or an issue has none."""
    with suppress(ValueError, KeyError, TypeError, AttributeError):
        outcome = orjson.loads(line)
        if outcome["resourceType"] == "OperationOutcome":
            return {str(issue["severity"]) for issue in outcome["issue"]}
    return set()


def _build_dead_letter(line: bytes, export_id: str) -> DeadLetter:
    """Build the dead letter of an OperationOutcome.

    Its message contains the issue codes, but no text of the server, which may contain patient data.
    """
    codes: list[str] = []
    with suppress(ValueError, KeyError, TypeError, AttributeError):
        codes = [str(issue["code"])[:40] for issue in islice(orjson.loads(line)["issue"], 5)]
    message = f"the server could not export a resource ({', '.join(codes) or 'no code'}): ask its administrator"
    return DeadLetter("OperationOutcome", None, "export", "export-error", f"export {export_id}", message, line, "")


def _build_deletion_dead_letter(line: bytes, export_id: str) -> DeadLetter:
    message = (
        "a line of a `deleted` file that is not a Bundle of deletions, or that has a deletion without type and id: "
        "load with --full-refresh to remove what the server deleted"
    )
    return DeadLetter("Bundle", None, "export", "export-deletion", f"export {export_id}", message, line, "")
