"""A post loader under test: in a thread of this process, or as a process that a test may kill."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

from fhir_assets.deployment.views import build_views
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.orchestration.posts.loader import PostLoader
from fhir_assets.orchestration.posts.loads import PostLoads
from fhir_assets.orchestration.posts.reports import PostReports
from fhir_assets.pipeline.reconcile.window_counts import find_main_view, reconcile
from fhir_assets.warehouse.ops import post_loader
from fhir_assets_tests.support.api import TOKENS, Api, api_environment
from fhir_assets_tests.support.deployment import Deploy, Deployment

TYPES = ("Patient", "Encounter")
_PATIENCE_SECONDS = 120.0


def deploy_hospital(deploy: Deploy, folder: Path, **values: Any) -> Deployment:
    """Return a deployment that takes posts of patients and visits."""
    (folder / "landing").mkdir(exist_ok=True)
    return deploy(
        **{
            "fhir_landing_url": str(folder / "landing"),
            "fhir_resource_types": TYPES,
            "fhir_last_updated_gte": "2024-01-01",
            "api_tokens": TOKENS,
            "api_rate_limit": 100_000,
            "metrics_port": 0,
            **values,
        }
    )


def build_loads(deployment: Deployment) -> PostLoads:
    """Return the loads of a post loader."""
    settings = deployment.settings
    return PostLoads(settings, Warehouse(settings), build_views(settings).views)


def build_post_loader(deployment: Deployment) -> PostLoader:
    """Return the post loader of a deployment, as the command builds it."""
    settings = deployment.settings
    warehouse = Warehouse(settings)
    views = build_views(settings).views
    reports = PostReports(settings, warehouse, views, lambda: deployment.instance)
    return PostLoader(warehouse, PostLoads(settings, warehouse, views), reports)


@contextmanager
def reserved_lane(deployment: Deployment) -> Iterator[None]:
    """Hold the lock of a post loader that loads nothing."""
    with Warehouse(deployment.settings).connect() as conn:
        assert post_loader.try_begin(conn)
        conn.commit()
        yield


@contextmanager
def post_loader_in_thread(deployment: Deployment) -> Iterator[PostLoader]:
    """Run a post loader in a thread of this process."""
    loader = build_post_loader(deployment)
    thread = Thread(target=loader.run, name="post-loader", daemon=True)
    thread.start()
    try:
        wait_until(lambda: is_running(deployment))
        yield loader
    finally:
        loader.stop()
        thread.join(_PATIENCE_SECONDS)
        assert not thread.is_alive()


def start_command(deployment: Deployment, folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """Start a command of `fhir-assets` as a process. Its output is appended to a log in ``folder``."""
    code = "from fhir_assets.cli import main; main()"
    environment = {
        **api_environment({}),
        **deployment.environment(),
        "FHIR_LANDING_URL": deployment.settings.fhir_landing_url,
    }
    with (folder / f"{arguments[0]}.log").open("ab") as log:
        return subprocess.Popen([sys.executable, "-c", code, *arguments], env=environment, stdout=log, stderr=log)


def kill(process: subprocess.Popen[bytes]) -> None:
    """End a process as ``kill -9`` does."""
    process.send_signal(signal.SIGKILL)
    process.wait()


def is_running(deployment: Deployment) -> bool:
    """Return whether a post loader of the deployment runs."""
    with Warehouse(deployment.settings).connect() as conn:
        return post_loader.is_running(conn)


def wait_until(condition: Callable[[], object]) -> None:
    """Wait until a condition is true. Fail after a time that no busy machine needs."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true"
        time.sleep(0.05)


def build_visit(number: int, **more: str) -> dict[str, str]:
    """Return a visit to post, with numbers of its own."""
    return {
        "mrn": f"MRN-{number}",
        "first_name": "Ada",
        "last_name": f"Example-{number}",
        "birth_date": "1970-01-31",
        "visit_account_number": f"V-{number}",
        "visit_date": "2024-01-30",
        "reason": "Annual check",
        **more,
    }


def post_visit(api: Api, number: int) -> str:
    """Post a list of one visit and return the id of its task."""
    answer = api.post("/ingest", json=[build_visit(number)])
    assert answer.status_code == 202, answer.text
    return str(answer.json()["task_id"])


def post_patient(api: Api, key: str, **more: Any) -> None:
    """Post a Patient as a record."""
    answer = api.post("/api/v1/ingest", json={"records": [{"resourceType": "Patient", "id": key, **more}]})
    assert answer.status_code == 202, answer.text


def find_faults(deployment: Deployment) -> list[str]:
    """Return why windows do not reconcile, looked at now."""
    views = build_views(deployment.settings).views
    faults = []
    with Warehouse(deployment.settings).connect() as conn:
        for name in deployment.settings.fhir_resource_types:
            keys = deployment.store.partition_keys("raw", name)
            windows = reconcile(conn, deployment.store, name, keys, main_view=find_main_view(views, name))
            faults += [fault for window in windows for fault in window.faults]
    return faults


def count_pending(deployment: Deployment) -> int:
    """Return the number of received windows and landed files that wait."""
    (row,) = deployment.query(
        "SELECT (SELECT count(*) FROM ops.received WHERE loaded_at IS NULL)"
        " + (SELECT count(*) FROM ops.landing_files WHERE status <> 'loaded')"
    )
    return int(row[0])
