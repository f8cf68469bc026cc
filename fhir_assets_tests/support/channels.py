"""The channels through which resources enter: each loads the same resources into a new deployment."""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from fhir_assets.sandbox.process import SandboxServer
from fhir_assets_tests.support.api import TOKENS, api_in_threads
from fhir_assets_tests.support.deployment import Deploy, Deployment
from fhir_assets_tests.support.landing import LandingZone, land, load_received

Load = Callable[[Deploy, list[dict[str, Any]], Path, dict[str, Any]], tuple[Deployment, list[str]]]
"""Loads resources with settings, and returns the deployment and the windows that do not reconcile.

Arguments: ``deploy``, the resources, a folder for files, and settings. Channels that take Bundles take entries of
Bundles, too.
"""


def name(each: dict[str, Any]) -> str:
    """Return the type and the id of a resource."""
    return f"{each['resourceType']}/{each['id']}"


def encode(resources: Iterable[dict[str, Any]]) -> bytes:
    """Return resources as NDJSON."""
    return b"".join(json.dumps(each).encode() + b"\n" for each in resources)


def build_bundle(resources: Iterable[dict[str, Any]]) -> bytes:
    """Return a Bundle of resources, or of entries."""
    entries = [
        each if "resource" in each else {"fullUrl": f"https://x.example/{name(each)}", "resource": each}
        for each in resources
    ]
    return json.dumps({"resourceType": "Bundle", "type": "collection", "entry": entries}).encode()


def deploy_landing(deploy: Deploy, folder: Path, **values: Any) -> tuple[Deployment, LandingZone]:
    """Return a deployment with an empty landing zone in a folder."""
    (folder / "landing").mkdir()
    zone = LandingZone(str(folder / "landing"))
    return deploy(fhir_landing_url=zone.url, **values), zone


def _load_from_server(source: str) -> Load:
    def load(deploy: Deploy, resources: list[dict[str, Any]], folder: Path, values: dict[str, Any]) -> Any:
        with SandboxServer([json.dumps(each).encode() for each in resources]) as server:
            deployment = deploy(fhir_base_url=server.url, fhir_source=source, **values)
            outcomes = deployment.ingest()
        assert all(outcome.success for outcome in outcomes)
        return deployment, [fault for outcome in outcomes for fault in deployment.unreconciled(outcome)]

    return load


def _load_files(deploy: Deploy, resources: list[dict[str, Any]], folder: Path, values: dict[str, Any]) -> Any:
    (folder / "source").mkdir()
    by_type = defaultdict[str, list[dict[str, Any]]](list)
    for each in resources:
        by_type[each["resourceType"]].append(each)
    for kind, of_type in by_type.items():
        (folder / "source" / f"{kind}.ndjson").write_bytes(encode(of_type))
    deployment = deploy(fhir_base_url=str(folder / "source"), fhir_source="ndjson", **values)
    outcomes = deployment.ingest()
    return deployment, [fault for outcome in outcomes for fault in deployment.unreconciled(outcome)]


def _load_landed(deploy: Deploy, resources: list[dict[str, Any]], folder: Path, values: dict[str, Any]) -> Any:
    deployment, zone = deploy_landing(deploy, folder, **values)
    zone.put("all.json", build_bundle(resources))
    return deployment, land(deployment)


def _load_posted(deploy: Deploy, resources: list[dict[str, Any]], folder: Path, values: dict[str, Any]) -> Any:
    deployment = deploy(**{"api_tokens": TOKENS, **values})
    with api_in_threads(deployment.settings) as api:
        headers = {"Content-Type": "application/fhir+json"}
        answer = api.post("/fhir", data=build_bundle(resources), headers=headers)
        assert answer.status_code == 200, answer.text
    return deployment, load_received(deployment)


CHANNELS: dict[str, Load] = {
    "search": _load_from_server("search"),
    "bulk": _load_from_server("bulk"),
    "files": _load_files,
    "landing zone": _load_landed,
    "post": _load_posted,
}

BUNDLE_CHANNELS = ("landing zone", "post")
"""The channels that take Bundles."""
