"""The ``dagster.yaml`` of a deployment, which processes read while others start."""

import threading
from pathlib import Path

import pytest
import yaml

from fhir_assets.orchestration.instance.config import build_environment
from fhir_assets.settings import Executor, load_settings


def test_processes_that_start_at_once_never_read_a_torn_dagster_yaml(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that reads an empty file would store its runs in a SQLite database of its own."""
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    monkeypatch.setenv("DAGSTER_POSTGRES_URL", "postgresql://localhost/dagster")
    plain, celery = (
        load_settings(fhir_assets_home=tmp_path, fhir_executor=executor, celery_broker_url="redis://localhost")
        for executor in (Executor.IN_PROCESS, Executor.CELERY)
    )
    path = Path(build_environment(plain)["DAGSTER_HOME"]) / "dagster.yaml"
    ended = threading.Event()

    def start_often() -> None:
        for _ in range(50):
            build_environment(celery)
            build_environment(plain)
        ended.set()

    writer = threading.Thread(target=start_often)
    writer.start()
    while not ended.is_set():
        assert "storage" in yaml.safe_load(path.read_text())
    writer.join()
    assert [entry.name for entry in path.parent.iterdir()] == ["dagster.yaml"]


def test_an_unchanged_dagster_yaml_is_not_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    monkeypatch.setenv("DAGSTER_POSTGRES_URL", "postgresql://localhost/dagster")
    settings = load_settings(fhir_assets_home=tmp_path)
    path = Path(build_environment(settings)["DAGSTER_HOME"]) / "dagster.yaml"
    written = path.stat()
    build_environment(settings)
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (written.st_ino, written.st_mtime_ns)
