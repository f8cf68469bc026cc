"""Keys rotated: everything that is sealed is sealed anew, nothing is lost, and the older key goes only when it may."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from fhir_assets.errors import ConfigurationError, TransientError, ViewError
from fhir_assets.pipeline.reencrypt.key_usage import count_key_usage
from fhir_assets.pipeline.reencrypt.step import ReencryptStep
from fhir_assets.privacy.encryption import NO_ENCRYPTION, Cipher
from fhir_assets.privacy.keys import new_key, parse_keys
from fhir_assets.storage.part_writer import PartWriter
from fhir_assets.storage.store import Store
from fhir_assets.warehouse.ops import audit_log, corrections, dead_letters, key_rotations
from fhir_assets.warehouse.postgres.db.connections import cipher_of, connect
from fhir_assets.warehouse.postgres.tables import reencryption_batches, view_tables
from fhir_assets_tests.support.key_rotation import (
    CORRECTED,
    DAY,
    LETTER,
    NAME,
    VIEWS,
    encrypted,
    everything,
    fill,
    keyring,
    load_people,
    lose,
    opened,
    rotator,
    rows,
    store_at,
    write_part,
)
from fhir_assets_tests.support.views import column, view

OLD, NEW, OTHER = new_key(), new_key(), new_key()
OLD_ID, NEW_ID = (key.id for key in parse_keys([OLD, NEW]))


@dataclass
class Place:
    url: str
    folder: Path

    def store(self, *keys: str) -> Store:
        return store_at(self.folder, Cipher(parse_keys(keys)) if keys else NO_ENCRYPTION)


@pytest.fixture
def place(database: str, tmp_path: Path) -> Place:
    return Place(database, tmp_path / "store")


def test_everything_is_sealed_with_the_newest_key_and_opens_without_the_older_one(place: Place) -> None:
    with opened(place.url, OLD) as conn:
        fill(conn, place.store(OLD))
        before = everything(conn, place.store(OLD))
    rotated = rotator(place.url, place.store(NEW, OLD), NEW, OLD).run()
    assert rotated.left_over == 0
    assert not rotated.refused
    assert rotated.encrypted == {
        "resources": 30, "withheld": 3, "consents": 1, "dead_letters": 1, "corrections": 1, "answers": 1, "parts": 1
    }  # fmt: skip
    assert not +rotated.from_clear
    with opened(place.url, NEW) as conn:
        assert everything(conn, place.store(NEW)) == before
        found = count_key_usage(conn, place.store(NEW), VIEWS)
        assert found.keys == [NEW_ID]
        assert rows(conn, "SELECT DISTINCT key_id FROM ops.corrections") == [(NEW_ID,)]
        assert audit_log.find_fault(conn) is None
        audit_records = rows(conn, "SELECT sum(count)::int FROM ops.audit_log WHERE action = 'key rotation'")
        assert audit_records == [(38 + 1,)]
    with pytest.raises(ConfigurationError, match=f"encrypted with key {NEW_ID}, which is not in PHI_ENCRYPTION_KEYS"):
        keyring(place.url, OLD)


def test_blind_indexes_and_fingerprints_outlive_the_rotation(place: Place) -> None:
    with opened(place.url, OLD) as conn:
        fill(conn, place.store(OLD))
        before = rows(conn, "SELECT _resource_key, mrn_index FROM fhir.patient ORDER BY 1")
    rotator(place.url, place.store(NEW, OLD), NEW, OLD).run()
    with opened(place.url, NEW) as conn:
        assert rows(conn, "SELECT _resource_key, mrn_index FROM fhir.patient ORDER BY 1") == before
        dead_letters.record(conn, "again", [LETTER])
        assert rows(conn, "SELECT attempts FROM ops.dead_letters") == [(2,)]
        assert corrections.get(conn, 1) is not None


def test_a_second_rotation_finds_nothing_to_do(place: Place) -> None:
    with opened(place.url, OLD) as conn:
        fill(conn, place.store(OLD))
    rotator(place.url, place.store(NEW, OLD), NEW, OLD).run()
    with opened(place.url, NEW) as conn:
        before = rows(conn, "SELECT xmin::text FROM fhir.resource")
    again = rotator(place.url, place.store(NEW, OLD), NEW, OLD).run()
    assert (again.encrypted.total(), again.left_over) == (0, 0)
    with opened(place.url, NEW) as conn:
        assert rows(conn, "SELECT xmin::text FROM fhir.resource") == before


def test_what_was_stored_in_the_clear_is_sealed_and_said(place: Place) -> None:
    with connect(place.url, cipher=NO_ENCRYPTION) as conn:
        fill(conn, place.store())
        assert rows(conn, "SELECT count(*) FROM fhir.patient_name WHERE family LIKE 'Family%'") == [(60,)]
        facts = everything(conn, place.store())["facts"]
    with opened(place.url, NEW) as conn:
        view_tables.apply_changes(conn, VIEWS)
    rotated = rotator(place.url, place.store(NEW), NEW).run()
    assert rotated.left_over == 0
    assert rotated.from_clear == rotated.encrypted
    with opened(place.url, NEW) as conn:
        found = everything(conn, place.store(NEW))
        assert found["facts"] == facts
        assert found["names"] == sorted((f"p{n:05}", f"Family{n}-{k}") for n in range(30) for k in range(2))
        assert found["original"] == [LETTER.resource]
        assert count_key_usage(conn, place.store(NEW), VIEWS).keys == [NEW_ID]
        for query in ("SELECT patient_name::text FROM fhir.patient_name", "SELECT resource::text FROM fhir.resource"):
            assert not any("Family" in str(text) for (text,) in rows(conn, query))
    for file in place.folder.rglob("part-*"):
        assert file.read_bytes().startswith(b"FSP1")


def test_a_letter_and_its_correction_from_before_there_were_keys_are_known_again_afterwards(place: Place) -> None:
    with connect(place.url, cipher=NO_ENCRYPTION) as conn:
        fill(conn, place.store())
    rotator(place.url, place.store(NEW), NEW).run()
    with opened(place.url, NEW) as conn:
        dead_letters.record(conn, "again", [LETTER])
        assert rows(conn, "SELECT attempts FROM ops.dead_letters") == [(2,)]
        known = corrections.read_by_fingerprint(conn, "Patient", ["validate"], [DAY])
        assert known == {DAY: {LETTER.fingerprint(cipher_of(conn)): CORRECTED}}


def test_a_letter_that_failed_again_before_the_rotation_loses_neither_of_its_rows(place: Place) -> None:
    with connect(place.url, cipher=NO_ENCRYPTION) as conn:
        fill(conn, place.store())
    with opened(place.url, NEW) as conn:
        dead_letters.record(conn, "again", [LETTER])
        conn.commit()
    assert rotator(place.url, place.store(NEW), NEW).run().left_over == 0
    with opened(place.url, NEW) as conn:
        assert rows(conn, "SELECT attempts, key_id FROM ops.dead_letters") == [(1, NEW_ID), (1, NEW_ID)]
        known = corrections.read_by_fingerprint(conn, "Patient", ["validate"], [DAY])
        assert LETTER.fingerprint(cipher_of(conn)) in known[DAY]
        assert LETTER.fingerprint(NO_ENCRYPTION) not in {
            fp for (fp,) in rows(conn, "SELECT fingerprint FROM ops.dead_letters")
        }


def test_columns_that_keys_give_another_type_are_asked_for_before_anything_is_done(place: Place) -> None:
    born = {**column("born", "birthDate", "date"), "tag": [{"name": "phi", "value": "encrypt"}]}
    birth = view("patient_birth", "Patient", born)
    with connect(place.url, cipher=NO_ENCRYPTION) as conn:
        load_people(conn, range(3), [birth])
    with pytest.raises(ViewError, match="migrate --apply-view-changes"):
        rotator(place.url, place.store(NEW), NEW, views=[birth]).run()


def test_rows_of_a_view_that_a_partial_load_left_with_the_older_key_are_sealed_too(place: Place) -> None:
    with opened(place.url, OLD) as conn:
        load_people(conn, range(5))
    with opened(place.url, NEW, OLD) as conn:
        load_people(conn, range(5), [VIEWS[0]], version="2")
        found = count_key_usage(conn, place.store(NEW, OLD), VIEWS)
        assert (found.count_by_location(OLD_ID)["resources"], found.count_by_location(OLD_ID)["rows"]) == (0, 10)
    assert rotator(place.url, place.store(NEW, OLD), NEW, OLD).run().left_over == 0
    with opened(place.url, NEW) as conn:
        tokens = rows(conn, "SELECT family FROM fhir.patient_name")
        assert len([cipher_of(conn).decrypt_token(str(token)) for (token,) in tokens]) == 10


def test_what_only_a_lost_key_opens_stays_as_it_is_and_the_rest_is_rotated(place: Place) -> None:
    with opened(place.url, OLD) as conn:
        fill(conn, place.store(OLD))
        lose(conn, 4, "0badc0de")
        before = rows(conn, "SELECT resource FROM fhir.resource WHERE key_id = '0badc0de'")
    rotated = rotator(place.url, place.store(NEW, OLD), NEW, OLD).run()
    assert rotated.encrypted["resources"] == 26
    assert rotated.left_over == 4
    assert rotated.encrypted["rows"] == 4 * 3
    assert rotated.usage.count_by_location("0badc0de")["resources"] == 4
    with opened(place.url, NEW) as conn:
        assert rows(conn, "SELECT resource FROM fhir.resource WHERE key_id = '0badc0de'") == before
        assert not count_key_usage(conn, place.store(NEW), VIEWS).is_used(OLD_ID)
        names = rows(conn, "SELECT family FROM fhir.patient_name WHERE _resource_key = 'p00001'")
        assert {cipher_of(conn).decrypt_token(str(name)) for (name,) in names} == {"Family1-0", "Family1-1"}


def test_an_altered_resource_is_named_by_its_type_and_holds_nothing_up(place: Place) -> None:
    with opened(place.url, OLD) as conn:
        load_people(conn, range(10))
        conn.execute(
            "UPDATE fhir.resource SET resource = to_jsonb(overlay(resource #>> '{}' PLACING 'AAAA' FROM 101))"
            " WHERE id = 'p00003'"
        )
        conn.commit()
    rotated = rotator(place.url, place.store(NEW, OLD), NEW, OLD).run()
    assert rotated.encrypted["resources"] == 9
    [(why, count)] = rotated.refused.items()
    assert (count, why.startswith("Patient: encrypted patient data is damaged")) == (1, True)
    assert "p00003" not in why
    assert keyring(place.url, NEW, OLD)
    with pytest.raises(ConfigurationError, match=f"encrypted with key {OLD_ID}"):
        keyring(place.url, NEW)


@pytest.mark.parametrize("damage", ["cut", "altered"])
def test_a_damaged_part_stays_as_it_is_and_is_named(place: Place, damage: str) -> None:
    store = place.store(OLD)
    name = write_part(store, b"Smith", lines=20_000)
    path = place.folder / name
    content = bytearray(path.read_bytes())
    if damage == "cut":
        del content[-3:]
    else:
        content[-3] ^= 1
    path.write_bytes(content)
    rotated = rotator(place.url, place.store(NEW, OLD), NEW, OLD).run()
    assert (rotated.encrypted["parts"], rotated.left_over) == (0, 1)
    assert all(name in why for why in rotated.refused)
    assert path.read_bytes() == content
    assert not list((place.folder / ".spool").iterdir())


@pytest.mark.slow
def test_the_store_is_sealed_in_a_bucket_too(place: Place, s3_url: str) -> None:
    from fhir_assets.deployment.store import build_store
    from fhir_assets.settings import load_settings

    def bucket(*keys: str) -> Store:
        return build_store(load_settings(fhir_store_url=s3_url, phi_encryption_keys=",".join(keys)))

    names = [write_part(bucket(OLD), b"Smith", layer, 20_000) for layer in ("raw", "validated")]
    assert rotator(place.url, bucket(NEW, OLD), NEW, OLD).run().encrypted["parts"] == 2
    store = bucket(NEW)
    assert sorted(n for layer in ("raw", "validated") for n in store.blobs.names(layer) if "part" in n) == sorted(names)
    for layer in ("raw", "validated"):
        manifest = store.manifest(layer, "Patient", DAY)
        assert manifest
        assert sum(len(batch) for batch in store.batches(manifest.parts)) == 20_000


def test_with_the_store_in_the_clear_by_choice_only_sealed_parts_are_sealed_anew(place: Place) -> None:
    write_part(place.store(OLD), b"Smith", "raw")
    clear = write_part(store_at(place.folder, NO_ENCRYPTION), b"Smith", "validated")
    in_the_clear = Cipher(parse_keys([NEW, OLD])).reading_only()
    rotated = rotator(place.url, store_at(place.folder, in_the_clear), NEW, OLD).run()
    assert (rotated.encrypted["parts"], rotated.left_over) == (1, 0)
    assert not (place.folder / clear).read_bytes().startswith(b"FSP1")


def test_without_keys_there_is_nothing_to_rotate_to(place: Place) -> None:
    with pytest.raises(ConfigurationError, match="keys new"):
        ReencryptStep(lambda: connect(place.url, cipher=NO_ENCRYPTION), place.store(), VIEWS, actor="test").run()


def test_two_rotations_at_once_are_refused(place: Place) -> None:
    guard = opened(place.url, NEW)
    guard.autocommit = True
    with guard, key_rotations.lock_rotation(guard):
        with pytest.raises(TransientError, match="keys status"):
            rotator(place.url, place.store(NEW), NEW).run()


def test_rows_of_a_view_that_is_gone_and_rows_without_a_resource_are_sealed_token_by_token(place: Place) -> None:
    with opened(place.url, OLD) as conn:
        load_people(conn, range(5))
        conn.execute("DELETE FROM fhir.resource WHERE id = 'p00000'")
        before = rows(conn, "SELECT _resource_key, gender, mrn_index FROM fhir.patient ORDER BY 1")
    rotated = rotator(place.url, place.store(NEW, OLD), NEW, OLD, views=[VIEWS[0]]).run()
    assert (rotated.encrypted["resources"], rotated.encrypted["rows"], rotated.left_over) == (4, 1 + 10, 0)
    with opened(place.url, NEW) as conn:
        assert rows(conn, "SELECT _resource_key, gender, mrn_index FROM fhir.patient ORDER BY 1") == before
        tokens = rows(conn, "SELECT family FROM fhir.patient_name UNION ALL SELECT mrn FROM fhir.patient")
        opened_tokens = {cipher_of(conn).decrypt_token(str(token)) for (token,) in tokens}
        assert opened_tokens == {f"Family{n}-{k}" for n in range(5) for k in range(2)} | {f"MRN-{n}" for n in range(5)}


def test_a_resource_that_its_views_refuse_by_now_is_sealed_and_keeps_its_rows(place: Place) -> None:
    with opened(place.url, OLD) as conn:
        load_people(conn, range(5))
    stricter = view("patient_name", "Patient", encrypted("family", "name.family"))
    rotated = rotator(place.url, place.store(NEW, OLD), NEW, OLD, views=[VIEWS[0], stricter]).run()
    assert (rotated.left_over, rotated.encrypted["resources"], rotated.encrypted["rows"]) == (0, 5, 15)
    assert not rotated.refused
    with opened(place.url, NEW) as conn:
        assert count_key_usage(conn, place.store(NEW), VIEWS).keys == [NEW_ID]
        assert rows(conn, "SELECT count(*) FROM fhir.patient_name") == [(10,)]


def test_no_table_with_sealed_content_is_forgotten(place: Place) -> None:
    with connect(place.url) as conn:
        found = rows(
            conn,
            "SELECT relname FROM pg_class c JOIN pg_attribute a ON attrelid = c.oid WHERE attname = 'key_id'"
            " AND relnamespace = 'ops'::regnamespace AND relkind = 'r'"
            " AND relname NOT IN ('encryption', 'key_rotations')",
        )
    assert {name for (name,) in found} == {each.table for each in reencryption_batches.ENCRYPTED_TABLES}


def test_no_layer_of_the_store_is_forgotten(place: Place) -> None:
    with pytest.raises(ValueError, match="rotation of the keys"):
        PartWriter(place.store(), "a_new_layer")


def test_progress_is_kept_where_others_see_it(place: Place) -> None:
    with opened(place.url, OLD) as conn:
        load_people(conn, range(2500))
    seen: list[key_rotations.Rotation] = []
    each: Callable[[key_rotations.Rotation], None] = seen.append
    cipher = keyring(place.url, NEW, OLD)
    ReencryptStep(
        lambda: connect(place.url, cipher=cipher), place.store(NEW, OLD), VIEWS, actor="test", on_progress=each
    ).run()
    assert [(p.current_step, p.total, p.done, p.at_work) for p in seen] == [
        ("Patient", 2501, done, True) for done in (1000, 2000, 2500)
    ]
    assert all(p.seconds_left is not None and p.rate > 0 for p in seen)
    with connect(place.url, cipher=NO_ENCRYPTION) as conn:
        last = key_rotations.get_latest(conn)
    assert last is not None
    assert (last.left_over, last.at_work, last.done) == (0, False, 2501)


def test_only_the_name_table_counts_as_sealed_where_others_hold_nothing(place: Place) -> None:
    plain = view("patient_plain", "Patient", column("gender", "gender", "code"))
    with opened(place.url, NEW) as conn:
        load_people(conn, range(2), [plain, NAME])
        assert rows(conn, "SELECT count(*) FROM fhir.patient_plain") == [(2,)]
        assert count_key_usage(conn, place.store(NEW), [plain, NAME]).count_by_location(NEW_ID)["rows"] == 4
