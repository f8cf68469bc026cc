"""Resources from ingestion channels other than the source, with a real store, Postgres and threads."""

import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fhir_assets.errors import Overtaken
from fhir_assets.fhir.record import Record, RejectedInput, build_record, read_header
from fhir_assets.pipeline.fetch.step import RawUpdate
from fhir_assets.pipeline.partition_commit import commit_update, merge_manifests
from fhir_assets.pipeline.receive.receiver import Receiver
from fhir_assets.privacy.encryption import NO_ENCRYPTION
from fhir_assets.storage.manifest import Fetch, Fetched, Manifest, Part, Validated
from fhir_assets.storage.store import Store, open_store
from fhir_assets.warehouse.ops import dead_letter_resolution, received
from fhir_assets.warehouse.ops.dead_letter_resolution import DeadLetterResolution
from fhir_assets.warehouse.postgres.db.connections import Connection, connect
from fhir_assets.windows import Granularity, WindowScheme

SCHEME = WindowScheme(Granularity.DAILY, datetime(2024, 1, 1, tzinfo=UTC), open_start=True)
NOW = datetime(2024, 1, 9, 12, tzinfo=UTC)
KEY = "2024-01-05"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path), NO_ENCRYPTION)


@pytest.fixture
def receiver(store: Store, database: str) -> Receiver:
    return Receiver(
        store, lambda: connect(database, cipher=NO_ENCRYPTION), SCHEME, ["Patient", "Encounter"], now=lambda: NOW
    )


def record(identity: str, updated: str | None = f"{KEY}T10:00:00Z", *, kind: str = "Patient") -> Record:
    meta = {"meta": {"lastUpdated": updated}} if updated else {}
    body = json.dumps({"resourceType": kind, "id": identity, **meta}).encode()
    return build_record(body, read_header(body), NOW)


def ids(store: Store, key: str = KEY) -> list[str | None]:
    manifest = store.manifest("raw", "Patient", key)
    assert manifest
    return [read_header(line).id for batch in store.batches(manifest.parts) for line in batch]


def fetched(store: Store, name: str, *, base: Manifest | None = None, until: datetime = NOW) -> Manifest:
    """Return the manifest of a fetch that added one part with one row."""
    part = Part(f"raw/patient/{KEY}/{name}", 1, 10, 10)
    earlier = base.fetched.fetches if base and base.fetched else ()
    fetch = Fetch(earlier[-1].end if earlier else None, until, until, 1, 1, 0, 0)
    parts = (*(base.parts if base else ()), part)
    receipts = base.receipts if base else ()
    return Manifest(
        "raw", "Patient", KEY, name, until, parts, Fetched(until, False, (*earlier, fetch)), receipts=receipts
    )


def test_resources_are_received_into_the_window_of_their_last_updated_or_of_their_arrival(
    store: Store, receiver: Receiver
) -> None:
    result = receiver.receive(
        [
            record("a"),
            record("old", "1999-01-01T00:00:00Z"),
            record("undated", None),
            record("future", "2024-02-01T00:00:00Z"),
            record("other", kind="Medication"),
        ],
        "landing:x",
    )
    assert (ids(store), ids(store, "2024-01-01"), ids(store, "2024-01-09")) == (["a"], ["old"], ["undated", "future"])
    assert result.rows == 4
    assert result.skipped == {"Medication": 1}


def test_an_origin_is_received_once_and_its_records_are_not_read_again(store: Store, receiver: Receiver) -> None:
    first = receiver.receive([record("a")], "landing:x")
    again = receiver.receive((pytest.fail("was read") for _ in "x"), "landing:x")
    assert (again.windows, again.already_received) == (first.windows, True)
    assert ids(store) == ["a"]
    receiver.receive([record("b")], "landing:y")
    assert ids(store) == ["a", "b"]


def test_an_origin_that_failed_is_not_received_and_can_be_received_again(
    store: Store, receiver: Receiver, conn: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> Iterator[Record]:
        yield record("a")
        raise OSError("the connection broke")

    with pytest.raises(OSError, match="broke"):
        receiver.receive(broken(), "landing:x")
    assert store.manifest("raw", "Patient", KEY) is None
    # Also if the process was killed after raw was committed and before the origin was recorded.
    with monkeypatch.context() as patched:
        patched.setattr(received, "record", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            receiver.receive([record("a"), record("b")], "landing:x")
    assert ids(store) == ["a", "b"]
    assert received.find_pending(conn) == []
    receiver.receive([record("a"), record("b")], "landing:x")
    assert ids(store) == ["a", "b"]
    assert [window.partition_key for window in received.find_pending(conn)] == [KEY]


def test_rejected_lines_become_dead_letters_that_a_fetch_of_the_window_does_not_resolve(
    receiver: Receiver, conn: Connection
) -> None:
    bad = RejectedInput("Patient", None, "json", "file:3", "not JSON", NOW - timedelta(days=4), b"{")
    result = receiver.receive([bad], "landing:x")
    assert result.rejected == 1
    assert received.find_pending(conn) == []
    dead_letter_resolution.resolve_dead_letters(
        conn, DeadLetterResolution("run", "Patient", "fetch", [KEY], recorded_before=1000)
    )
    rows = conn.execute("SELECT stage, status, origin, partition_key FROM ops.dead_letters").fetchall()
    assert rows == [("fetch", "open", "landing:x", KEY)]


def test_origins_received_concurrently_into_one_window_are_all_kept(store: Store, receiver: Receiver) -> None:
    def receive(number: int) -> None:
        receiver.receive([record(f"p{number}")], f"api:{number}")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(receive, range(40)))
    assert sorted(map(str, ids(store))) == sorted(f"p{n}" for n in range(40))


def test_an_origin_received_concurrently_is_stored_once(store: Store, receiver: Receiver) -> None:
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: receiver.receive([record("a")], "api:1"), range(8)))
    assert ids(store) == ["a"]
    assert sorted(result.already_received for result in results) == [False] + [True] * 7


def test_a_window_that_is_fetched_again_keeps_its_received_parts(
    store: Store, receiver: Receiver, database: str
) -> None:
    def commit_fetch(manifest: Manifest, base: Manifest | None) -> None:
        commit_update(
            lambda: connect(database, cipher=NO_ENCRYPTION),
            store,
            RawUpdate("Patient", (manifest,), {}, base_manifests={KEY: base}),
        )

    receiver.receive([record("a")], "landing:x")
    commit_fetch(fetched(store, "one"), None)
    receiver.receive([record("b")], "landing:y")
    commit_fetch(fetched(store, "two"), None)
    manifest = store.manifest("raw", "Patient", KEY)
    assert manifest
    assert [part.origin for part in manifest.parts] == [None, "landing:x", "landing:y"]
    assert [receipt.origin for receipt in manifest.receipts] == ["landing:x", "landing:y"]
    assert manifest.fetched
    assert len(manifest.fetched.fetches) == 1


def names(parts: Iterable[Part]) -> list[str]:
    return [part.name.rsplit("/")[-1] for part in parts]


def test_concurrent_extensions_of_a_window_are_merged(store: Store) -> None:
    base = fetched(store, "base", until=NOW - timedelta(hours=2))
    current = fetched(store, "theirs", base=base)
    new = fetched(store, "mine", base=base, until=NOW - timedelta(hours=1))
    result = merge_manifests(new, base, current)
    assert names(result.parts) == ["base", "theirs", "mine"]
    assert result.fetched
    assert result.fetched.until == NOW
    assert sum(fetch.matched for fetch in result.fetched.fetches) == result.rows


def validated(name: str, *inputs: str, base: Manifest | None = None, rules: str = "r4") -> Manifest:
    before = base.validated if base else None
    return Manifest(
        "validated",
        "Patient",
        KEY,
        name,
        NOW,
        (*(base.parts if base else ()), Part(name, 1, 1, 1)),
        validated=Validated(
            (*(before.inputs if before else ()), *inputs),
            rules,
            (before.rows_in if before else 0) + 2,
            {"json": (before.dead["json"] if before else 0) + 1},
            {},
        ),
    )


def test_concurrent_validations_of_different_parts_are_merged() -> None:
    base = validated("base", "r0")
    result = merge_manifests(validated("mine", "r2", base=base), base, validated("theirs", "r1", base=base))
    assert names(result.parts) == ["base", "theirs", "mine"]
    assert result.validated
    assert result.validated.inputs == ("r0", "r1", "r2")
    assert (result.validated.rows_in, result.validated.dead) == (6, {"json": 3})


def test_one_of_two_validations_of_the_same_parts_is_kept() -> None:
    base = validated("base", "r0")
    new, current = validated("mine", "r1", base=base), validated("theirs", "r1", base=base)
    assert merge_manifests(new, base, current) is current
    more = validated("more", "r1", "r2", base=base)
    assert merge_manifests(more, base, current) is more
    assert merge_manifests(new, base, more) is more
    assert merge_manifests(new, None, None) is new


def test_a_complete_validation_is_not_overtaken_by_an_extension_whose_parts_it_contains() -> None:
    base = validated("base", "fetched-before", "posted-1")
    extension = validated("post loader", "posted-2", base=base)
    complete = validated("refresh", "fetched-again", "posted-1", "posted-2")
    assert merge_manifests(complete, base, extension) is complete
    assert merge_manifests(extension, base, complete) is complete
    with pytest.raises(Overtaken):
        merge_manifests(validated("refresh", "fetched-again", "posted-1"), base, extension)


def test_validations_that_cannot_be_merged_are_refused() -> None:
    base = validated("base", "r0")
    new = validated("mine", "r1", "r2", base=base)
    for current in (validated("theirs", "r2", "r3", base=base), validated("again", "r9")):
        with pytest.raises(Overtaken, match="another run validated Patient of 2024-01-05"):
            merge_manifests(new, base, current)


def test_a_requested_window_is_requested_again_after_a_wait_that_doubles(receiver: Receiver, conn: Connection) -> None:
    receiver.receive([record("a")], "landing:x")
    for wait in (60, 120, 240):
        (waiting,) = received.find_pending(conn, now=NOW)
        received.record_request(conn, [waiting], now=NOW)
        assert received.find_pending(conn, now=NOW + timedelta(seconds=wait)) == []
        assert received.find_pending(conn, now=NOW + timedelta(seconds=wait + 1)) != []
        conn.execute("UPDATE ops.received SET asked_at = asked_at - interval '1 day'")


def test_an_origin_is_loaded_when_all_of_its_parts_are_loaded(receiver: Receiver, conn: Connection) -> None:
    first = receiver.receive([record("a")], "landing:x")
    receiver.receive([record("b")], "landing:y")
    received.record_loaded(conn, "run", "Patient", {KEY: first.windows[0].parts})
    assert conn.execute("SELECT origin, loaded_run_id FROM ops.received ORDER BY 1").fetchall() == [
        ("landing:x", "run"),
        ("landing:y", None),
    ]
