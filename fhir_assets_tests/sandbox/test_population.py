"""The synthetic population."""

import gzip
import re
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import orjson
import pytest
from fhir.resources.R4B import get_fhir_model_class

from fhir_assets.catalog import CATALOG
from fhir_assets.fhir.validation import Validator
from fhir_assets.sandbox.population import Item, Population, generate, write_population
from fhir_assets.sandbox.synthetic.defects import DEFECTS

START, END = datetime(2024, 1, 1, tzinfo=UTC), datetime(2024, 3, 31, tzinfo=UTC)
DATE_TIME = re.compile(rb'"(\d{4}-\d\d-\d\dT[0-9:]{8}-05:00)"')
REFERENCE = re.compile(rb'"reference":"([^"]+)"')


def population(patients: int, seed: int = 1, bad_share: float = 0.0) -> list[Item]:
    return list(Population(patients, seed, bad_share, start=START, end=END))


def key(item: Item) -> str:
    return f"{item.resource_type}/{orjson.loads(item.body)['id']}"


@pytest.fixture(scope="module")
def good() -> list[Item]:
    return population(40)


def test_the_population_has_resources_of_every_type_of_the_catalog(good: list[Item]) -> None:
    assert {item.resource_type for item in good} == {t.name for t in CATALOG}


def test_every_reference_points_to_a_resource_and_no_key_is_used_twice(good: list[Item]) -> None:
    keys = Counter(key(item) for item in good)
    assert max(keys.values()) == 1
    targets = {target.decode() for item in good for target in REFERENCE.findall(item.body)}
    assert targets <= keys.keys()
    assert len(targets) > 500


def test_every_resource_is_valid_for_both_validators(good: list[Item]) -> None:
    validator = Validator()
    for item in good:
        assert validator.check(item.body).issues == (), key(item)
        get_fhir_model_class(item.resource_type).model_validate_json(item.body)


def test_last_updated_covers_the_range_and_never_exceeds_it(good: list[Item]) -> None:
    months: Counter[str] = Counter()
    for item in good:
        resource = orjson.loads(item.body)
        updated = datetime.fromisoformat(resource["meta"]["lastUpdated"])
        assert START <= updated < END
        months[f"{updated:%m}"] += 1
        for moment in DATE_TIME.findall(item.body):
            assert datetime.fromisoformat(moment.decode()) <= updated, key(item)
    assert set(months) == {"01", "02", "03"}
    assert min(months.values()) > len(good) // 10


def test_every_patient_has_a_medical_record_number_and_a_social_security_number(good: list[Item]) -> None:
    seen: Counter[tuple[str, str]] = Counter()
    for item in good:
        if item.resource_type == "Patient":
            for identifier in orjson.loads(item.body)["identifier"]:
                seen[identifier["type"]["coding"][0]["code"], identifier["value"]] += 1
    assert Counter(code for code, _ in seen) == {"MR": 40, "SS": 40, "DL": 40}


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not() -> None:
    assert population(3) == population(3)
    assert {i.body for i in population(3)}.isdisjoint(i.body for i in population(3, seed=2))


def test_a_patient_does_not_depend_on_the_size_of_the_population() -> None:
    few, many = population(2), population(5)
    assert many[: len(few)] == few


def test_defects_leave_the_other_resources_unchanged(good: list[Item]) -> None:
    broken = population(40, bad_share=0.05)
    assert [key(item) for item in broken] == [key(item) for item in good]
    bad = [item for item in broken if item.defect]
    assert [g for g, b in zip(good, broken, strict=True) if not b.defect] == [b for b in broken if not b.defect]
    assert 0.03 < len(bad) / len(broken) < 0.07


def test_every_defect_occurs_and_is_caught_by_its_rule() -> None:
    validator = Validator()
    occurred: Counter[str] = Counter()
    for item in population(60, bad_share=0.5):
        if item.defect is not None:
            occurred[item.defect.name] += 1
            rules = {issue.rule for issue in validator.check(item.body).issues if issue.severity == "error"}
            assert item.defect.rule in rules, (item.defect.name, item.resource_type, rules)
    assert set(occurred) == {defect.name for defect in DEFECTS}


def test_generate_yields_resource_type_and_json() -> None:
    assert list(generate(2, start=START, end=END)) == [(i.resource_type, i.body) for i in population(2)]


def test_the_files_contain_the_population_and_the_list_of_its_defects(tmp_path: Path) -> None:
    summary = write_population(tmp_path, Population(5, 1, 0.1, start=START, end=END))
    lines = {t.name: gzip.decompress((tmp_path / f"{t.name}.ndjson.gz").read_bytes()).splitlines() for t in CATALOG}
    expected = population(5, bad_share=0.1)
    for name, bodies in lines.items():
        assert bodies == [item.body for item in expected if item.resource_type == name]
    assert summary.resources == Counter({name: len(bodies) for name, bodies in lines.items() if bodies})
    listed = orjson.loads((tmp_path / ".defects.json").read_bytes())
    assert Counter(entry["defect"] for entry in listed) == summary.defects
    assert {f"{e['resourceType']}/{e['id']}" for e in listed} == {key(i) for i in expected if i.defect}
    assert not list(tmp_path.glob(".*.tmp"))
