"""Keys rotated while loads go on, and after a kill: nothing newer is overwritten, and what is left is finished."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from fhir_assets.pipeline.reencrypt.key_usage import count_key_usage
from fhir_assets.pipeline.reencrypt.step import ReencryptResult, ReencryptStep
from fhir_assets.privacy.encryption import Cipher
from fhir_assets.privacy.keys import new_key, parse_keys
from fhir_assets.warehouse.ops import audit_log, key_rotations
from fhir_assets.warehouse.postgres.db.connections import cipher_of, connect
from fhir_assets.warehouse.postgres.tables.loading import Loader
from fhir_assets_tests.support.key_rotation import (
    VIEWS,
    everything,
    fill,
    keyring,
    load_people,
    opened,
    person,
    rotator,
    rows,
    store_at,
)
from fhir_assets_tests.support.views import build_rows

OLD, NEW = new_key(), new_key()
OLD_ID, NEW_ID = (key.id for key in parse_keys([OLD, NEW]))
NEWER = {"version": "2", "updated": "2024-02-01T00:00:00Z"}


def wait_until(url: str, query: str) -> None:
    with connect(url, autocommit=True) as conn:
        while not rows(conn, query):
            time.sleep(0.02)


def families(url: str) -> list[tuple[str, str]]:
    with opened(url, NEW) as conn:
        tokens = rows(conn, "SELECT _resource_key, family FROM fhir.patient_name")
        return sorted((str(key), cipher_of(conn).decrypt_token(str(token))) for key, token in tokens)


def test_what_a_load_writes_meanwhile_stays_and_its_rows_are_waited_for(database: str, tmp_path: Path) -> None:
    store = store_at(tmp_path, Cipher(parse_keys([NEW, OLD])))
    with opened(database, OLD) as conn:
        load_people(conn, range(20))
    with opened(database, NEW, OLD) as conn:
        loader = Loader(conn, "Patient", VIEWS, run_id="newer")
        loader.add([build_rows(VIEWS, person(n, family="Newer", **NEWER)) for n in range(5)], "2024-02-01")
        loader.finish()
        rotation = rotator(database, store, NEW, OLD, busy_timeout=600)
        results: list[ReencryptResult] = []
        rotating = threading.Thread(target=lambda: results.append(rotation.run()))
        rotating.start()
        wait_until(database, "SELECT FROM ops.key_rotations WHERE done >= 15")
        assert rotating.is_alive()
        conn.commit()
        rotating.join()
    assert [result.left_over for result in results] == [0]
    assert results[0].encrypted["resources"] == 15
    newer = [(f"p{n:05}", "Newer") for n in range(5) for _ in range(2)]
    assert families(database) == newer + [(f"p{n:05}", f"Family{n}-{k}") for n in range(5, 20) for k in range(2)]
    with opened(database, NEW) as conn:
        assert rows(conn, "SELECT count(*) FROM fhir.resource WHERE run_id = 'newer'") == [(5,)]


def test_rows_that_a_load_holds_for_good_are_left_to_the_next_rotation(database: str, tmp_path: Path) -> None:
    store = store_at(tmp_path, Cipher(parse_keys([NEW, OLD])))
    with opened(database, OLD) as conn:
        load_people(conn, range(5))
        conn.execute("SELECT FROM fhir.resource WHERE id = 'p00002' FOR UPDATE")
        rotated = rotator(database, store, NEW, OLD, busy_timeout=0.2).run()
        assert (rotated.encrypted["resources"], rotated.busy["Patient"]) == (4, 1)
        assert rotated.usage.is_used(OLD_ID)
    assert rotator(database, store, NEW, OLD).run().left_over == 0


def test_loads_and_a_rotation_at_once_end_in_the_newest_version_of_everything(database: str, tmp_path: Path) -> None:
    store = store_at(tmp_path, Cipher(parse_keys([NEW, OLD])))
    with opened(database, OLD) as conn:
        load_people(conn, range(600))
    ended = threading.Event()
    versions = 1

    def keep_loading() -> None:
        nonlocal versions
        with opened(database, NEW, OLD) as conn:
            while not ended.is_set():
                versions += 1
                load_people(
                    conn, range(0, 600, 3), version=str(versions), family=f"V{versions}", updated="2024-02-01T00:00:00Z"
                )

    loading = threading.Thread(target=keep_loading)
    loading.start()
    try:
        rotated = rotator(database, store, NEW, OLD, busy_timeout=600).run()
    finally:
        ended.set()
        loading.join()
    assert rotated.left_over == 0
    assert families(database) == [
        (f"p{n:05}", f"V{versions}" if n % 3 == 0 else f"Family{n}-{k}") for n in range(600) for k in range(2)
    ]
    with opened(database, NEW) as conn:
        assert count_key_usage(conn, store, VIEWS).keys == [NEW_ID]
        assert audit_log.find_fault(conn) is None


def test_a_process_that_still_seals_with_the_older_key_is_noticed(database: str, tmp_path: Path) -> None:
    store = store_at(tmp_path, Cipher(parse_keys([NEW, OLD])))
    with opened(database, OLD) as stale:
        load_people(stale, range(3))
        cipher = keyring(database, NEW, OLD)

        def write_again(_: key_rotations.Rotation) -> None:
            load_people(stale, range(3, 5))

        rotated = ReencryptStep(
            lambda: connect(database, cipher=cipher), store, VIEWS, actor="test", on_progress=write_again
        ).run()
        assert rotated.usage.count_by_location(OLD_ID)["resources"] == 2
        assert rotated.left_over > 0
    with opened(database, NEW, OLD):
        assert rotator(database, store, NEW, OLD).run().left_over == 0


def test_a_killed_rotation_goes_on_where_it_was(database: str, tmp_path: Path) -> None:
    with opened(database, OLD) as conn:
        fill(conn, store_at(tmp_path, Cipher(parse_keys([OLD]))), people=4000)
        before = everything(conn, store_at(tmp_path, Cipher(parse_keys([OLD]))))
    store = store_at(tmp_path, Cipher(parse_keys([NEW, OLD])))
    environment = {**os.environ, "KEYS": f"{NEW},{OLD}"}
    process = subprocess.Popen([sys.executable, "-m", __name__, database, str(tmp_path)], env=environment)
    wait_until(database, "SELECT FROM ops.key_rotations WHERE current_step = 'Patient'")
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    with opened(database, NEW, OLD) as conn:
        stopped = key_rotations.get_latest(conn)
        halfway = count_key_usage(conn, store, VIEWS)
    assert stopped is not None
    assert (stopped.at_work, stopped.ended_at) == (False, None)
    assert 0 < halfway.count_by_location(NEW_ID)["resources"] < 4000
    assert halfway.count_by_location(NEW_ID)["rows"] == 3 * halfway.count_by_location(NEW_ID)["resources"]
    rotated = rotator(database, store, NEW, OLD).run()
    assert rotated.left_over == 0
    assert rotated.encrypted["resources"] == 4000 - halfway.count_by_location(NEW_ID)["resources"]
    with opened(database, NEW) as conn:
        assert count_key_usage(conn, store, VIEWS).keys == [NEW_ID]
        assert everything(conn, store_at(tmp_path, Cipher(parse_keys([NEW])))) == before
        assert audit_log.find_fault(conn) is None


if __name__ == "__main__":
    both = os.environ["KEYS"].split(",")
    rotator(sys.argv[1], store_at(Path(sys.argv[2]), Cipher(parse_keys(both))), *both).run()
