"""A raw part that the store lost, cut or doubled makes its window red, although its manifest agrees with the tables."""

import gzip
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import BinaryIO

import pytest

from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.errors import StoreError
from fhir_assets.fhir.record import build_record, read_header
from fhir_assets.pipeline.receive.receiver import Receiver
from fhir_assets.pipeline.reconcile.verdicts import evaluate_windows
from fhir_assets.pipeline.reconcile.window_counts import WindowCounts
from fhir_assets.privacy.keys import new_key
from fhir_assets.sandbox.process import SandboxServer
from fhir_assets.storage.blobs import LocalBlobs
from fhir_assets.storage.manifest import Part
from fhir_assets.warehouse.ops import window_verdicts
from fhir_assets_tests.support.content import patient
from fhir_assets_tests.support.deployment import Deploy, Deployment

DAY = datetime(2024, 1, 5, tzinfo=UTC)
KEY = "2024-01-05"
ROWS = 8

Damage = Callable[[bytes], bytes | None]


def rewrite(lines: Callable[[list[bytes]], list[bytes]]) -> Damage:
    """Return a damage that leaves a whole gzip file with other lines."""
    return lambda content: gzip.compress(b"".join(lines(gzip.decompress(content).splitlines(keepends=True))))


DAMAGES: dict[str, tuple[Damage, int, str]] = {
    "removed": (lambda _: None, 0, "is missing"),
    "emptied": (lambda _: b"", 0, "has 0 lines, 8 were written"),
    "cut": (lambda content: content[: len(content) // 2], 0, "is damaged"),
    "doubled": (lambda content: content + content, 2 * ROWS, "has 16 lines, 8 were written"),
    "a line less": (rewrite(lambda lines: lines[1:]), ROWS - 1, "has 7 lines, 8 were written"),
    "half a line": (rewrite(lambda lines: [*lines[:-1], lines[-1][:40]]), ROWS - 1, "breaks off"),
    "a line twice": (rewrite(lambda lines: [lines[0], *lines]), ROWS + 1, "has 9 lines, 8 were written"),
    "flipped": (lambda content: content[:90] + bytes([content[90] ^ 0xFF]) + content[91:], 0, "is damaged"),
}


def load(deploy: Deploy, **settings: object) -> Deployment:
    bodies = [patient(f"p{n}", DAY + timedelta(hours=n), name=[{"family": f"N{n}"}]) for n in range(ROWS)]
    with SandboxServer(bodies) as server:
        deployment = deploy(
            fhir_base_url=server.url, fhir_resource_types="Patient", fhir_last_updated_gte="2024-01-01", **settings
        )
        (outcome,) = deployment.ingest(first=DAY, last=DAY)
        assert outcome.success
    return deployment


def evaluate(deployment: Deployment) -> WindowCounts:
    with Warehouse(deployment.settings).connect() as conn:
        (counts,) = evaluate_windows(conn, deployment.store, "Patient", [KEY], main_view=None)
        assert bool(window_verdicts.find_faults(conn, "Patient", [KEY])) == bool(counts.faults)
    return counts


def raw_part(deployment: Deployment) -> Part:
    manifest = deployment.store.manifest("raw", "Patient", KEY)
    assert manifest
    (part,) = manifest.parts
    return part


def read(deployment: Deployment, name: str) -> bytes:
    with deployment.store.blobs.open(name) as file:
        return file.read()


@pytest.mark.parametrize("store", ["local", "s3"])
def test_a_part_that_differs_from_what_was_written_makes_its_window_red_until_it_is_restored(
    deploy: Deploy, store: str, request: pytest.FixtureRequest
) -> None:
    settings = {"fhir_store_url": request.getfixturevalue("s3_url")} if store == "s3" else {}
    deployment = load(deploy, **settings)
    assert evaluate(deployment).faults == []
    name = raw_part(deployment).name
    content = read(deployment, name)
    for damage, rows, message in list(DAMAGES.values())[: 4 if store == "s3" else None]:
        damaged = damage(content)
        if damaged is None:
            deployment.store.blobs.delete(name)
        else:
            deployment.store.blobs.put(name, damaged)
        counts = evaluate(deployment)
        assert counts.raw == rows or message == "is damaged"
        assert any(
            f"{name} {message}: restore it from a backup, or materialize raw" in fault for fault in counts.faults
        )
    deployment.store.blobs.put(name, content)
    assert evaluate(deployment).faults == []
    assert evaluate(deployment).raw == ROWS


def test_an_encrypted_part_that_is_cut_doubled_or_altered_makes_its_window_red(deploy: Deploy) -> None:
    deployment = load(deploy, phi_encryption_keys=new_key())
    name = raw_part(deployment).name
    content = read(deployment, name)
    assert evaluate(deployment).faults == []
    for damaged in (content[:-5], content + content, content[:60] + bytes([content[60] ^ 0xFF]) + content[61:]):
        deployment.store.blobs.put(name, damaged)
        assert any(name in fault for fault in evaluate(deployment).faults)


def test_a_lost_raw_partition_makes_its_validated_window_red(deploy: Deploy) -> None:
    deployment = load(deploy)
    deployment.store.blobs.delete(f"raw/patient/{KEY}/manifest.json")
    counts = evaluate(deployment)
    assert (counts.raw, counts.valid) == (0, ROWS)
    assert any("raw/Patient of 2024-01-05 is not in the store" in fault for fault in counts.faults)


def test_a_received_part_that_is_lost_is_named_as_received(deploy: Deploy) -> None:
    deployment = load(deploy)
    body = patient("received", DAY)
    receiver = Receiver(
        deployment.store, Warehouse(deployment.settings).connect, deployment.settings.window_scheme, ["Patient"]
    )
    receiver.receive([build_record(body, read_header(body), DAY)], "landing:abc")
    ingestion = deployment.ingestion()
    for windows in ingestion.find_received():
        assert ingestion.load_received(windows, triggered_by="test").success
    assert evaluate(deployment).faults == []
    manifest = deployment.store.manifest("raw", "Patient", KEY)
    assert manifest
    (part,) = (part for part in manifest.parts if part.origin)
    deployment.store.blobs.delete(part.name)
    assert any(f"{part.name} is missing (received from landing:abc)" in fault for fault in evaluate(deployment).faults)


def test_a_store_that_cannot_be_read_is_an_error_and_no_count_of_zero(
    deploy: Deploy, monkeypatch: pytest.MonkeyPatch
) -> None:
    deployment = load(deploy)
    part = raw_part(deployment)

    def refuse(self: LocalBlobs, name: str) -> BinaryIO:
        raise StoreError(f"cannot read {name}: Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(LocalBlobs, "open", refuse)
        with pytest.raises(StoreError, match="Input/output error"):
            deployment.store.count_lines(part)
