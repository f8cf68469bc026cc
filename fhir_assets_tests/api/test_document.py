"""The OpenAPI document, and the conformance of the API to it."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fhir_assets.api.app import build_openapi, create_app, list_routes
from fhir_assets.cli.main import app as command_line
from fhir_assets.settings import load_settings
from fhir_assets_tests.support.api import TOKENS, Serve
from fhir_assets_tests.support.api_fuzz import fuzz

NEEDS_DAGSTER = frozenset(
    {
        "POST /ingest/{resource_type}",
        "POST /ingest/{resource_type}/backfill",
        "GET /runs/{run_id}",
        "GET /health",
        "GET /health/ready",
    }
)


@pytest.fixture(scope="module")
def described() -> dict[str, Any]:
    return build_openapi(create_app(load_settings(api_tokens=TOKENS)))


def test_the_api_and_the_command_have_the_version_of_the_package(described: dict[str, Any]) -> None:
    printed = CliRunner().invoke(command_line, ["--version"]).output.strip()
    assert described["info"]["version"] == printed == version("fhir-assets")


def test_the_document_contains_all_routes_except_its_own(described: dict[str, Any]) -> None:
    app = create_app(load_settings(api_tokens=TOKENS))
    existing = {(m.lower(), r.path) for r in list_routes(app) for m in r.methods or ()}
    documented = {(method, path) for path, operations in described["paths"].items() for method in operations}
    undocumented = ("/docs", "/redoc", "/docs/files/{name}", "/openapi.json")
    assert existing - documented == {("get", path) for path in undocumented}


def test_every_operation_has_a_description_and_examples_of_its_problems(described: dict[str, Any]) -> None:
    for path, operations in described["paths"].items():
        for operation in operations.values():
            assert operation["summary"]
            assert operation["description"]
            if "security" not in operation:
                continue
            for status in ("401", "403", "422", "429", "500", "503"):
                content = operation["responses"][status]["content"]
                assert all("example" in media for media in content.values()), (path, status)
            if "requestBody" in operation:
                assert all("example" in media for media in operation["requestBody"]["content"].values()), path


def test_responses_conform_to_the_document_and_are_never_500(serve: Serve, tmp_path: Path) -> None:
    # In a process of its own: while schemathesis is imported no other thread may compile (CPython 3.11 mixes them up).
    api = serve(
        fhir_export_url=str(tmp_path / "exports"),
        fhir_source="ndjson",
        fhir_base_url=str(tmp_path / "landing"),
        api_rate_limit=100_000,
    )
    known = {"resource_type": "observations", "patient_id": "nobody"}
    seen = fuzz(api, examples=4, known=known, unavailable=NEEDS_DAGSTER)
    assert 202 in seen["POST /api/v1/ingest"]
    assert seen["POST /export/{resource_type}"] >= {200, 404}
    assert len(seen) > 12
