"""The order of deliveries, retries, several connectors and shutdown."""

import signal
import time
from collections.abc import Callable
from datetime import timedelta

import pytest
import requests

from fhir_assets.delivery.connector import outbox, outcomes
from fhir_assets.sandbox.faults import Fault, FaultKind, RequestKind
from fhir_assets.sandbox.process import SandboxServer
from fhir_assets.warehouse.postgres.db import advisory_locks
from fhir_assets_tests.support.databases import database_unavailable
from fhir_assets_tests.support.hospital import Hospital

LONG = 600.0


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds. The timeout is long, so that only a hang fails."""
    deadline = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < deadline, "the condition did not hold in time"
        time.sleep(0.01)


def test_a_patient_that_waits_for_its_retry_does_not_delay_others(hospital: Hospital) -> None:
    waits = hospital.admit("1")
    hospital.execute("UPDATE health.fhir_outbox SET next_retry_at = now() + interval '1 hour', attempts = 1")
    hospital.execute("UPDATE health.patient SET name_family = 'Later'")
    hospital.admit("2")
    with hospital.running():
        wait_until(lambda: "2" in hospital.families())
    assert set(hospital.families()) == {"2"}
    assert hospital.execute("SELECT DISTINCT record_id FROM health.fhir_outbox WHERE processed_at IS NULL") == [
        (str(waits),)
    ]


def test_the_retry_time_is_stored(hospital: Hospital) -> None:
    hospital.server.set_faults(Fault(kind=FaultKind.ERROR))
    hospital.admit("1")
    with hospital.running(connector_first_wait_seconds=2.0, connector_max_wait_seconds=300):
        wait_until(
            lambda: bool(hospital.execute("SELECT 1 FROM health.fhir_outbox WHERE attempts = 1 AND claimed_by IS NULL"))
        )
        [(wait,)] = hospital.execute(
            "SELECT extract(epoch FROM next_retry_at - created_at)::float8 FROM health.fhir_outbox"
        )
        assert wait >= 1.0
    assert hospital.server.stats()["requests"] == {"search": 1}


def test_the_retry_after_header_is_honoured(hospital: Hospital) -> None:
    hospital.server.set_faults(Fault(kind=FaultKind.THROTTLE, retry_after=200))
    hospital.admit("1")
    with hospital.running():
        wait_until(
            lambda: bool(hospital.execute("SELECT 1 FROM health.fhir_outbox WHERE attempts = 1 AND claimed_by IS NULL"))
        )
    [(wait,)] = hospital.execute(
        "SELECT extract(epoch FROM next_retry_at - created_at)::float8 FROM health.fhir_outbox"
    )
    assert wait >= 200


def test_a_notification_triggers_delivery_before_the_next_poll(hospital: Hospital) -> None:
    with hospital.running(connector_poll_seconds=3600):
        hospital.admit("1")
        wait_until(lambda: "1" in hospital.families())


def test_a_change_without_notification_is_found_by_polling(hospital: Hospital) -> None:
    hospital.execute("ALTER TABLE health.patient DISABLE TRIGGER USER")
    hospital.admit("1")
    hospital.execute("ALTER TABLE health.patient ENABLE TRIGGER USER")
    with hospital.running():
        hospital.execute(
            "INSERT INTO health.fhir_outbox (source, record_id, table_name, operation)"
            " SELECT 'patient', id::text, 'patient', 'UPDATE' FROM health.patient"
        )
        wait_until(lambda: "1" in hospital.families())


def test_two_connectors_share_the_work_and_keep_the_order(hospital: Hospital) -> None:
    for n in range(40):
        hospital.admit(str(n), "0")
    hospital.server.set_faults(
        Fault(kind=FaultKind.SLOW, seconds=0.01, on=frozenset({RequestKind.CREATE, RequestKind.UPDATE}))
    )
    with hospital.running(), hospital.running():
        for change in range(1, 6):
            hospital.execute("UPDATE health.patient SET name_family = %s", str(change))
        wait_until(lambda: hospital.waiting() == 0)
    assert set(hospital.families().values()) == {"5"}
    for version in hospital.server.store.type_store("Patient").latest.values():
        bodies = [v.body.split(b'"family":"')[1][0:1] for v in version.history()]
        assert bodies == sorted(set(bodies), reverse=True)


def test_claims_of_a_disconnected_connector_are_released_at_once(hospital: Hospital) -> None:
    hospital.admit("1")
    with hospital.connect() as disconnected:
        disconnected.autocommit = True
        number = outbox.register_connector(disconnected)
        assert len(outbox.claim(disconnected, number, ["patient"], 10)) == 1
        with hospital.connect() as other:
            other.autocommit = True
            assert outbox.claim(other, outbox.register_connector(other), ["patient"], 10) == []
            assert outbox.release_orphans(other) == 0
    hospital.deliver()
    assert set(hospital.families()) == {"1"}


def test_a_crash_after_the_update_does_not_send_the_update_twice(hospital: Hospital) -> None:
    hospital.admit("1")
    hospital.execute("CREATE TABLE mark AS SELECT * FROM health.fhir_outbox")
    hospital.deliver()
    hospital.execute(
        "INSERT INTO health.fhir_sent (source, record_id, identifier_system, identifier_value, content_hash)"
        " SELECT source, record_id, identifier_system, identifier_value, sent_hash FROM health.fhir_delivered"
    )
    for table in ("fhir_outbox", "fhir_processed_event", "fhir_delivered"):
        hospital.execute(f"DELETE FROM health.{table}")
    # The state after a crash: the server has the update, which was recorded as sent, no outcome is recorded, and the
    # claim is of an ended connector.
    hospital.execute(
        "INSERT INTO health.fhir_outbox (source, record_id, table_name, operation, attempts, claimed_by)"
        " SELECT source, record_id, table_name, operation, 1, 999999 FROM mark"
    )
    hospital.deliver()
    assert hospital.server.stats()["requests"]["create"] == 1
    assert hospital.execute("SELECT outcome FROM health.fhir_processed_event") == [("found",)]


def test_a_delivery_does_not_wait_for_loads_replays_and_prunes(hospital: Hospital) -> None:
    with hospital.connect() as conn, conn.transaction():
        for lock in (advisory_locks.SCHEMA, advisory_locks.CONSENT_DECISIONS):
            conn.execute("SELECT pg_advisory_xact_lock(%s)", [lock])
        conn.execute("LOCK TABLE fhir.resource, ops.dead_letters, ops.loaded_parts IN ACCESS EXCLUSIVE MODE")
        hospital.admit("1")
        hospital.deliver()
        assert set(hospital.patients()) == {"1"}
    assert hospital.dead() == []


def test_sigterm_completes_claimed_changes_and_leaves_the_others(hospital: Hospital) -> None:
    for n in range(100):
        hospital.admit(str(n))
    hospital.server.set_faults(Fault(kind=FaultKind.SLOW, seconds=0.05, on=frozenset({RequestKind.CREATE})))
    connector = hospital.process(CONNECTOR_WORKERS="2")
    wait_until(lambda: len(hospital.server.store.type_store("Patient").latest) >= 3)
    connector.send_signal(signal.SIGTERM)
    assert connector.wait(LONG) == 0, hospital.log.read_text()[-2000:]
    sent = hospital.server.stats()["requests"]["create"]
    assert sent == 100 - hospital.waiting()
    assert hospital.execute("SELECT 1 FROM health.fhir_outbox WHERE claimed_by IS NOT NULL") == []
    assert hospital.execute("SELECT 1 FROM health.fhir_outbox WHERE processed_at IS NULL AND attempts > 0") == []
    hospital.deliver()
    assert hospital.server.stats()["requests"]["create"] == 100


def test_a_lost_database_connection_is_reopened(hospital: Hospital) -> None:
    with hospital.running():
        hospital.admit("1")
        wait_until(lambda: "1" in hospital.families())
        hospital.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        hospital.admit("2")
        wait_until(lambda: "2" in hospital.families())


@pytest.mark.slow
def test_a_connector_outlives_an_outage_of_postgres(hospital: Hospital, postgres: str) -> None:
    hospital.admit("1")
    with hospital.process() as connector:
        wait_until(lambda: "1" in hospital.families())
        with database_unavailable(postgres, hospital.url):
            wait_until(lambda: hospital.log.read_text().count("the connection to the database was lost") > 1)
        hospital.admit("2")
        wait_until(lambda: "2" in hospital.families())
        assert connector.poll() is None
        connector.terminate()
        assert connector.wait(60) == 0


def test_changes_wait_while_the_server_is_down(hospital: Hospital) -> None:
    with SandboxServer() as server:
        url = server.url
    for n in range(30):
        hospital.admit(str(n))
    with hospital.running(fhir_base_url=url, connector_max_attempts=1):
        wait_until(
            lambda: bool(hospital.execute("SELECT 1 FROM health.fhir_outbox WHERE attempts > 1 AND claimed_by IS NULL"))
        )
    assert hospital.dead() == []
    hospital.deliver()
    assert len(hospital.families()) == 30


def test_prune_deletes_old_processed_events_and_keeps_waiting_ones(hospital: Hospital) -> None:
    hospital.admit("1")
    hospital.deliver()
    hospital.admit("2")
    hospital.execute("UPDATE health.fhir_outbox SET processed_at = processed_at - interval '8 days'")
    with hospital.connect() as conn:
        assert outcomes.prune(conn, timedelta(days=7)) == 1
    assert hospital.waiting() == 1


@pytest.mark.parametrize("table", ["patient", "patient_other_identifiers"])
def test_truncate_is_refused(hospital: Hospital, table: str) -> None:
    with pytest.raises(Exception, match="would not reach the FHIR server"):
        hospital.execute(f"TRUNCATE health.{table} CASCADE")


def test_installing_again_keeps_waiting_changes(hospital: Hospital) -> None:
    hospital.admit("1")
    with hospital.connect() as conn:
        outbox.install(conn)
    assert hospital.waiting() == 1
    hospital.deliver()
    assert requests.get(f"{hospital.server.url}/Patient?_summary=count", timeout=10).json()["total"] == 1
