"""Key rotation while loads run and after a kill: newer versions are kept, and a stopped rotation is continued."""

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
from fhir_assets.warehouse.postgres.db.connections import connect
from fhir_assets.warehouse.postgres.tables.loading import Loader
from fhir_assets_tests.support.key_rotation import (
    VIEWS,
    build_reencrypt_step,
    decrypt_value,
    fetch_rows,
    fill_deployment,
    load_people,
    open_session,
    open_store_in,
    person,
    read_decrypted,
    unlock_cipher,
)
from fhir_assets_tests.support.views import build_rows

OLD, NEW = new_key(), new_key()
OLD_ID, NEW_ID = (key.id for key in parse_keys([OLD, NEW]))
NEWER = {"version": "2", "updated": "2024-02-01T00:00:00Z"}


def wait_until(url: str, query: str) -> None:
    with connect(url, autocommit=True) as conn:
        while not fetch_rows(conn, query):
            time.sleep(0.02)


def read_families(url: str) -> list[tuple[str, str]]:
    with open_session(url, NEW) as conn:
        tokens = fetch_rows(conn, "SELECT _resource_key, family FROM fhir.patient_name")
        return sorted((str(key), decrypt_value(conn, "patient_name", "family", key, token)) for key, token in tokens)


def test_a_rotation_waits_for_locked_rows_and_keeps_the_versions_that_a_load_writes(
    database: str, tmp_path: Path
) -> None:
    store = open_store_in(tmp_path, Cipher(parse_keys([NEW, OLD])))
    with open_session(database, OLD) as conn:
        load_people(conn, range(20))
    with open_session(database, NEW, OLD) as conn:
        loader = Loader(conn, "Patient", VIEWS, run_id="newer")
        loader.add([build_rows(VIEWS, person(n, family="Newer", **NEWER)) for n in range(5)], "2024-02-01")
        loader.finish()
        rotation = build_reencrypt_step(database, store, NEW, OLD, busy_timeout=600)
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
    assert read_families(database) == newer + [(f"p{n:05}", f"Family{n}-{k}") for n in range(5, 20) for k in range(2)]
    with open_session(database, NEW) as conn:
        assert fetch_rows(conn, "SELECT count(*) FROM fhir.resource WHERE run_id = 'newer'") == [(5,)]


def test_rows_that_stay_locked_are_left_to_the_next_rotation(database: str, tmp_path: Path) -> None:
    store = open_store_in(tmp_path, Cipher(parse_keys([NEW, OLD])))
    with open_session(database, OLD) as conn:
        load_people(conn, range(5))
        conn.execute("SELECT FROM fhir.resource WHERE id = 'p00002' FOR UPDATE")
        rotated = build_reencrypt_step(database, store, NEW, OLD, busy_timeout=0.2).run()
        assert (rotated.encrypted["resources"], rotated.busy["Patient"]) == (4, 1)
        assert rotated.usage.is_used(OLD_ID)
    assert build_reencrypt_step(database, store, NEW, OLD).run().left_over == 0


def test_every_resource_has_its_newest_version_after_concurrent_loads_and_a_rotation(
    database: str, tmp_path: Path
) -> None:
    store = open_store_in(tmp_path, Cipher(parse_keys([NEW, OLD])))
    with open_session(database, OLD) as conn:
        load_people(conn, range(600))
    stop = threading.Event()
    versions = 1

    def keep_loading() -> None:
        nonlocal versions
        with open_session(database, NEW, OLD) as conn:
            while not stop.is_set():
                versions += 1
                load_people(
                    conn, range(0, 600, 3), version=str(versions), family=f"V{versions}", updated="2024-02-01T00:00:00Z"
                )

    loading = threading.Thread(target=keep_loading)
    loading.start()
    try:
        rotated = build_reencrypt_step(database, store, NEW, OLD, busy_timeout=600).run()
    finally:
        stop.set()
        loading.join()
    assert rotated.left_over == 0
    assert read_families(database) == [
        (f"p{n:05}", f"V{versions}" if n % 3 == 0 else f"Family{n}-{k}") for n in range(600) for k in range(2)
    ]
    with open_session(database, NEW) as conn:
        assert count_key_usage(conn, store, VIEWS).keys == [NEW_ID]
        assert audit_log.find_fault(conn) is None


def test_items_of_a_process_that_still_encrypts_with_the_older_key_are_counted_as_left_over(
    database: str, tmp_path: Path
) -> None:
    store = open_store_in(tmp_path, Cipher(parse_keys([NEW, OLD])))
    with open_session(database, OLD) as stale:
        load_people(stale, range(3))
        cipher = unlock_cipher(database, NEW, OLD)

        def write_again(_: key_rotations.Rotation) -> None:
            load_people(stale, range(3, 5))

        rotated = ReencryptStep(
            lambda: connect(database, cipher=cipher), store, VIEWS, actor="test", on_progress=write_again
        ).run()
        assert rotated.usage.count_by_location(OLD_ID)["resources"] == 2
        assert rotated.left_over > 0
    with open_session(database, NEW, OLD):
        assert build_reencrypt_step(database, store, NEW, OLD).run().left_over == 0


def test_a_rotation_continues_where_a_killed_one_stopped(database: str, tmp_path: Path) -> None:
    with open_session(database, OLD) as conn:
        fill_deployment(conn, open_store_in(tmp_path, Cipher(parse_keys([OLD]))), people=4000)
        before = read_decrypted(conn, open_store_in(tmp_path, Cipher(parse_keys([OLD]))))
    store = open_store_in(tmp_path, Cipher(parse_keys([NEW, OLD])))
    environment = {**os.environ, "KEYS": f"{NEW},{OLD}"}
    process = subprocess.Popen([sys.executable, "-m", __name__, database, str(tmp_path)], env=environment)
    wait_until(database, "SELECT FROM ops.key_rotations WHERE current_step = 'Patient'")
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    with open_session(database, NEW, OLD) as conn:
        stopped = key_rotations.get_latest(conn)
        halfway = count_key_usage(conn, store, VIEWS)
    assert stopped is not None
    assert (stopped.at_work, stopped.ended_at) == (False, None)
    assert 0 < halfway.count_by_location(NEW_ID)["resources"] < 4000
    assert halfway.count_by_location(NEW_ID)["rows"] == 3 * halfway.count_by_location(NEW_ID)["resources"]
    rotated = build_reencrypt_step(database, store, NEW, OLD).run()
    assert rotated.left_over == 0
    assert rotated.encrypted["resources"] == 4000 - halfway.count_by_location(NEW_ID)["resources"]
    with open_session(database, NEW) as conn:
        assert count_key_usage(conn, store, VIEWS).keys == [NEW_ID]
        assert read_decrypted(conn, open_store_in(tmp_path, Cipher(parse_keys([NEW])))) == before
        assert audit_log.find_fault(conn) is None


if __name__ == "__main__":
    both_keys = os.environ["KEYS"].split(",")
    build_reencrypt_step(sys.argv[1], open_store_in(Path(sys.argv[2]), Cipher(parse_keys(both_keys))), *both_keys).run()
