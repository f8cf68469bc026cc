"""Settings and results of the validator, OperationOutcomes, the built rules, and validation of files."""

import gzip
import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import pytest

from fhir_assets.errors import NotFhir
from fhir_assets.fhir.validation import Issue, Validator, build_operation_outcome
from fhir_assets.fhir.validation.build_rules import build
from fhir_assets.fhir.validation.report import (
    CheckedResource,
    UnreadablePart,
    ValidationSummary,
    build_located_outcome,
    validate_files,
)
from fhir_assets.fhir.validation.rules import load_rules
from fhir_assets_tests.support.resource_samples import Sampler, to_bytes

SECRET = "Zaphod-4711"


def patient(**elements: object) -> bytes:
    return to_bytes({"resourceType": "Patient", **elements})


@pytest.mark.parametrize(
    ("rule", "demotes"),
    [
        ("required-binding", True),
        ("required-binding:Patient.contact.gender", True),
        ("required-binding:Patient.gender", False),
        ("required", False),
        ("structure", False),
    ],
)
def test_warn_rules_demote_by_rule_prefix_or_path(rule: str, demotes: bool) -> None:
    body = patient(contact=[{"gender": "malee", "name": {"text": "x"}}])
    result = Validator(warn_rules=[rule]).check(body)
    assert len(result.issues) == 1
    assert result.valid is demotes


def test_a_prefix_demotes_all_invariants() -> None:
    body = to_bytes({"resourceType": "Organization", "active": True})
    assert [issue.rule for issue in Validator().check(body).issues] == ["invariant:org-1"]
    assert Validator(warn_rules=["invariant"]).check(body).valid
    assert Validator(warn_rules=["invariant:org-1"]).check(body).valid


def test_no_message_path_or_repr_contains_a_value() -> None:
    text = {"id": SECRET + " ", SECRET + " x": 1, "gender": SECRET, "birthDate": SECRET, "active": SECRET}
    reference = {"reference": SECRET, "type": SECRET}
    narrative = {"status": "generated", "div": f"<div>{SECRET}"}
    resource = patient(**text, text=narrative, generalPractitioner=[reference], multipleBirthInteger=SECRET)
    result = Validator().check(resource)
    assert len(result.issues) >= 8
    assert SECRET not in repr(result)
    assert SECRET not in json.dumps(build_operation_outcome(result.issues))
    assert SECRET not in repr(Validator().check(resource[:-1]))


def test_issues_beyond_a_hundred_of_each_severity_are_counted() -> None:
    names = [{"use": "x", "text": "a"} for _ in range(1_500)]
    result = Validator().check(patient(name=names, gender="y"))
    assert [issue.path for issue in result.issues[:100]] == [f"Patient.name[{n}].use" for n in range(100)]
    assert result.issues[100:] == (Issue("unlisted", "error", "Resource", "1,401 more are not listed"),)
    demoting = Validator(warn_rules=["required-binding:Patient.name.use"]).check(patient(name=names, gender="y"))
    assert not demoting.valid, "the error after the warnings counts"
    errors = [issue.path for issue in demoting.issues if issue.severity == "error"]
    assert errors == ["Patient.gender"]
    assert demoting.issues[-1] == Issue("unlisted", "warning", "Resource", "1,400 more are not listed")
    assert Validator().check(to_bytes(build_operation_outcome(result.issues))).issues == ()


def test_an_operation_outcome_is_itself_valid() -> None:
    all_issues = Validator().check(patient(gender="x", foo=1, contact=[{}])).issues
    for issues in (all_issues, (), (Issue("json", "error", "Resource", "broken"),)):
        outcome = build_operation_outcome(issues)
        assert Validator().check(to_bytes(outcome)).issues == ()
        assert [i.get("expression") for i in outcome["issue"]] == [[i.path] for i in issues] or not issues


def test_threads_and_pickled_validators_give_the_same_results() -> None:
    bodies = [to_bytes(Sampler(Random(n), 0.4).resource("Observation")) for n in range(60)]
    validator = Validator(warn_rules=["invariant"])
    alone = [validator.check(body).issues for body in bodies]
    other: Validator = pickle.loads(pickle.dumps(validator))
    assert [other.check(body).issues for body in bodies] == alone
    with ThreadPoolExecutor(4) as pool:
        fresh = list(pool.map(lambda body: Validator(warn_rules=["invariant"]).check(body).issues, bodies))
    assert fresh == alone


def test_entries_of_a_bundle_are_validated_at_their_paths() -> None:
    bundle = {
        "resourceType": "Bundle",
        "type": "collection",
        "entry": [{"resource": {"resourceType": "Patient", "gender": "x"}}, {}],
    }
    assert {(i.rule, i.path) for i in Validator().check(to_bytes(bundle)).issues} == {
        ("required-binding", "Bundle.entry[0].resource.gender"),
        ("structure", "Bundle.entry[1]"),
    }


def definitions() -> list[dict[str, object]]:
    element = {"path": "Thing", "min": 0, "max": "*", "base": {"path": "Thing", "min": 0, "max": "*"}}
    code = {
        "path": "Thing.kind",
        "min": 1,
        "max": "1",
        "base": {"path": "Thing.kind", "min": 1, "max": "1"},
        "type": [{"code": "code"}],
        "binding": {"strength": "required", "valueSet": "http://x.org/vs|1"},
    }
    base = "http://hl7.org/fhir/StructureDefinition/"
    definition: dict[str, object] = {
        "resourceType": "StructureDefinition",
        "url": base + "Thing",
        "version": "4.0.1",
        "kind": "resource",
    }
    definition |= {"type": "Thing", "abstract": False, "baseDefinition": base + "DomainResource"}
    return [
        definition | {"snapshot": {"element": [element, code]}},
        {"resourceType": "ValueSet", "url": "http://x.org/vs", "compose": {"include": [{"system": "http://x.org/cs"}]}},
        {
            "resourceType": "CodeSystem",
            "url": "http://x.org/cs",
            "concept": [{"code": "a", "concept": [{"code": "b"}]}],
        },
    ]


def test_rules_are_the_same_from_bundles_and_from_ndjson(tmp_path: Path) -> None:
    first, second = tmp_path / "bundles", tmp_path / "lines"
    first.mkdir()
    second.mkdir()
    for n, resource in enumerate(definitions()):
        bundle = {"resourceType": "Bundle", "entry": [{"resource": resource}]}
        (first / f"{n}.json").write_text(json.dumps(bundle))
    (second / "all.ndjson.gz").write_bytes(gzip.compress(b"\n".join(map(to_bytes, definitions()))))
    rules = build(first)
    assert rules == build(second)
    assert rules["structures"]["Thing"]["elements"]["kind"] == {"t": ["code"], "n": 1, "v": "http://x.org/vs"}
    assert rules["valueSets"] == {"http://x.org/vs": {"http://x.org/cs": ["a", "b"]}}


def test_all_146_resource_types_have_rules() -> None:
    assert len(load_rules().resource_types) == 146
    assert Validator().rules_version.startswith("4.0.1-")


def test_files_are_validated_line_by_line_and_bundles_entry_by_entry(tmp_path: Path) -> None:
    lines, pretty, bundle = tmp_path / "p.ndjson.gz", tmp_path / "p.json", tmp_path / "b.json"
    lines.write_bytes(gzip.compress(patient(id="a") + b"\n\n" + patient(gender="x") + b"\n{broken}\n"))
    pretty.write_text(json.dumps({"resourceType": "Patient", "foo": 1}, indent=2))
    entries = [{"resource": {"resourceType": "Patient", "gender": "x"}}, {"resource": {"resourceType": "Patient"}}]
    bundle.write_text(json.dumps({"resourceType": "Bundle", "type": "collection", "entry": entries}))
    checked = [
        resource
        for resource in validate_files([lines, pretty, bundle], Validator())
        if isinstance(resource, CheckedResource)
    ]
    summary = ValidationSummary()
    for resource in checked:
        summary.add(resource.result)
    assert [(c.line, c.entry, c.result.valid) for c in checked] == [
        (1, None, True),
        (3, None, False),
        (4, None, False),
        (1, None, False),
        (1, 0, False),
        (1, 1, True),
    ]
    assert (summary.resources, summary.invalid) == (6, 4)
    assert summary.rows()[0] == {"severity": "error", "rule": "required-binding", "path": "Patient.gender", "count": 2}
    assert build_located_outcome(checked[1])["issue"][0]["location"] == [f"{lines}:3"]


def test_an_issue_of_an_entry_around_its_resource_is_an_issue_of_the_bundle(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle.json"
    entry = {"fullUrl": 1, "resource": {"resourceType": "Patient"}}
    bundle.write_text(json.dumps({"resourceType": "Bundle", "type": "collection", "entry": [entry]}))
    summary = ValidationSummary()
    for checked in validate_files([bundle], Validator()):
        assert isinstance(checked, CheckedResource)
        summary.add(checked.result)
    assert (summary.resources, summary.invalid) == (2, 1)
    assert "Bundle.entry.fullUrl" in [finding["path"] for finding in summary.rows()]


@pytest.mark.parametrize("name", ["lines.ndjson", "lines.json"])
def test_a_broken_first_line_costs_itself(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"{" + b"\n" + patient() + b"\n" + patient())
    checked = list(validate_files([tmp_path / name], Validator()))
    assert [(c.line, isinstance(c, CheckedResource) and c.result.valid) for c in checked] == [
        (1, False),
        (2, True),
        (3, True),
    ]


def test_a_file_that_was_cut_off_gives_its_lines_and_the_next_file_its_own(tmp_path: Path) -> None:
    (tmp_path / "cut.ndjson.gz").write_bytes(gzip.compress(b"\n".join([patient()] * 2))[:-9])
    (tmp_path / "whole.ndjson").write_bytes(patient())
    checked = list(validate_files([tmp_path], Validator()))
    assert [(c.location.rpartition("/")[2], isinstance(c, UnreadablePart)) for c in checked] == [
        ("cut.ndjson.gz:1", False),
        ("cut.ndjson.gz:2", True),
        ("whole.ndjson:1", False),
    ]


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFhir, match="absent"):
        list(validate_files([tmp_path / "absent.json"], Validator()))
