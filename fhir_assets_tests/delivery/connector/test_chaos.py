"""Random changes by several writers, a failing server, and a connector that is killed again and again."""

import random
import signal
import threading
import time
from collections import defaultdict

import psycopg
import pytest
import requests

from fhir_assets.sandbox.faults import Fault, FaultKind
from fhir_assets_tests.support.hospital import MRN, Hospital

INSURER = "https://insurer.example.org"


class Writer(threading.Thread):
    """Makes random changes, each in a transaction of its own that increments a number in its row."""

    def __init__(self, hospital: Hospital, seed: int, changes: int, people: int) -> None:
        super().__init__()
        self._url = hospital.url
        self._random = random.Random(seed)
        self._changes = changes
        self._people = people
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            with psycopg.connect(self._url, autocommit=True) as conn:
                done = 0
                while done < self._changes:
                    try:
                        with conn.transaction():
                            done += self._change(conn)
                    except (psycopg.errors.UniqueViolation, psycopg.errors.DeadlockDetected):
                        continue
        except BaseException as error:
            self.error = error

    def _change(self, conn: "psycopg.Connection[tuple[object, ...]]") -> int:
        mrn, other = (f"{self._random.randrange(self._people)}" for _ in range(2))
        kind = self._random.choices(("update", "identifiers", "move", "delete", "admit"), (50, 20, 10, 8, 12))[0]
        if kind == "admit":
            return conn.execute(
                "INSERT INTO health.patient (identifier_system, identifier_value, name_given) VALUES (%s, %s, '1')"
                " ON CONFLICT DO NOTHING", [MRN, mrn],
            ).rowcount  # fmt: skip
        row = conn.execute(
            "UPDATE health.patient SET name_given = (name_given::int + 1)::text WHERE identifier_value = %s"
            " RETURNING id", [mrn],
        ).fetchone()  # fmt: skip
        if row is None:
            return 0
        if kind == "delete":
            conn.execute("DELETE FROM health.patient WHERE id = %s", row)
        elif kind == "move":
            conn.execute("UPDATE health.patient SET identifier_value = %s WHERE id = %s", [other, *row])
        elif kind == "identifiers":
            if self._random.random() < 0.6:
                conn.execute(
                    "INSERT INTO health.patient_other_identifiers (patient_id, identifier_system, identifier_value)"
                    " VALUES (%s, %s, %s)", [*row, INSURER, str(self._random.random())],
                )  # fmt: skip
            else:
                conn.execute(
                    "DELETE FROM health.patient_other_identifiers WHERE id = (SELECT min(id) FROM"
                    " health.patient_other_identifiers WHERE patient_id = %s)", row,
                )  # fmt: skip
        return 1


def assert_changes_are_delivered(hospital: Hospital, *, changes: int, writers: int, people: int, kills: int) -> None:
    # The row's own key travels as the family name, the number of its last change as the given name.
    hospital.execute(
        "CREATE FUNCTION name_it() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN NEW.name_family := NEW.id; RETURN NEW; END $$"
    )
    hospital.execute("CREATE TRIGGER name_it BEFORE INSERT ON health.patient FOR EACH ROW EXECUTE FUNCTION name_it()")
    hospital.server.set_faults(
        Fault(kind=FaultKind.ERROR, probability=0.05),
        Fault(kind=FaultKind.DROP, probability=0.03),
        Fault(kind=FaultKind.RESET, probability=0.02),
        seed=1,
    )
    writers_running = [Writer(hospital, n, changes // writers, people) for n in range(writers)]
    connector = hospital.process(CONNECTOR_MAX_WAIT_SECONDS="0.5")
    for writer in writers_running:
        writer.start()
    processed = "SELECT count(*) FROM health.fhir_processed_event"
    for _ in range(kills):
        before = hospital.execute(processed)
        # The kill comes at a point of the work, however long that takes: after the first change since the last kill.
        while hospital.execute(processed) == before and (
            hospital.waiting() or any(w.is_alive() for w in writers_running)
        ):
            assert connector.poll() is None, "the connector ended by itself"
            time.sleep(0.01)
        connector.send_signal(signal.SIGKILL)
        connector.wait()
        connector = hospital.process(CONNECTOR_MAX_WAIT_SECONDS="0.5")
    for writer in writers_running:
        writer.join()
        assert writer.error is None
    while hospital.waiting():
        assert connector.poll() is None, "the connector ended by itself"
        time.sleep(0.1)
    connector.send_signal(signal.SIGTERM)
    assert connector.wait() == 0, hospital.log.read_text()[-2000:]
    assert hospital.dead() == []
    hospital.server.set_faults()
    check_equal(hospital)
    check_order(hospital)


def check_equal(hospital: Hospital) -> None:
    """Assert that the server's patients equal the rows of the tables."""
    rows = hospital.execute(
        "SELECT p.identifier_value, p.name_family, p.name_given,"
        " coalesce(array_agg(o.identifier_value ORDER BY o.id) FILTER (WHERE o.id IS NOT NULL), '{}')"
        " FROM health.patient p LEFT JOIN health.patient_other_identifiers o ON o.patient_id = p.id"
        " GROUP BY p.id"
    )
    expected = {mrn: (family, [given], others) for mrn, family, given, others in rows}
    delivered = {
        mrn: (
            p["name"][0]["family"],
            p["name"][0]["given"],
            [i["value"] for i in p["identifier"] if i["system"] == INSURER],
        )
        for mrn, p in hospital.patients().items()
    }
    assert delivered == expected


def check_order(hospital: Hospital) -> None:
    """Assert that each resource's history has the changes of each row in order and without duplicates."""
    session = requests.Session()
    seen = 0
    for resource_id in hospital.server.store.type_store("Patient").latest:
        history = session.get(f"{hospital.server.url}/Patient/{resource_id}/_history?_count=10000", timeout=30).json()
        numbers: dict[str, list[int]] = defaultdict(list)
        for entry in reversed(history["entry"]):
            if resource := entry.get("resource"):
                numbers[resource["name"][0]["family"]].append(int(resource["name"][0]["given"][0]))
        for changes in numbers.values():
            seen += len(changes)
            assert changes == sorted(set(changes))
    assert seen > 0


@pytest.mark.slow
def test_random_changes_are_delivered_although_the_connector_is_killed(hospital: Hospital) -> None:
    assert_changes_are_delivered(hospital, changes=600, writers=4, people=40, kills=2)


@pytest.mark.slow
def test_ten_thousand_changes_are_delivered_although_the_connector_is_killed_twenty_times(hospital: Hospital) -> None:
    assert_changes_are_delivered(hospital, changes=10_000, writers=8, people=300, kills=20)
