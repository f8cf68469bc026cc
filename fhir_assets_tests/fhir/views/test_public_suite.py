"""The public SQL on FHIR suite, and the runner that writes its report."""

import json
from pathlib import Path
from typing import Any

import pytest

from fhir_assets_tests.support.sql_on_fhir_suite import build_report, find_failure, main, read_cases

SUITE = Path(__file__).resolve().parents[3].parent / "shared" / "sql-on-fhir" / "tests"
OWN: dict[str, Any] = {
    "title": "own",
    "resources": [{"resourceType": "Patient", "id": "p", "name": [{"family": "a"}, {"family": "b"}]}],
    "tests": [],
}


def suite(folder: Path, **test: Any) -> Path:
    view = {"resource": "Patient", "select": [{"column": [{"name": "id", "path": "id"}]}]}
    case = {"title": "case", "view": view, **test}
    (folder / "own.json").write_text(json.dumps({**OWN, "tests": [case]}))
    return folder


@pytest.mark.skipif(not SUITE.exists(), reason=f"the public suite is not in {SUITE}")
def test_every_case_of_the_public_suite_passes() -> None:
    cases = list(read_cases(SUITE))
    failures = [f"{case.file}: {case.title}: {reason}" for case in cases if (reason := find_failure(case))]
    assert len(cases) == 134
    assert failures == []


@pytest.mark.parametrize(
    "test",
    [
        {"expect": [{"id": "p"}]},
        {"expectCount": 1},
        {"expect": [{"id": "p"}], "expectColumns": ["id"]},
        {"view": {"resource": "Patient"}, "expectError": True},
    ],
)
def test_a_case_with_the_expected_rows_passes(tmp_path: Path, test: dict[str, Any]) -> None:
    assert build_report(suite(tmp_path, **test))["own.json"]["tests"] == [{"name": "case", "result": {"passed": True}}]


@pytest.mark.parametrize(
    "test",
    [
        {"expect": [{"id": "q"}]},
        {"expect": []},
        {"expect": [{"id": "p"}, {"id": "p"}]},
        {"expectCount": 2},
        {"expect": [{"id": "p"}], "expectColumns": ["key"]},
        {"expectError": True},
        {"view": {"resource": "Patient"}, "expect": []},
        {},
    ],
)
def test_a_case_with_other_rows_fails_with_a_reason(tmp_path: Path, test: dict[str, Any]) -> None:
    (result,) = build_report(suite(tmp_path, **test))["own.json"]["tests"]
    assert result["result"]["passed"] is False
    assert result["result"]["error"]


def test_the_command_writes_the_report_and_fails_if_a_case_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "out" / "test_report.json"
    target.parent.mkdir()
    for test, code in (({"expectCount": 1}, 0), ({"expectCount": 2}, 1)):
        monkeypatch.setattr("sys.argv", ["public_suite", str(suite(tmp_path, **test)), "--report", str(target)])
        assert main() == code
        assert json.loads(target.read_text())["own.json"]["tests"][0]["result"]["passed"] is (code == 0)
    assert "1 of 1 cases pass" in capsys.readouterr().out
