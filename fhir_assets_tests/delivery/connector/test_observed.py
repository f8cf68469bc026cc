"""Dashboards and alerts query existing metrics; metrics and logs contain no patient data."""

import io
import json
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import requests
import yaml
from prometheus_client import generate_latest

from fhir_assets import logs
from fhir_assets.errors import ServerUnavailable
from fhir_assets.metrics.exposition import REGISTRY, render_metrics, serve_metrics
from fhir_assets.metrics.pipeline import register_database_metrics
from fhir_assets.sandbox.faults import Fault, FaultKind, RequestKind
from fhir_assets_tests.support.hospital import Hospital

DEPLOY = Path(__file__).parents[3] / "deploy"
FAMILY = "Canary-Family-Name"
MRN = "canary-mrn-4711"

ISSUED = {
    "fhir_outbox_unprocessed_count",
    "fhir_outbox_lag_seconds",
    "fhir_dlq_total",
    "fhir_connector_processed_total",
    "fhir_connector_failed_total",
    "fhir_call_latency_seconds_bucket",
    "fhir_call_errors_total",
}
"""Metrics whose names must not change, because other systems query them."""

OF_PROMETHEUS = {"up"}


def panels() -> dict[str, list[str]]:
    """Return the queries of each panel by its title, with a value for Grafana's interval."""
    board = json.loads((DEPLOY / "grafana" / "dashboards" / "fhir_assets.json").read_text())
    return {
        panel["title"]: [target["expr"].replace("$__rate_interval", "1m") for target in panel["targets"]]
        for panel in board["panels"]
        if panel["type"] != "row"
    }


def alerts() -> dict[str, str]:
    groups = yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"]
    return {rule["alert"]: rule["expr"] for group in groups for rule in group["rules"]}


def find_metric_names(query: str) -> set[str]:
    return set(re.findall(r"\b(?:fhir_\w+|up)\b(?!=)", query))


def pipeline_has_run(hospital: Hospital) -> None:
    """A load that left traces of every kind in the tables of ``ops``."""
    hospital.execute(
        "INSERT INTO ops.ingestion_runs (run_id, resource_type, partition_key, status, fetched, valid, dead, withheld,"
        " loaded, finished_at) VALUES ('r', 'Patient', '2024-01-01', 'SUCCESS', 10, 8, 1, 0, 8, now())"
    )
    hospital.execute("INSERT INTO ops.checkpoints (resource_type, loaded_until) VALUES ('Patient', '2024-01-02')")
    hospital.execute(
        "INSERT INTO ops.dead_letters (fingerprint, resource_type, stage, rule, path, message, partition_key, run_id,"
        " first_run_id, occurrences) VALUES ('x', 'Patient', 'validate', 'json', '', '', '2024-01-01', 'r', 'r', 1)"
    )
    hospital.execute(
        "INSERT INTO asset_check_executions (asset_key, check_name, partition, execution_status) VALUES"
        " ('a', 'reconciles', 'p', 'FAILED'), ('a', 'reconciles', 'p', 'SUCCEEDED'), ('a', 'reconciles', 'q', 'FAILED')"
    )


@pytest.fixture
def busy(hospital: Hospital, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hospital]:
    """A hospital whose connector had work, failures and a dead letter, with its database observed."""
    monkeypatch.setenv("DAGSTER_POSTGRES_URL", hospital.url)
    pipeline_has_run(hospital)
    hospital.server.set_faults(
        Fault(kind=FaultKind.ERROR, on=frozenset({RequestKind.CREATE, RequestKind.UPDATE}), times=2)
    )
    for n in range(5):
        hospital.admit(f"{MRN}-{n}", FAMILY)
    hospital.admit(None, FAMILY)
    hospital.deliver()
    with register_database_metrics(hospital.settings, hospital.connect):
        yield hospital


def render_exposition() -> str:
    return generate_latest(REGISTRY).decode()


def value(name: str) -> float:
    [text] = re.findall(rf"^{re.escape(name)} (\S+)$", render_exposition(), re.MULTILINE)
    return float(text)


def test_every_query_of_dashboard_and_alerts_uses_existing_metrics(busy: Hospital) -> None:
    existing = set(re.findall(r"^(fhir_\w+)", render_exposition(), re.MULTILINE)) | OF_PROMETHEUS
    assert existing >= ISSUED
    queries = {query for panel in panels().values() for query in panel} | set(alerts().values())
    assert len(queries) > 25
    for query in queries:
        assert find_metric_names(query), query
        assert find_metric_names(query) <= existing, query


def test_the_metrics_report_the_outbox(busy: Hospital, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fhir_assets.metrics.pipeline.MAX_AGE_SECONDS", 0.0)
    assert value("fhir_outbox_unprocessed_count") == 0
    assert value("fhir_outbox_lag_seconds") == 0
    assert value("fhir_dlq_total") == 1
    busy.admit("9")
    busy.execute("UPDATE health.fhir_outbox SET created_at = created_at - interval '1 hour'")
    assert value("fhir_outbox_unprocessed_count") == 1
    assert value("fhir_outbox_lag_seconds") >= 3600
    assert value('fhir_unaccounted_resources{type="Patient"}') == 1
    assert value('fhir_check_results{check="reconciles",status="failed"}') == 1
    assert value('fhir_check_results{check="reconciles",status="succeeded"}') == 1


def test_an_unreachable_database_is_reported_as_down_without_stale_values(hospital: Hospital) -> None:
    def refuse_connection() -> "psycopg.Connection[tuple[Any, ...]]":
        raise psycopg.OperationalError

    with register_database_metrics(hospital.settings, refuse_connection):
        assert value("fhir_database_up") == 0
        assert "fhir_outbox_unprocessed_count" not in render_exposition()


def test_an_occupied_metrics_port_does_not_stop_the_process() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, serve_metrics("127.0.0.1", taken.getsockname()[1]) as port:
        assert port is None


def test_metrics_and_logs_contain_no_patient_data(busy: Hospital) -> None:
    stream = io.StringIO()
    before = list(logging.getLogger().handlers)
    try:
        logs.configure("connector", "DEBUG", stream=stream)
        busy.server.set_faults(Fault(kind=FaultKind.ERROR, every=2))
        busy.execute("UPDATE health.patient SET name_given = 'x', birth_date = '0044-03-15 BC'")
        busy.deliver(connector_max_attempts=2)
    finally:
        logging.getLogger().handlers[:] = before
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert lines
    assert {"time", "level", "service", "logger", "message"} <= lines[0].keys()
    dead_letters = str(busy.execute("SELECT reason, message FROM health.fhir_dlq"))
    for text in (stream.getvalue(), render_exposition(), dead_letters):
        assert FAMILY not in text
        assert MRN not in text
        assert "0044" not in text


def test_a_foreign_error_is_logged_by_its_type_and_an_own_error_with_its_message() -> None:
    formatter = logs.JsonFormatter("api")

    def line(error: Exception) -> dict[str, Any]:
        try:
            raise error
        except Exception as raised:
            record = logging.makeLogRecord(
                {"msg": "failed", "exc_info": (type(raised), raised, raised.__traceback__), "window": "2024-01-01"}
            )
        formatted: dict[str, Any] = json.loads(formatter.format(record))
        return formatted

    foreign = line(ValueError("Ada Testperson"))
    assert foreign["error"]["type"] == "builtins.ValueError"
    assert "Ada" not in json.dumps(foreign)
    assert foreign["window"] == "2024-01-01"
    assert line(ServerUnavailable("it is down"))["error"]["message"] == "it is down"


@pytest.mark.parametrize("tool", ["check config prometheus.yml", "check rules alerts.yml"])
def test_promtool_accepts_the_configuration(tool: str) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed: apt-get install prometheus")
    done = subprocess.run([promtool, *tool.split()], cwd=DEPLOY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_prometheus_scrapes_the_metrics_and_every_panel_has_data(busy: Hospital, tmp_path: Path) -> None:
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("Prometheus is not installed: apt-get install prometheus")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with socket.create_server(("127.0.0.1", 0)) as free:
        own = free.getsockname()[1]
    config = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["scrape_configs"] = [
        {**job, "static_configs": [{"targets": [f"127.0.0.1:{own}"]}]}
        for job in config["scrape_configs"]
        if job["job_name"] == "connector"
    ]
    shutil.copy(DEPLOY / "alerts.yml", tmp_path)
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    with serve_metrics("127.0.0.1", own) as listening:
        assert listening == own
        server = subprocess.Popen(
            [
                program,
                f"--config.file={tmp_path / 'prometheus.yml'}",
                f"--storage.tsdb.path={tmp_path / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
                "--log.level=error",
            ]
        )
        try:
            missing = {title: list(queries) for title, queries in panels().items()}
            deadline = time.monotonic() + 600
            while any(missing.values()):
                assert time.monotonic() < deadline, {title: queries for title, queries in missing.items() if queries}
                busy.execute("UPDATE health.patient SET updated_at = now()")
                busy.deliver()
                time.sleep(1)
                missing = {
                    title: [query for query in queries if not has_data(port, query)]
                    for title, queries in missing.items()
                }
            for name, query in alerts().items():
                assert ask(port, query)["status"] == "success", name
        finally:
            server.terminate()
            server.wait()


def ask(port: int, query: str) -> dict[str, Any]:
    answer: dict[str, Any] = requests.get(
        f"http://127.0.0.1:{port}/api/v1/query", params={"query": query}, timeout=10
    ).json()
    return answer


def has_data(port: int, query: str) -> bool:
    try:
        samples = ask(port, query)["data"]["result"]
    except requests.ConnectionError:
        return False
    return any(sample["value"][1] != "NaN" for sample in samples)


def test_rendered_metrics_equal_the_exposition(busy: Hospital) -> None:
    body, content_type = render_metrics()
    assert body.decode() == render_exposition()
    assert content_type.startswith("text/plain")


def test_compose_provides_the_targets_that_prometheus_and_grafana_are_configured_for() -> None:
    compose = yaml.safe_load((DEPLOY.parent / "docker-compose.yml").read_text())
    services = compose["services"]
    for service in services.values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            exists = DEPLOY.parent.joinpath(source).exists() if source.startswith(".") else source in compose["volumes"]
            assert exists, source
        assert set(service.get("depends_on", [])) <= set(services)
    config = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    jobs = {job["job_name"]: job for job in config["scrape_configs"]}
    port = services["metrics"]["environment"]["METRICS_PORT"]
    assert jobs["pipeline"]["static_configs"][0]["targets"] == [f"metrics:{port}"]
    assert services["metrics"]["profiles"] == services["prometheus"]["profiles"]
    for name in ("connector", "api"):
        [by_name] = jobs[name]["dns_sd_configs"]
        assert by_name["names"] == [name]
        assert str(by_name["port"]) == services[name]["environment"]["METRICS_PORT"]
    [source] = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    [provider] = yaml.safe_load((DEPLOY / "grafana/provisioning/dashboards/fhir_assets.yml").read_text())["providers"]
    mounted = [volume.split(":")[1] for volume in services["grafana"]["volumes"]]
    assert provider["options"]["path"] in mounted
    grafana = services["grafana"]["environment"]
    assert "/var/lib/grafana" in mounted, "what people change in Grafana is kept"
    assert "GRAFANA_PASSWORD" in grafana["GF_SECURITY_ADMIN_PASSWORD"]
    assert not {"GF_AUTH_DISABLE_LOGIN_FORM", "GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION"} & grafana.keys()


_RULES = """
rule_files: [{rules}]
evaluation_interval: 1m
tests:
  - name: no connector was ever installed
    interval: 1m
    input_series:
      - series: 'up{{job="pipeline"}}'
        values: '1x10'
    alert_rule_test:
      - {{alertname: ConnectorDown, eval_time: 5m, exp_alerts: []}}
      - {{alertname: MetricsDown, eval_time: 9m, exp_alerts: []}}
  - name: the connector of an outbox runs nowhere
    interval: 1m
    input_series:
      - series: 'fhir_outbox_unprocessed_count{{job="pipeline"}}'
        values: '0x10'
    alert_rule_test:
      - alertname: ConnectorDown
        eval_time: 5m
        exp_alerts:
          - exp_labels: {{severity: critical, job: connector}}
            exp_annotations: {{summary: "{down}"}}
      - alertname: MetricsDown
        eval_time: 9m
        exp_alerts:
          - exp_labels: {{severity: warning, job: pipeline}}
            exp_annotations: {{summary: "{silent}"}}
  - name: the connector runs
    interval: 1m
    input_series:
      - series: 'fhir_outbox_unprocessed_count{{job="pipeline"}}'
        values: '0x10'
      - series: 'up{{job="connector", instance="a"}}'
        values: '1x10'
    alert_rule_test:
      - {{alertname: ConnectorDown, eval_time: 5m, exp_alerts: []}}
"""


def test_the_absence_of_a_connector_is_an_alert_only_where_there_is_an_outbox(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed: apt-get install prometheus")
    groups = yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"]
    summaries = {rule["alert"]: rule["annotations"]["summary"] for group in groups for rule in group["rules"]}
    file = tmp_path / "tests.yml"
    file.write_text(
        _RULES.format(rules=DEPLOY / "alerts.yml", down=summaries["ConnectorDown"], silent=summaries["MetricsDown"])
    )
    done = subprocess.run([promtool, "test", "rules", str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_metrics_of_the_pipeline_are_served_without_connector_and_api(database: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {**os.environ, "DB_URL": database, "METRICS_PORT": str(port)}
    command = [sys.executable, "-c", "from fhir_assets.cli import main; main()", "metrics"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert f"127.0.0.1:{port}/metrics" in process.stdout.readline()
            text = requests.get(f"http://127.0.0.1:{port}/metrics", timeout=30).text
        finally:
            process.terminate()
        assert process.wait(30) == 0
    assert "fhir_database_up 1.0" in text
    assert "fhir_windows_behind" in text
