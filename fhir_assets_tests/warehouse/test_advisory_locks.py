"""The registry of advisory-lock keys is complete and unambiguous."""

import re
from pathlib import Path

import fhir_assets
from fhir_assets.warehouse.postgres.db import advisory_locks

KEYS = {name: value for name, value in vars(advisory_locks).items() if name.isupper()}


def test_every_key_is_a_distinct_positive_int4() -> None:
    assert len(set(KEYS.values())) == len(KEYS) > 10
    assert all(0 < key < 2**31 for key in KEYS.values())


def test_no_other_module_defines_a_lock_key() -> None:
    root = Path(fhir_assets.__file__).parent
    registry = Path(advisory_locks.__file__)
    literals = re.compile("|".join([r"0x66[0-9a-fA-F]{6}\b", *map(str, KEYS.values())]))
    others = [path for path in sorted(root.rglob("*.py")) if path != registry and literals.search(path.read_text())]
    assert others == []
