"""The list of leaf values that no table has: each with a reason, and complete for the shared examples."""

from collections import Counter
from pathlib import Path
from typing import Any

import orjson
import pytest

from fhir_assets_tests.support.lost_leaves import LIST, REASONS, SETS, build_list, find_lost_leaves
from fhir_assets_tests.support.shipped_views import views

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
DOCS = Path(__file__).resolve().parents[2] / "docs" / "tables.md"


def read_list() -> dict[str, Any]:
    content: dict[str, Any] = orjson.loads(LIST.read_bytes())
    return content


def test_each_lost_value_has_a_reason_that_is_described() -> None:
    content = read_list()
    assert content["reasons"] == {key: text for key, (_, text) in REASONS.items()}
    used = Counter(item["reason"] for entry in content["types"].values() for item in entry["paths"].values())
    assert set(used) <= set(content["reasons"])
    assert set(content["types"]) == {view.resource_type for view in views().values()}
    text = DOCS.read_text()
    for key in used:
        assert f"| {key} |" in text


def test_a_value_that_a_row_depends_on_is_not_lost_and_another_one_is() -> None:
    patient = {
        "resourceType": "Patient",
        "id": "a",
        "active": True,
        "birthDate": "1999-02-03",
        "name": [{"family": "A", "given": ["B", "C"]}],
        "text": {"status": "generated", "div": "<div/>"},
    }
    share, paths = find_lost_leaves([patient])["Patient"]
    assert (share, paths) == (2 / 7, {"text.div": 1, "text.status": 1})


@pytest.mark.skipif(not all((DATA / name).exists() for name in SETS), reason="the shared examples are not here")
def test_the_list_is_what_the_tables_lack_of_the_shared_examples() -> None:
    """If it fails: ``python -m fhir_assets_tests.support.lost_leaves ../shared/data`` writes the list again."""
    assert build_list(DATA)["types"] == read_list()["types"]
