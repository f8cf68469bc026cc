"""The views in ``sql/views`` give rows for real and generated resources."""

import gzip
import json
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from fhir_assets.catalog import BY_NAME, CATALOG
from fhir_assets.sandbox.population import generate
from fhir_assets_tests.support.saturated_resources import Resource
from fhir_assets_tests.support.shipped_views import (
    Row,
    build_rows,
    paths,
    views,
)

ROOT = Path(__file__).resolve().parents[2]

SHARED = ROOT.parent / "shared" / "data"

WITHOUT_ROWS = {
    "claim_item_modifier",
    "condition_identifier",
    "explanation_of_benefit_adjudication",
    "explanation_of_benefit_item_modifier",
    "explanation_of_benefit_item_procedure",
    "explanation_of_benefit_procedure",
    "explanation_of_benefit_supporting_info",
    "immunization_protocol",
    "immunization_reaction",
    "immunization_reason_reference",
    "medication_administration_reason_reference",
    "observation_based_on",
    "patient_ethnicity",
    "procedure_used",
}
"""The child views to which neither the generator nor the example data give rows. Saturated resources fill them."""


def resources(source: str) -> Iterator[Resource]:
    if source == "generated":
        lines: Iterator[bytes] = (body for _, body in generate(10, seed=7))
    else:
        files = sorted((SHARED / source).glob("*.ndjson.gz"))
        if not files:
            pytest.skip(f"no {source} beside the checkout")
        lines = (line for file in files for line in gzip.decompress(file.read_bytes()).splitlines())
    for line in lines:
        resource: Resource = json.loads(line)
        if resource["resourceType"] in BY_NAME:
            yield resource


@cache
def real_rows(source: str) -> tuple[Counter[str], dict[str, list[Row]]]:
    """Return the number of resources of each type, and the rows of all views."""
    counts: Counter[str] = Counter()
    rows_by_view: dict[str, list[Row]] = {name: [] for name in views()}
    for resource in resources(source):
        counts[BY_NAME[resource["resourceType"]].key] += 1
        for name, view_rows in build_rows(resource).items():
            rows_by_view[name] += view_rows
    return counts, rows_by_view


@pytest.mark.parametrize("source", ["generated", "r4-examples", "synthea"])
def test_every_real_resource_has_one_row_in_its_main_view(source: str) -> None:
    counts, rows_by_view = real_rows(source)
    assert {name: len(rows_by_view[name]) for name in counts} == counts


@pytest.mark.parametrize("source", ["generated", "r4-examples"])
def test_every_main_view_has_rows(source: str) -> None:
    _, rows_by_view = real_rows(source)
    assert [resource_type.key for resource_type in CATALOG if not rows_by_view[resource_type.key]] == []


def test_every_child_view_has_rows_somewhere() -> None:
    filled = {
        name
        for source in ("generated", "r4-examples", "synthea")
        for name, view_rows in real_rows(source)[1].items()
        if view_rows
    }
    assert set(views()) - filled == WITHOUT_ROWS


@pytest.mark.parametrize("source", ["generated", "synthea"])
def test_references_become_keys_that_join(source: str) -> None:
    _, rows_by_view = real_rows(source)
    ids = {resource_type.name: {row["id"] for row in rows_by_view[resource_type.key]} for resource_type in CATALOG}
    joined = 0
    for view in views().values():
        for name, path in paths(view.definition):
            target = re.search(r"getReferenceKey\((\w+)\)", path)
            if target is not None:
                keys = {row[name] for row in rows_by_view[view.name]} - {None}
                assert keys <= ids[target[1]], f"{view.name}.{name}"
                joined += len(keys)
    assert joined > 1000
