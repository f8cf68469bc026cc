"""Small resources for a sandbox server, and the requests that it received."""

import json
from datetime import datetime
from typing import Any
from urllib.parse import parse_qs, urlsplit

import dagster as dg

from fhir_assets.definitions import build_definitions
from fhir_assets.orchestration.run_requests import range_tags
from fhir_assets.orchestration.tags import REFRESH_TAG
from fhir_assets.pipeline.refresh import Refresh
from fhir_assets.sandbox.process import SandboxServer
from fhir_assets.windows import WindowRange
from fhir_assets_tests.support.deployment import Deployment


def instant(moment: datetime) -> str:
    """Return a time as a FHIR instant with milliseconds."""
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


def patient(identity: str, moment: datetime, *, version: str = "1", **fields: Any) -> bytes:
    """Return a valid Patient as JSON."""
    meta = {"versionId": version, "lastUpdated": instant(moment)}
    return json.dumps({"resourceType": "Patient", "id": identity, "meta": meta, **fields}).encode()


def encounter(identity: str, moment: datetime, subject: str, **fields: Any) -> bytes:
    """Return a finished Encounter of a subject as JSON."""
    resource = {
        "resourceType": "Encounter",
        "id": identity,
        "meta": {"lastUpdated": instant(moment)},
        "status": "finished",
        "class": {"code": "AMB"},
        "subject": {"reference": subject},
        **fields,
    }
    return json.dumps(resource).encode()


def add(server: SandboxServer, *bodies: bytes) -> None:
    """Put resources on the server with the ``lastUpdated`` that they contain, which may be in the past."""
    for body in bodies:
        server.store.seed(body, 0)


def list_search_intervals(server: SandboxServer, resource_type: str = "Patient") -> list[tuple[str, str]]:
    """Return the intervals of ``_lastUpdated`` of the searches that the server received, as pairs of start and end.

    Searches for counts and requests of further pages are left out.
    """
    intervals = []
    for line in server.stats()["recent"]:
        url = urlsplit(line.split(" ", 1)[1])
        query = parse_qs(url.query)
        if (
            url.path.endswith(f"/{resource_type}")
            and len(query.get("_lastUpdated", ())) == 2
            and "_summary" not in query
        ):
            low, high = (value.removeprefix("ge").removeprefix("lt") for value in query["_lastUpdated"])
            intervals.append((low, high))
    return intervals


def materialize(
    deployment: Deployment,
    *keys: str,
    windows: list[str],
    refresh: Refresh = Refresh.WINDOW,
) -> dg.ExecuteInProcessResult:
    """Materialize assets such as ``normalized/patient`` of one partition or a range, as *Materialize selected* does.

    Without keys, only evaluate the check ``reconciles`` of Patient.
    """
    job = build_definitions(deployment.settings).resolve_implicit_global_asset_job_def()
    if keys:
        job = job.get_subset(asset_selection={dg.AssetKey(key.split("/")) for key in keys}, asset_check_selection=set())
    else:
        check = dg.AssetCheckKey(dg.AssetKey(["normalized", "patient"]), "reconciles")
        job = job.get_subset(asset_selection=set(), asset_check_selection={check})
    tags = {REFRESH_TAG: refresh.value}
    single = len(windows) == 1
    if not single:
        scheme = deployment.settings.window_scheme
        tags |= range_tags(WindowRange([scheme.window(key) for key in windows]))
    return job.execute_in_process(
        instance=deployment.instance,
        partition_key=windows[0] if single else None,
        tags=tags,
        raise_on_error=False,
    )
