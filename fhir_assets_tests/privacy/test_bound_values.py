"""Encrypted values belong to a place: one that was moved to another row, column, table or file is refused."""

import pickle
from datetime import UTC, datetime
from pathlib import Path

import pytest

from fhir_assets.errors import EncryptionError
from fhir_assets.pipeline.rebuild.step import RebuildStep
from fhir_assets.pipeline.reencrypt.key_usage import count_key_usage
from fhir_assets.privacy.encryption import NO_ENCRYPTION, Cipher
from fhir_assets.privacy.keys import new_key, parse_keys
from fhir_assets.privacy.places import value_place
from fhir_assets.storage.landing_zone import EncryptedZone, open_zone
from fhir_assets.warehouse.ops import consents, corrections, dead_letters, idempotency, rejected_rows, replays
from fhir_assets.warehouse.ops.dead_letters import DeadLetter, Selection
from fhir_assets.warehouse.ops.withheld_changes import find_releasable
from fhir_assets.warehouse.postgres import resources
from fhir_assets.warehouse.postgres.db.connections import Connection, Session, cipher_of, connect
from fhir_assets.warehouse.postgres.queries import compartments, identifiers, patient_directory
from fhir_assets.warehouse.postgres.tables.loading import NO_CONSENT_GATE
from fhir_assets_tests.support.key_rotation import (
    CORRECTED,
    DAY,
    DEAD_LETTER,
    VIEWS,
    build_reencrypt_step,
    decrypt_value,
    fetch_rows,
    fill_deployment,
    load_people,
    open_session,
    open_store_in,
    read_decrypted,
    write_part,
)
from fhir_assets_tests.support.unbound import make_unbound, open_unbound_session

KEY, NEW = new_key(), new_key()
CIPHER = Cipher(parse_keys([KEY]))
OTHER_DEAD_LETTER = DeadLetter("Patient", "x", "validate", "structure", "Patient", "wrong", b'{"id": "x-Jones"}', DAY)


def exchange(conn: Connection, table: str, column: str, key: str) -> None:
    """Exchange the contents of a column between the first and the last row of a table, by the order of ``key``."""
    conn.execute(
        f"""
        UPDATE {table} SET {column} = other.{column}
        FROM (
            SELECT a.{key} AS own, b.{column}
            FROM {table} a, {table} b
            WHERE a.{key} <> b.{key}
                AND ARRAY[a.{key}, b.{key}] <@ ARRAY[
                    (SELECT {key} FROM {table} ORDER BY 1 LIMIT 1), (SELECT {key} FROM {table} ORDER BY 1 DESC LIMIT 1)
                ]
        ) other
        WHERE {table}.{key} = other.own
        """.encode()
    )


def expect_refusal(table: str, column: str) -> "pytest.RaisesExc[EncryptionError]":
    return pytest.raises(EncryptionError, match=rf"belongs to another row \(in {table}, column {column}\)")


def test_resources_of_two_patients_that_were_exchanged_are_refused_by_every_reader(database: str) -> None:
    with open_session(database, KEY) as conn:
        load_people(conn, range(4))
        exchange(conn, "fhir.resource", "resource", "id")
        with expect_refusal("fhir.resource", "resource") as refused:
            resources.read(conn, "Patient", "p00000")
        assert "p0000" not in str(refused.value)
        assert resources.read(conn, "Patient", "p00001")
        conn.execute("UPDATE fhir.resource SET mentions = NULL, identifiers = NULL, patients = ARRAY[id]")
        conn.commit()
        for read in (
            lambda: list(resources.stream_type(conn, "Patient")),
            lambda: list(resources.stream_patient(conn, "p00003")),
            lambda: patient_directory.read_compartments(conn, "Patient", ["p00003"], NO_CONSENT_GATE),
            lambda: compartments.lock_unassigned_resources(conn, compartments.TABLES[0], 10),
            lambda: identifiers.lock_unidentified(conn, "Patient", "", 10),
        ):
            with expect_refusal("fhir.resource", "resource"):
                read()
        conn.execute("UPDATE ops.view_tables SET outdated = true")
        conn.commit()
        rebuilt = RebuildStep(lambda: connect(database, cipher=cipher_of(conn)), VIEWS).run()
        assert rebuilt.refused == {"Patient": 2}
    rotated = build_reencrypt_step(database, open_store_in(Path("unused"), CIPHER), NEW, KEY).run()
    assert rotated.refused.total() == 2
    assert rotated.encrypted["resources"] == 2


def test_a_resource_of_another_source_is_refused(database: str) -> None:
    with open_session(database, KEY) as conn:
        load_people(conn, range(1))
        conn.execute("UPDATE fhir.resource SET source = 'other'")
        conn.commit()
        with connect(database, cipher=cipher_of(conn), source="other") as other:
            with expect_refusal("fhir.resource", "resource"):
                resources.read(other, "Patient", "p00000")


def test_withheld_resources_that_were_exchanged_are_not_released(database: str, tmp_path: Path) -> None:
    with open_session(database, KEY) as conn:
        fill_deployment(conn, open_store_in(tmp_path, CIPHER))
        conn.execute("UPDATE ops.withheld SET direct = false")
        assert find_releasable(conn, [("Patient", "w1")])
        exchange(conn, "ops.withheld", "resource", "id")
        with expect_refusal("fhir.resource", "resource"):
            find_releasable(conn, [("Patient", "w0")])


def test_a_consent_with_the_content_of_another_one_is_refused(database: str, tmp_path: Path) -> None:
    with open_session(database, KEY) as conn:
        fill_deployment(conn, open_store_in(tmp_path, CIPHER))
        conn.execute("UPDATE ops.consent_records SET consent_id = 'd'")
        with expect_refusal("fhir.resource", "resource"):
            consents.update_decisions(conn, ["p"], datetime.now(UTC))


def record_two_dead_letters(conn: Session) -> None:
    dead_letters.record(conn, "run", [DEAD_LETTER, OTHER_DEAD_LETTER])
    conn.commit()


def test_dead_letters_that_were_exchanged_are_refused_by_every_reader(database: str) -> None:
    with open_session(database, KEY) as conn:
        record_two_dead_letters(conn)
        exchange(conn, "ops.dead_letters", "resource", "id")
        replays.request_replay(conn, Selection())
        conn.execute("UPDATE ops.dead_letters SET claimed_by = 'run'")
        conn.commit()
        for read in (
            lambda: dead_letters.read_resource(conn, 1),
            lambda: list(dead_letters.stream(conn, Selection())),
            lambda: rejected_rows.lock(conn, [1], ["replaying"]),
            lambda: list(replays.stream_claimed(conn, "run", "Patient", ["validate"], [DAY])),
        ):
            with expect_refusal("ops.dead_letters", "resource"):
                read()
            conn.rollback()


def test_corrections_that_were_exchanged_are_refused_by_every_reader(database: str) -> None:
    with open_session(database, KEY) as conn:
        record_two_dead_letters(conn)
        for number in (1, 2):
            corrections.record(conn, number, CORRECTED, by="somebody")
        known = corrections.Corrections(
            lambda: connect(database, cipher=cipher_of(conn)), "Patient", ["validate"], [DAY]
        )
        conn.commit()
        assert known.find(DEAD_LETTER) == CORRECTED
        exchange(conn, "ops.corrections", "resource", "fingerprint")
        replays.request_replay(conn, Selection())
        conn.execute("UPDATE ops.dead_letters SET claimed_by = 'run'")
        conn.commit()
        for read in (
            lambda: corrections.get(conn, 1),
            lambda: corrections.read_by_fingerprint(conn, "Patient", ["validate"], [DAY]),
            lambda: known.find(DEAD_LETTER),
            lambda: list(replays.stream_claimed(conn, "run", "Patient", ["validate"], [DAY])),
        ):
            with expect_refusal("ops.corrections", "resource"):
                read()
            conn.rollback()


def test_the_original_of_a_correction_cannot_take_the_place_of_the_correction(database: str) -> None:
    with open_session(database, KEY) as conn:
        record_two_dead_letters(conn)
        corrections.record(conn, 1, CORRECTED, by="somebody")
        conn.execute("UPDATE ops.corrections SET resource = original")
        with expect_refusal("ops.corrections", "resource"):
            corrections.get(conn, 1)


def test_stored_answers_that_were_exchanged_are_refused(database: str) -> None:
    with open_session(database, KEY) as conn:
        first, second = (idempotency.Request.of(conn, "me", "/visits", key, b"body") for key in ("a", "b"))
        for request in (first, second):
            idempotency.record_response(conn, request, 200, b"the answer: Smith")
        exchange(conn, "ops.idempotency", "answer", "key")
        with expect_refusal("ops.idempotency", "answer"):
            idempotency.find_response(conn, first)


def test_values_of_columns_belong_to_their_row_column_and_table(database: str) -> None:
    with open_session(database, KEY) as conn:
        load_people(conn, range(2))
        [(mrn,), _] = fetch_rows(conn, "SELECT mrn FROM fhir.patient ORDER BY _resource_key")
        assert decrypt_value(conn, "patient", "mrn", "p00000", mrn) == "MRN-0"
        for place in (("patient", "mrn", "p00001"), ("patient", "family", "p00000"), ("patient_name", "mrn", "p00000")):
            with expect_refusal(f"fhir.{place[0]}", place[1]):
                decrypt_value(conn, *place, mrn)
        with expect_refusal("fhir.patient", "mrn"):
            cipher_of(conn).decrypt_token(str(mrn), value_place("patient", "mrn", "other", "p00000"))


def test_a_rotation_refuses_exchanged_values_of_a_table_without_a_view(database: str, tmp_path: Path) -> None:
    with open_session(database, KEY) as conn:
        load_people(conn, range(3))
        exchange(conn, "fhir.patient", "mrn", "_resource_key")
        conn.execute("DELETE FROM fhir.resource")
        conn.commit()
    rotated = build_reencrypt_step(database, open_store_in(tmp_path, CIPHER), NEW, KEY, views=[VIEWS[1]]).run()
    [(reason, count)] = [(reason, count) for reason, count in rotated.refused.items() if "fhir.patient," in reason]
    assert (count, "column mrn" in reason, "p0000" in reason) == (2, True, False)
    usage = rotated.usage.count_by_location(CIPHER.keys[0].id)
    assert {location: count for location, count in usage.items() if count} == {"rows": 2, "secret": 1}


def test_files_of_the_store_that_were_exchanged_are_refused(tmp_path: Path) -> None:
    store = open_store_in(tmp_path, CIPHER)
    names = [write_part(store, line, layer) for line, layer in ((b"a", "raw"), (b"b", "validated"))]
    contents = [(tmp_path / name).read_bytes() for name in names]
    for name, content in zip(names, reversed(contents), strict=True):
        (tmp_path / name).write_bytes(content)
    manifest = store.manifest("raw", "Patient", DAY)
    assert manifest
    with pytest.raises(EncryptionError, match=rf"{names[0]}: .*belongs to another file \(in store\)"):
        list(store.batches(manifest.parts))
    assert "belongs to another file" in store.count_lines(manifest.parts[0]).defect


def test_posted_files_that_were_exchanged_are_refused(tmp_path: Path) -> None:
    zone = EncryptedZone(open_zone(str(tmp_path), bucket=lambda url: pytest.fail(url)), CIPHER)
    for name in ("a", "b"):
        zone.put(name, name.encode())
    (tmp_path / "a").write_bytes((tmp_path / "b").read_bytes())
    with zone.open("b") as file:
        assert file.read() == b"b"
    with zone.open("a") as file, pytest.raises(EncryptionError, match="landing zone"):
        file.read()


def test_values_of_an_earlier_release_are_read_counted_and_bound_by_a_rotation_to_the_same_key(
    database: str, tmp_path: Path
) -> None:
    store = open_store_in(tmp_path, CIPHER)
    with open_unbound_session(database, CIPHER) as conn:
        fill_deployment(conn, open_store_in(tmp_path, make_unbound(CIPHER)))
        assert fetch_rows(conn, "SELECT DISTINCT left(mrn, 6) FROM fhir.patient") == [("gAAAAA",)]
        before = read_decrypted(conn, store)
    with open_session(database, KEY) as conn:
        assert read_decrypted(conn, store) == before
        unbound = count_key_usage(conn, store, VIEWS).count_unbound()
        assert unbound == {
            "resources": 30, "rows": 90, "withheld": 3, "consents": 1, "dead_letters": 1, "corrections": 1,
            "answers": 1, "parts": 1, "secret": 0, "landing_files": 0,
        }  # fmt: skip
    rotated = build_reencrypt_step(database, store, KEY).run()
    assert (rotated.left_over, rotated.refused, rotated.from_clear.total()) == (0, {}, 0)
    assert not any(rotated.usage.count_unbound().values())
    with open_session(database, KEY) as conn:
        assert read_decrypted(conn, store) == before
        exchange(conn, "fhir.resource", "resource", "id")
        with expect_refusal("fhir.resource", "resource"):
            resources.read(conn, "Patient", "p00000")


def test_a_correction_that_was_recorded_before_its_clear_dead_letter_is_encrypted_stays_readable(
    database: str, tmp_path: Path
) -> None:
    with open_session(database) as conn:
        dead_letters.record(conn, "run", [DEAD_LETTER])
        conn.commit()
    with open_session(database, KEY) as conn:
        corrections.record(conn, 1, CORRECTED, by="somebody")
        conn.commit()
    assert build_reencrypt_step(database, open_store_in(tmp_path, CIPHER), KEY).run().left_over == 0
    with open_session(database, KEY) as conn:
        known = corrections.read_by_fingerprint(conn, "Patient", ["validate"], [DAY])
        assert known == {DAY: {DEAD_LETTER.fingerprint(cipher_of(conn)): CORRECTED}}
        assert dead_letters.read_resource(conn, 1) == DEAD_LETTER.resource


def test_a_strict_cipher_refuses_what_is_not_bound(database: str, tmp_path: Path) -> None:
    with open_unbound_session(database, CIPHER) as conn:
        load_people(conn, range(1))
        part = write_part(open_store_in(tmp_path, make_unbound(CIPHER)), b"a")
        strict = Cipher(conn.cipher.keys, conn.cipher._secret, bound_only=True)
    with connect(database, cipher=pickle.loads(pickle.dumps(strict))) as conn:
        for _ in range(2):
            with pytest.raises(EncryptionError, match=r"in fhir\.resource, column resource is not bound .*keys rotate"):
                resources.read(conn, "Patient", "p00000")
            conn.execute("""UPDATE fhir.resource SET key_id = NULL, resource = '{"id": "p00000"}'""")
        [(mrn,)] = fetch_rows(conn, "SELECT mrn FROM fhir.patient")
        for value in (str(mrn), "MRN-0"):
            with pytest.raises(EncryptionError, match=r"in fhir\.patient, column mrn is not bound"):
                decrypt_value(conn, "patient", "mrn", "p00000", value)
        load_people(conn, range(1), version="2", updated="2024-01-02T00:00:00Z")
        assert resources.read(conn, "Patient", "p00000")
    manifest = open_store_in(tmp_path, strict).manifest("raw", "Patient", DAY)
    assert manifest
    with pytest.raises(EncryptionError, match=f"{part}: patient data in store is not bound"):
        list(open_store_in(tmp_path, strict).batches(manifest.parts))
    write_part(open_store_in(tmp_path, NO_ENCRYPTION), b"b", "validated")
    manifest = open_store_in(tmp_path, strict).manifest("validated", "Patient", DAY)
    assert manifest
    with pytest.raises(EncryptionError, match="patient data in store is not bound"):
        list(open_store_in(tmp_path, strict).batches(manifest.parts))
    assert list(open_store_in(tmp_path, strict.reading_only()).batches(manifest.parts)) == [[b"b"] * 5]
