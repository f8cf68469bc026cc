"""The page for those who come from another system: what it names exists, and what it says to run works."""

import csv
import io
import re
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

import orjson
import pytest

from fhir_assets.api.app import create_app, list_routes
from fhir_assets.fhir.intake import visits_csv
from fhir_assets.fhir.intake.cells import find_visit_problems
from fhir_assets.settings import Settings, load_settings
from fhir_assets.warehouse.postgres.db.connections import Session
from fhir_assets_tests.support.api import TOKENS

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "coming_from.md").read_text()
OTHERS = {"AWS_ENDPOINT_URL", "TMP_DIR", "FHIR_USERNAME", "FHIR_PASSWORD"}
"""Variables that other programs define, and names that the upload takes from them."""


def test_every_path_of_the_page_is_a_route() -> None:
    routes = [route.path for route in list_routes(create_app(load_settings(api_tokens=TOKENS)))]
    patterns = [re.compile(re.sub(r"\{[a-z_]+\}", "[^/]+", path)) for path in [*routes, "/openapi.json"]]
    named = re.findall(r"`(?:GET |POST )?(/[a-z][^`? ]*)[^`]*`", PAGE)
    assert len(named) > 15
    assert [path for path in named if not any(pattern.fullmatch(path) for pattern in patterns)] == []


def test_every_variable_of_the_page_is_a_setting() -> None:
    settings = {name.upper() for name in Settings.model_fields} | OTHERS
    named = set(re.findall(r"`([A-Z]+(?:_[A-Z]+)+\*?)[`=]", PAGE))
    assert len(named) > 20
    assert {name for name in named if not any(name in (s, f"{s[: len(name) - 1]}*") for s in settings)} == set()


def test_the_query_of_old_visits_writes_a_file_that_the_landing_zone_takes(conn: Session) -> None:
    conn.execute("""
        CREATE SCHEMA old;
        SET search_path TO old;
        CREATE TABLE patients (id serial PRIMARY KEY, mrn text);
        CREATE TABLE persons (id serial, patient_id int, first_name text, last_name text, birth_date date);
        CREATE TABLE visits (id serial, patient_id int, visit_account_number text, visit_date date, reason text);
        INSERT INTO patients (mrn) VALUES ('M-1'), ('M-2');
        INSERT INTO persons (patient_id, first_name, last_name, birth_date)
        VALUES (1, 'Ada', 'Lovelace', '1915-12-10'), (2, 'George', 'Byron, "Lord"', '1988-01-22');
        INSERT INTO visits (patient_id, visit_account_number, visit_date, reason)
        VALUES (2, 'V-1', '2024-01-05', NULL), (1, 'V-2', '2024-01-06', 'cough');
    """)
    [query] = re.findall(r"\\copy \((SELECT .+)\) TO 'visits.csv' CSV HEADER", PAGE)
    with conn.cursor() as cursor, cursor.copy(f"COPY ({query}) TO STDOUT CSV HEADER".encode()) as copy:
        text = b"".join(bytes(block) for block in copy).decode()
    rows = list(csv.DictReader(io.StringIO(text)))
    assert set(rows[0]) == set(visits_csv.COLUMNS)
    assert [row["visit_account_number"] for row in rows] == ["V-1", "V-2"]
    assert [problem for row in rows for problem in find_visit_problems(row)] == []


class Api(ThreadingHTTPServer):
    """Answers as the API does to `POST /ingest/{type}?wait=`; ``status`` is the status of the run."""

    status = "SUCCESS"
    asked: tuple[str, str | None] = ("", None)


class Handler(BaseHTTPRequestHandler):
    server: Api

    def do_POST(self) -> None:
        self.server.asked = (self.path, self.headers["Authorization"])
        run = {"run_id": "r1", "status": self.server.status, "summary": "/runs/r1", "dagster": "http://ui/runs/r1"}
        body = orjson.dumps({"run_id": "r1", "runs": [run]})
        self.send_response(202)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""


@pytest.fixture
def api() -> Iterator[Api]:
    server = Api(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_the_task_of_airflow_succeeds_and_fails_with_the_run(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    decorators = ModuleType("airflow.decorators")
    monkeypatch.setattr(decorators, "task", lambda **_: lambda function: function, raising=False)
    monkeypatch.setitem(sys.modules, "airflow", ModuleType("airflow"))
    monkeypatch.setitem(sys.modules, "airflow.decorators", decorators)
    monkeypatch.setenv("FHIR_ASSETS_API", f"http://127.0.0.1:{api.server_address[1]}")
    monkeypatch.setenv("FHIR_ASSETS_TOKEN", "secret")
    [code] = re.findall(r"```python\n(.+?)```", PAGE, re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(code, "coming_from.md", "exec"), names)
    assert names["load"]("Observation")["run_id"] == "r1"
    path, authorization = api.asked
    assert (urlsplit(path).path, authorization) == ("/ingest/Observation", "Bearer secret")
    for status in ("FAILURE", "QUEUED"):
        api.status = status
        with pytest.raises(RuntimeError, match=f"run r1 is {status}: see http://ui"):
            names["load"]("Observation")
