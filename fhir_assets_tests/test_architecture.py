"""The rooms of the house: who may import whom."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "fhir_assets"
PLAIN = {"errors", "windows", "catalog"}
MAY_IMPORT = {
    "errors": set(),
    "windows": set(),
    "catalog": set(),
    "fhir": PLAIN | {"fhir"},
    "privacy": PLAIN | {"privacy"},
    "store": PLAIN | {"privacy", "store"},
    "warehouse": PLAIN | {"fhir", "privacy", "store", "warehouse"},
    "alerts": {"warehouse"},
    "sandbox": PLAIN | {"fhir", "sandbox"},
    "settings": PLAIN | {"privacy"},
    "accounts": {"errors", "fhir", "settings"},
    "logs": {"errors", "logs"},
    "instance": {"settings", "warehouse", "resources", "instance"},
    "metrics": PLAIN | {"settings", "warehouse", "metrics"},
    "connector": PLAIN | {"fhir", "warehouse", "settings", "metrics", "accounts", "connector"},
    "upload": PLAIN | {"fhir", "privacy", "upload"},
    "pipeline": PLAIN | {"fhir", "privacy", "store", "upload", "warehouse", "pipeline"},
    "resources": PLAIN
    | {
        "fhir",
        "privacy",
        "store",
        "warehouse",
        "settings",
        "accounts",
        "pipeline",
        "resources",
        "api",
        "assets",
        "automation",
        "definitions",
        "logs",
    },
}
WITHOUT_DAGSTER = {
    "alerts",
    "errors",
    "windows",
    "catalog",
    "settings",
    "accounts",
    "fhir",
    "privacy",
    "store",
    "warehouse",
    "pipeline",
    "sandbox",
    "connector",
    "upload",
    "metrics",
    "logs",
}


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""


def modules(room: str) -> list[Path]:
    single = PACKAGE / f"{room}.py"
    return [single] if single.exists() else sorted((PACKAGE / room).rglob("*.py"))


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_arrows_point_down_only(room: str) -> None:
    paths = modules(room)
    assert paths
    for path in paths:
        for name in imports(path):
            parts = name.split(".")
            if parts[0] == "fhir_assets" and len(parts) > 1:
                assert parts[1] in MAY_IMPORT[room], f"{path.relative_to(PACKAGE)} imports {name}"


@pytest.mark.parametrize("room", sorted(WITHOUT_DAGSTER))
def test_the_rooms_below_know_no_dagster(room: str) -> None:
    for path in modules(room):
        assert not any(name.split(".")[0].startswith("dagster") for name in imports(path)), path
