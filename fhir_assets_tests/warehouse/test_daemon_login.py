"""The daemon's login may read no table, and yet Dagster's daemon learns which runs of workers are alive."""

from contextlib import closing
from datetime import timedelta
from pathlib import Path

import dagster as dg
import pytest

from fhir_assets.orchestration.dagster_internals import WorkerStatus
from fhir_assets.orchestration.instance import celery_launcher
from fhir_assets.orchestration.instance.config import render_dagster_yaml
from fhir_assets.settings import Executor, load_settings
from fhir_assets.warehouse.ops import liveness
from fhir_assets.warehouse.postgres.db import role_rights
from fhir_assets.warehouse.postgres.db.connections import connect, normalise_url
from fhir_assets_tests.support.database_users import User, is_refused


def test_the_daemon_sees_which_workers_are_alive_with_a_login_that_reads_no_table(
    database: str, user: User, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = user(role_rights.DAGSTER)
    assert is_refused(url, "SELECT FROM ops.ingestion_runs")
    monkeypatch.setenv("DB_URL", url)
    monkeypatch.setenv("CELERY_BROKER_URL", "redis://localhost:6379/0")
    monkeypatch.setenv("DAGSTER_POSTGRES_URL", normalise_url(database, "psycopg2"))
    monkeypatch.setattr(celery_launcher, "GRACE", timedelta(minutes=-1))
    (tmp_path / "dagster.yaml").write_text(render_dagster_yaml(load_settings(fhir_executor=Executor.CELERY)))
    with dg.DagsterInstance.from_config(str(tmp_path)) as instance:
        run = instance.run_storage.add_run(
            dg.DagsterRun(job_name="job", run_id="a", status=dg.DagsterRunStatus.STARTED)
        )
        launcher = instance.run_launcher
        assert isinstance(launcher, celery_launcher.Launcher)
        with closing(connect(database)) as worker:
            liveness.hold_liveness_lock(worker, run.run_id)
            assert launcher.check_run_worker_health(run).status is WorkerStatus.RUNNING
        assert launcher.check_run_worker_health(run).status is WorkerStatus.FAILED
