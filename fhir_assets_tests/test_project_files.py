"""The files of the project itself: lock files, workflow, documentation links."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
LOCKS = sorted((ROOT / "requirements").glob("*.lock"))
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / ".github").rglob("*.md")])


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.stem)
def test_every_locked_version_has_hashes_and_no_address(lock: Path) -> None:
    text = lock.read_text()
    requirements = re.findall(r"^[a-z0-9][^\n]*\\\n(?: +--hash=sha256:[0-9a-f]{64}(?: \\)?\n)+", text, re.MULTILINE)
    assert "".join(requirements) == text
    assert "://" not in text
    assert "--index-url" not in text


def test_the_lock_files_name_every_dependency_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    locked = {
        lock.stem: set(re.findall(r"^([a-z0-9-]+)(?:\[[a-z0-9, -]+\])?==", lock.read_text(), re.MULTILINE))
        for lock in LOCKS
    }

    def missing(requirements: list[str], lock: str) -> set[str]:
        names = {re.split(r"[\[<>=!~ ;]", text)[0].lower().replace(".", "-") for text in requirements}
        return names - {"fhir-assets"} - locked[lock]

    runtime = project["dependencies"] + extras["embedded"] + extras["parquet"] + extras["celery"] + extras["k8s"]
    assert missing(runtime, "runtime") == set()
    assert missing(runtime + extras["test"] + extras["lint"] + extras["dev"], "dev") == set()
    assert missing(runtime + extras["benchmark"], "benchmark") == set()
    assert missing(runtime + extras["test"] + extras["dbt"], "dbt") == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_between_pages_leads_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
    broken = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert broken == []


def test_the_workflow_runs_the_commands_that_ci_runs() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    steps = [step.get("run", "") for job in workflow["jobs"].values() for step in job["steps"]]
    assert any(step.startswith("make check") for step in steps)
    assert any(step.endswith("bash .ci/run") for step in steps)
    pythons = workflow["jobs"]["check"]["strategy"]["matrix"]["python"]
    assert pythons == ["3.11", "3.12", "3.13", "3.14"]


def test_the_image_is_locked_and_runs_without_privileges() -> None:
    dockerfile = (ROOT / "deploy" / "Dockerfile").read_text()
    stages = dockerfile.split("\nFROM ")
    assert len(stages) == 3
    assert "--require-hashes" in stages[1]
    assert stages[1].index("COPY requirements") < stages[1].index("COPY fhir_assets")
    assert "\nUSER fhir\n" in stages[2]
    assert "\nHEALTHCHECK " in stages[2]


def test_the_stories_that_ci_leaves_out_exist() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    left_out = re.search(r'LEFT_OUT="([^"]+)"', script)
    assert left_out is not None
    for story in left_out[1].split():
        file, _, test = story.partition("::")
        assert f"def {test}" in (ROOT / "fhir_assets_tests" / file).read_text()


@pytest.mark.parametrize(
    ("answer", "options", "kept"),
    [("no\n", [], True), ("", [], True), ("yes\n", [], False), ("", ["FORCE=1"], False)],
)
def test_make_clean_asks_before_it_deletes_data(tmp_path: Path, answer: str, options: list[str], kept: bool) -> None:
    (tmp_path / "Makefile").write_bytes((ROOT / "Makefile").read_bytes())
    for folder in (".fhir_assets", ".venv", "build"):
        (tmp_path / folder).mkdir()
    done = subprocess.run(["make", "clean", *options], cwd=tmp_path, input=answer, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / ".fhir_assets").exists() is kept
    assert not (tmp_path / ".venv").exists()


def test_make_help_lists_every_target_that_a_user_calls() -> None:
    text = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    listed = {line.split()[0] for line in text.splitlines()}
    assert {"demo", "test", "build", "up", "down", "logs", "start", "clean"} <= listed
