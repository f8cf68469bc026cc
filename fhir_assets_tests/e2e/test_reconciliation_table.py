"""The tests that docs/reconciliation.md and docs/concurrency.md name exist."""

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
PAGE = TESTS.parent / "docs" / "reconciliation.md"
LINES = re.findall(r"^\| (.+?) \|.*\| `(\S+\.py)::(\w+)` \|$", PAGE.read_text(), re.MULTILINE)


def test_the_page_has_a_test_for_every_line() -> None:
    table = PAGE.read_text().partition("## Why a resource may not be in the tables")[2]
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    assert len(LINES) == len(rows) - 1


def test_every_pair_of_operations_names_tests_that_exist() -> None:
    page = (TESTS.parent / "docs" / "concurrency.md").read_text()
    rows = [line for line in page.partition("## The pairs")[2].splitlines() if line.startswith("| ")][1:]
    assert rows
    assert [row for row in rows if "Matrix" not in row and "::" not in row] == []
    for file, name in re.findall(r"`(\S+\.py)::(\w+)`", page):
        tree = ast.parse((TESTS / file).read_text())
        assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, name


@pytest.mark.parametrize(("way", "file", "name"), LINES, ids=[way for way, _, _ in LINES])
def test_the_named_test_exists(way: str, file: str, name: str) -> None:
    tree = ast.parse((TESTS / file).read_text())
    assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
