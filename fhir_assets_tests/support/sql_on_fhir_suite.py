"""Run the public SQL on FHIR test suite and write its report.

``python -m fhir_assets_tests.support.sql_on_fhir_suite FOLDER [--report FILE]``; FOLDER holds the
``*.json`` files of the suite. The report has the format of the ``test_report.json`` that implementations publish: for
each file, the name of each test and whether it passed.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from fhir_assets.errors import PermanentError
from fhir_assets.fhir.views import CompiledViews, parse_view

_KNOWN_EXPECTATIONS = {"expect", "expectCount", "expectError", "expectColumns"}


@dataclass(frozen=True, slots=True)
class Case:
    """A test case of the suite."""

    file: str
    title: str
    resources: tuple[dict[str, Any], ...]
    test: dict[str, Any]


def read_cases(folder: Path) -> Iterator[Case]:
    """Yield all cases in a folder of the suite; numbers with a fraction are Decimals."""
    for path in sorted(folder.glob("*.json")):
        suite = json.loads(path.read_text(encoding="utf-8"), parse_float=Decimal)
        for test in suite["tests"]:
            yield Case(path.name, test["title"], tuple(suite["resources"]), test)


def _sort_key(value: object) -> str:
    """Convert a value to text by which rows are sorted and compared; equal numbers have equal text."""
    if isinstance(value, int | float | Decimal) and not isinstance(value, bool):
        return f"number {Decimal(str(value)).normalize():f}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_sort_key, value))}]"
    return json.dumps(value, sort_keys=True, default=str)


def _sort_rows(rows: list[dict[str, Any]]) -> list[str]:
    return sorted(json.dumps({name: _sort_key(value) for name, value in row.items()}, sort_keys=True) for row in rows)


def find_failure(case: Case) -> str | None:
    """Run a case. Return None if it passes, otherwise the reason of its failure."""
    test = case.test
    try:
        view = parse_view(test["view"])
        run: Callable[[dict[str, Any]], list[list[tuple[object, ...]]]] = CompiledViews([view]).rows
        names = [column.name for column in view.columns]
        rows = [
            dict(zip(names, row, strict=True))
            for resource in case.resources
            if resource["resourceType"] == view.resource_type
            for row in run(resource)[0]
        ]
    except PermanentError as error:
        return None if test.get("expectError") else f"error: {error}"
    if test.get("expectError"):
        return f"no error, but {len(rows)} rows"
    if not _KNOWN_EXPECTATIONS & test.keys():
        return "the case has no expectation that this runner knows"
    if "expectColumns" in test and names != test["expectColumns"]:
        return f"columns {names}, not {test['expectColumns']}"
    if "expectCount" in test and len(rows) != test["expectCount"]:
        return f"{len(rows)} rows, not {test['expectCount']}"
    if "expect" in test and _sort_rows(rows) != _sort_rows(test["expect"]):
        return f"rows {rows}, not {test['expect']}"
    return None


def build_report(folder: Path) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Run all cases in a folder and return the results in the format of ``test_report.json``."""
    files: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for case in read_cases(folder):
        reason = find_failure(case)
        result = {"passed": reason is None} | ({"error": reason} if reason else {})
        files.setdefault(case.file, {"tests": []})["tests"].append({"name": case.title, "result": result})
    return files


def main() -> int:
    """Run the suite and return the exit code: 0 if every case passes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the folder with the test files of the suite")
    parser.add_argument("--report", type=Path, help="the file to write the report to")
    arguments = parser.parse_args()
    results = build_report(arguments.folder)
    tests = [(file, test) for file, entry in results.items() for test in entry["tests"]]
    for file, test in tests:
        if not test["result"]["passed"]:
            print(f"{file}: {test['name']}: {test['result']['error']}", file=sys.stderr)
    if arguments.report:
        arguments.report.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    passed = sum(test["result"]["passed"] for _, test in tests)
    print(f"{passed} of {len(tests)} cases pass")
    return 0 if tests and passed == len(tests) else 1


if __name__ == "__main__":
    raise SystemExit(main())
