"""Versions without a lastUpdated that counts, by every channel: the last to arrive wins, and all windows reconcile."""

import json
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fhir_assets.deployment.store import build_store
from fhir_assets.fhir.record import build_record, read_header
from fhir_assets.pipeline.receive.receiver import Receiver
from fhir_assets.pipeline.refresh import Refresh
from fhir_assets.privacy.encryption import NO_ENCRYPTION
from fhir_assets.warehouse.postgres.db.connections import connect
from fhir_assets_tests.support.deployment import Deploy, Deployment
from fhir_assets_tests.support.landing import LandingZone, land, load_received
from fhir_assets_tests.support.search_server import SearchServer, resource

pytestmark = pytest.mark.slow

NOW = datetime.now(UTC).replace(microsecond=0)
YESTERDAY = NOW - timedelta(days=1)
FUTURE = "9999-12-31T23:59:59Z"


def version(gender: str, updated: str | datetime | None, number: str | None = "1") -> bytes:
    meta = {
        "versionId": number,
        "lastUpdated": updated.isoformat() if isinstance(updated, datetime) else updated,
    }
    return json.dumps(
        {
            "resourceType": "Patient",
            "id": "a",
            **({"meta": given} if (given := {name: value for name, value in meta.items() if value}) else {}),
            "gender": gender,
        }
    ).encode()


def gender(deployment: Deployment) -> str | None:
    ((found,),) = deployment.query("SELECT gender FROM fhir.patient")
    return None if found is None else str(found)


def start(days: int) -> str:
    return (NOW - timedelta(days=days)).date().isoformat()


LATER_WINS = [
    pytest.param(version("female", FUTURE), version("male", NOW - timedelta(days=2)), id="after one of 9999"),
    pytest.param(version("female", YESTERDAY), version("male", None, None), id="without meta"),
    pytest.param(version("female", YESTERDAY), version("male", FUTURE, "2"), id="of 9999"),
    pytest.param(version("female", None), version("male", YESTERDAY), id="after an undated one"),
]


@pytest.mark.parametrize(("first", "second"), LATER_WINS)
def test_of_two_landed_files_the_one_that_was_written_last_has_the_newer_version(
    deploy: Deploy, tmp_path: Path, first: bytes, second: bytes
) -> None:
    zone = LandingZone(str(tmp_path / "landing"))
    deployment = deploy(fhir_landing_url=zone.url, fhir_resource_types=("Patient",), fhir_last_updated_gte=start(5))
    for name, content, age in (("b", first, 60), ("a", second, 30)):
        zone.put(f"{name}.ndjson", content)
        os.utime(tmp_path / "landing" / f"{name}.ndjson", (NOW.timestamp() - age, NOW.timestamp() - age))
    assert land(deployment) == []
    assert gender(deployment) == "male"


@pytest.mark.parametrize(("first", "second"), LATER_WINS)
def test_of_two_files_of_the_source_the_one_that_was_written_last_has_the_newer_version(
    deploy: Deploy, tmp_path: Path, first: bytes, second: bytes
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    deployment = deploy(
        fhir_source="ndjson",
        fhir_base_url=str(source),
        fhir_resource_types=("Patient",),
        fhir_last_updated_gte=start(5),
    )
    for name, content, age in (("1", first, 60), ("2", second, 30)):
        path = source / f"Patient.{name}.ndjson"
        path.write_bytes(content)
        os.utime(path, (NOW.timestamp() - age, NOW.timestamp() - age))
    for refresh in (Refresh.MISSING, Refresh.FULL):
        for outcome in deployment.ingest(refresh=refresh):
            assert outcome.success
            assert deployment.unreconciled(outcome) == []
        assert gender(deployment) == "male"


@pytest.mark.parametrize("dates_undated", [False, True])
def test_what_a_server_dates_in_the_future_is_loaded_and_a_later_version_without_a_date_wins(
    deploy: Deploy, dates_undated: bool
) -> None:
    future = [resource("Patient", "b", FUTURE), resource("Patient", "c", (NOW + timedelta(days=40)).isoformat())]
    changing = resource("Patient", "a", YESTERDAY.isoformat(), gender="female")
    with SearchServer([changing, *future], dates_undated=dates_undated) as server:
        deployment = deploy(
            fhir_base_url=server.url, fhir_resource_types="Patient", fhir_last_updated_gte=start(5), fhir_max_attempts=1
        )
        for refresh in (Refresh.MISSING, Refresh.FULL):
            for outcome in deployment.ingest(refresh=refresh):
                assert outcome.success
                assert deployment.unreconciled(outcome) == []
            server.resources[0] = resource("Patient", "a", None, gender="male")
    assert deployment.query("SELECT id, gender FROM fhir.patient ORDER BY id") == [
        ("a", "male"),
        ("b", None),
        ("c", None),
    ]


def test_posted_versions_are_ordered_by_their_arrival_whatever_their_last_updated(deploy: Deploy) -> None:
    deployment = deploy(fhir_resource_types=("Patient",), fhir_last_updated_gte=start(5))
    store = build_store(deployment.settings)
    for number, body in enumerate((version("female", FUTURE), version("other", NOW), version("male", YESTERDAY))):
        now = NOW - timedelta(minutes=10 - number)
        receiver = Receiver(
            store,
            lambda: connect(deployment.url, cipher=NO_ENCRYPTION),
            deployment.settings.window_scheme,
            ["Patient"],
            now=lambda now=now: now,  # type: ignore[misc]
        )
        receiver.receive([build_record(body, read_header(body), now, posted=True)], f"api:{number}")
    assert load_received(deployment) == []
    assert gender(deployment) == "male"
