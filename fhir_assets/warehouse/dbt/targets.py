"""The columns of the target models OMOP CDM 5.4 and Tuva's input layer, from ``sql/dbt/targets``.

They are the one list of what the dbt models must fill: the properties of the models, with their tests, are generated
from them, and a test of the project compares them with the columns of the models.
"""

import csv
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TARGETS = ("omop", "tuva")


@dataclass(frozen=True, slots=True)
class TargetColumn:
    """A column of a target model. ``in_r4`` is False if FHIR R4 has nothing for it, for the reason in ``note``."""

    table: str
    name: str
    type: str
    required: bool
    in_r4: bool
    references: str
    note: str


def read_target(folder: Path, target: str) -> dict[str, list[TargetColumn]]:
    """Return the columns of a target model by table. ``folder`` is ``sql/dbt``."""
    tables: dict[str, list[TargetColumn]] = defaultdict(list)
    with (folder / "targets" / f"{target}.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            tables[row["table"]].append(
                TargetColumn(
                    row["table"],
                    row["column"],
                    row["type"],
                    row["required"] == "yes",
                    row["in_r4"] == "yes",
                    row["references"],
                    row["note"],
                )
            )
    return dict(tables)


def build_properties(target: str, tables: dict[str, list[TargetColumn]]) -> dict[str, Any]:
    """Return the dbt properties of the models of a target: aliases, columns, types and tests."""
    return {
        "version": 2,
        "models": [
            {
                "name": f"{target}__{table}",
                "config": {"alias": table},
                "columns": [_build_column(target, column, is_key=n == 0) for n, column in enumerate(columns)],
            }
            for table, columns in tables.items()
        ],
    }


def _build_column(target: str, column: TargetColumn, *, is_key: bool) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "name": column.name,
        "description": column.note,
        "data_type": column.type,
        "config": {"meta": {"required": column.required, "in_r4": column.in_r4}},
    }
    tests: list[Any] = []
    if is_key and column.table not in _WITHOUT_KEY:
        tests += ["unique", "not_null"]
    elif column.required:
        # Warnings: whether a resource has the element is the source's choice.
        tests.append({"not_null": {"config": {"severity": "warn"}}})
    if column.references:
        field = f"{column.references}_id"
        arguments = {"to": f"ref('{target}__{column.references}')", "field": field}
        tests.append({"relationships": {"arguments": arguments, "config": {"severity": "warn"}}})
    if tests:
        entry["data_tests"] = tests
    return entry


_WITHOUT_KEY = frozenset({"eligibility", "medical_claim", "pharmacy_claim"})
"""Tables whose first column identifies no row."""
