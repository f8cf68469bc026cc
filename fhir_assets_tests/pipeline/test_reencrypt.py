"""Key rotation: everything is encrypted with the newest key, nothing is lost, and unused older keys can be removed."""

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
from fhir_assets.warehouse.postgres.tables import view_tables
from fhir_assets.warehouse.postgres.tables.encrypted_tables import ENCRYPTED_TABLES
from fhir_assets_tests.support.key_rotation import (
    CORRECTED,
    DAY,
    DEAD_LETTER,
    NAME,
    VIEWS,
    build_reencrypt_step,
    decrypt_value,
    encrypted_column,
    fetch_rows,
    fill_deployment,
    load_people,
    lose_key,
    open_session,
    open_store_in,
    read_decrypted,
    unlock_cipher,
    write_part,
)
from fhir_assets_tests.support.views import column, view

OLD, NEW, OTHER = new_key(), new_key(), new_key()
OLD_ID, NEW_ID = (key.id for key in parse_keys([OLD, NEW]))


@dataclass
class DeploymentFiles:
    """The database and the store of a test."""

    url: str
    folder: Path

    def store(self, *keys: str) -> Store:
        return open_store_in(self.folder, Cipher(parse_keys(keys)) if keys else NO_ENCRYPTION)


@pytest.fixture
def deployment(database: str, tmp_path: Path) -> DeploymentFiles:
    return DeploymentFiles(database, tmp_path / "store")


def test_everything_is_encrypted_with_the_newest_key_and_readable_without_the_older_one(
    deployment: DeploymentFiles,
) -> None:
    with open_session(deployment.url, OLD) as conn:
        fill_deployment(conn, deployment.store(OLD))
        before = read_decrypted(conn, deployment.store(OLD))
    rotated = build_reencrypt_step(deployment.url, deployment.store(NEW, OLD), NEW, OLD).run()
    assert rotated.left_over == 0
    assert not rotated.refused
    assert rotated.encrypted == {
        "resources": 30, "withheld": 3, "consents": 1, "dead_letters": 1, "corrections": 1, "answers": 1, "parts": 1
    }  # fmt: skip
    assert not +rotated.from_clear
    with open_session(deployment.url, NEW) as conn:
        assert read_decrypted(conn, deployment.store(NEW)) == before
        usage = count_key_usage(conn, deployment.store(NEW), VIEWS)
        assert usage.keys == [NEW_ID]
        assert fetch_rows(conn, "SELECT DISTINCT key_id FROM ops.corrections") == [(f"{NEW_ID}:bound",)]
        assert audit_log.find_fault(conn) is None
        audit_records = fetch_rows(conn, "SELECT sum(count)::int FROM ops.audit_log WHERE action = 'key rotation'")
        assert audit_records == [(38 + 1,)]
    with pytest.raises(ConfigurationError, match=f"encrypted with key {NEW_ID}, which is not in PHI_ENCRYPTION_KEYS"):
        unlock_cipher(deployment.url, OLD)


def test_blind_indexes_and_fingerprints_stay_the_same(deployment: DeploymentFiles) -> None:
    with open_session(deployment.url, OLD) as conn:
        fill_deployment(conn, deployment.store(OLD))
        before = fetch_rows(conn, "SELECT _resource_key, mrn_index FROM fhir.patient ORDER BY 1")
    build_reencrypt_step(deployment.url, deployment.store(NEW, OLD), NEW, OLD).run()
    with open_session(deployment.url, NEW) as conn:
        assert fetch_rows(conn, "SELECT _resource_key, mrn_index FROM fhir.patient ORDER BY 1") == before
        dead_letters.record(conn, "again", [DEAD_LETTER])
        assert fetch_rows(conn, "SELECT attempts FROM ops.dead_letters") == [(2,)]
        assert corrections.get(conn, 1) is not None


def test_a_second_rotation_changes_nothing(deployment: DeploymentFiles) -> None:
    with open_session(deployment.url, OLD) as conn:
        fill_deployment(conn, deployment.store(OLD))
    build_reencrypt_step(deployment.url, deployment.store(NEW, OLD), NEW, OLD).run()
    with open_session(deployment.url, NEW) as conn:
        before = fetch_rows(conn, "SELECT xmin::text FROM fhir.resource")
    again = build_reencrypt_step(deployment.url, deployment.store(NEW, OLD), NEW, OLD).run()
    assert (again.encrypted.total(), again.left_over) == (0, 0)
    with open_session(deployment.url, NEW) as conn:
        assert fetch_rows(conn, "SELECT xmin::text FROM fhir.resource") == before


def test_cleartext_data_is_encrypted_and_counted_as_such(deployment: DeploymentFiles) -> None:
    with connect(deployment.url, cipher=NO_ENCRYPTION) as conn:
        fill_deployment(conn, deployment.store())
        assert fetch_rows(conn, "SELECT count(*) FROM fhir.patient_name WHERE family LIKE 'Family%'") == [(60,)]
        facts = read_decrypted(conn, deployment.store())["facts"]
    with open_session(deployment.url, NEW) as conn:
        view_tables.apply_changes(conn, VIEWS)
    rotated = build_reencrypt_step(deployment.url, deployment.store(NEW), NEW).run()
    assert rotated.left_over == 0
    assert rotated.from_clear == rotated.encrypted
    with open_session(deployment.url, NEW) as conn:
        decrypted = read_decrypted(conn, deployment.store(NEW))
        assert decrypted["facts"] == facts
        assert decrypted["names"] == sorted((f"p{n:05}", f"Family{n}-{k}") for n in range(30) for k in range(2))
        assert decrypted["original"] == [DEAD_LETTER.resource]
        assert count_key_usage(conn, deployment.store(NEW), VIEWS).keys == [NEW_ID]
        for query in ("SELECT patient_name::text FROM fhir.patient_name", "SELECT resource::text FROM fhir.resource"):
            assert not any("Family" in str(text) for (text,) in fetch_rows(conn, query))
    for file in deployment.folder.rglob("part-*"):
        assert file.read_bytes().startswith(b"FSP1")


def test_a_cleartext_dead_letter_and_its_correction_are_recognized_after_encryption(
    deployment: DeploymentFiles,
) -> None:
    with connect(deployment.url, cipher=NO_ENCRYPTION) as conn:
        fill_deployment(conn, deployment.store())
    build_reencrypt_step(deployment.url, deployment.store(NEW), NEW).run()
    with open_session(deployment.url, NEW) as conn:
        dead_letters.record(conn, "again", [DEAD_LETTER])
        assert fetch_rows(conn, "SELECT attempts FROM ops.dead_letters") == [(2,)]
        known = corrections.read_by_fingerprint(conn, "Patient", ["validate"], [DAY])
        assert known == {DAY: {DEAD_LETTER.fingerprint(cipher_of(conn)): CORRECTED}}


def test_both_rows_of_a_dead_letter_that_failed_before_and_after_keys_were_set_are_kept(
    deployment: DeploymentFiles,
) -> None:
    with connect(deployment.url, cipher=NO_ENCRYPTION) as conn:
        fill_deployment(conn, deployment.store())
    with open_session(deployment.url, NEW) as conn:
        dead_letters.record(conn, "again", [DEAD_LETTER])
        conn.commit()
    assert build_reencrypt_step(deployment.url, deployment.store(NEW), NEW).run().left_over == 0
    with open_session(deployment.url, NEW) as conn:
        assert fetch_rows(conn, "SELECT attempts, key_id FROM ops.dead_letters") == [(1, f"{NEW_ID}:bound")] * 2
        known = corrections.read_by_fingerprint(conn, "Patient", ["validate"], [DAY])
        assert DEAD_LETTER.fingerprint(cipher_of(conn)) in known[DAY]
        assert DEAD_LETTER.fingerprint(NO_ENCRYPTION) not in {
            fp for (fp,) in fetch_rows(conn, "SELECT fingerprint FROM ops.dead_letters")
        }


def test_a_column_whose_type_must_change_for_encryption_is_reported_before_anything_is_reencrypted(
    deployment: DeploymentFiles,
) -> None:
    born = {**column("born", "birthDate", "date"), "tag": [{"name": "phi", "value": "encrypt"}]}
    birth = view("patient_birth", "Patient", born)
    with connect(deployment.url, cipher=NO_ENCRYPTION) as conn:
        load_people(conn, range(3), [birth])
    with pytest.raises(ViewError, match="migrate --apply-view-changes"):
        build_reencrypt_step(deployment.url, deployment.store(NEW), NEW, views=[birth]).run()


def test_rows_that_a_partial_load_left_with_the_older_key_are_reencrypted(deployment: DeploymentFiles) -> None:
    with open_session(deployment.url, OLD) as conn:
        load_people(conn, range(5))
    with open_session(deployment.url, NEW, OLD) as conn:
        load_people(conn, range(5), [VIEWS[0]], version="2")
        usage = count_key_usage(conn, deployment.store(NEW, OLD), VIEWS).count_by_location(OLD_ID)
        assert (usage["resources"], usage["rows"]) == (0, 10)
    assert build_reencrypt_step(deployment.url, deployment.store(NEW, OLD), NEW, OLD).run().left_over == 0
    with open_session(deployment.url, NEW) as conn:
        tokens = fetch_rows(conn, "SELECT _resource_key, family FROM fhir.patient_name")
        assert len([decrypt_value(conn, "patient_name", "family", *row) for row in tokens]) == 10


def test_resources_of_a_lost_key_stay_unchanged_and_all_others_are_reencrypted(deployment: DeploymentFiles) -> None:
    with open_session(deployment.url, OLD) as conn:
        fill_deployment(conn, deployment.store(OLD))
        lose_key(conn, 4, "0badc0de")
        before = fetch_rows(conn, "SELECT resource FROM fhir.resource WHERE key_id = '0badc0de:bound'")
    rotated = build_reencrypt_step(deployment.url, deployment.store(NEW, OLD), NEW, OLD).run()
    assert rotated.encrypted["resources"] == 26
    assert rotated.left_over == 4
    assert rotated.encrypted["rows"] == 4 * 3
    assert rotated.usage.count_by_location("0badc0de")["resources"] == 4
    with open_session(deployment.url, NEW) as conn:
        assert fetch_rows(conn, "SELECT resource FROM fhir.resource WHERE key_id = '0badc0de:bound'") == before
        assert not count_key_usage(conn, deployment.store(NEW), VIEWS).is_used(OLD_ID)
        names = fetch_rows(conn, "SELECT _resource_key, family FROM fhir.patient_name WHERE _resource_key = 'p00001'")
        assert {decrypt_value(conn, "patient_name", "family", *row) for row in names} == {"Family1-0", "Family1-1"}


def test_a_damaged_resource_is_reported_by_its_type_and_the_others_are_reencrypted(deployment: DeploymentFiles) -> None:
    with open_session(deployment.url, OLD) as conn:
        load_people(conn, range(10))
        conn.execute(
            "UPDATE fhir.resource SET resource = to_jsonb(overlay(resource #>> '{}' PLACING 'AAAA' FROM 101))"
            " WHERE id = 'p00003'"
        )
        conn.commit()
    rotated = build_reencrypt_step(deployment.url, deployment.store(NEW, OLD), NEW, OLD).run()
    assert rotated.encrypted["resources"] == 9
    [(reason, count)] = rotated.refused.items()
    assert (count, reason.startswith("Patient: encrypted patient data is damaged")) == (1, True)
    assert "p00003" not in reason
    assert unlock_cipher(deployment.url, NEW, OLD)
    with pytest.raises(ConfigurationError, match=f"encrypted with key {OLD_ID}"):
        unlock_cipher(deployment.url, NEW)


@pytest.mark.parametrize("damage", ["cut", "altered"])
def test_a_damaged_part_stays_unchanged_and_is_reported_by_its_name(deployment: DeploymentFiles, damage: str) -> None:
    store = deployment.store(OLD)
    name = write_part(store, b"Smith", lines=20_000)
    path = deployment.folder / name
    content = bytearray(path.read_bytes())
    if damage == "cut":
        del content[-3:]
    else:
        content[-3] ^= 1
    path.write_bytes(content)
    rotated = build_reencrypt_step(deployment.url, deployment.store(NEW, OLD), NEW, OLD).run()
    assert (rotated.encrypted["parts"], rotated.left_over) == (0, 1)
    assert all(name in reason for reason in rotated.refused)
    assert path.read_bytes() == content
    assert not list((deployment.folder / ".spool").iterdir())


@pytest.mark.slow
def test_a_store_in_a_bucket_is_reencrypted(deployment: DeploymentFiles, s3_url: str) -> None:
    from fhir_assets.deployment.store import build_store
    from fhir_assets.settings import load_settings

    def bucket(*keys: str) -> Store:
        return build_store(load_settings(fhir_store_url=s3_url, phi_encryption_keys=",".join(keys)))

    names = [write_part(bucket(OLD), b"Smith", layer, 20_000) for layer in ("raw", "validated")]
    assert build_reencrypt_step(deployment.url, bucket(NEW, OLD), NEW, OLD).run().encrypted["parts"] == 2
    store = bucket(NEW)
    assert sorted(n for layer in ("raw", "validated") for n in store.blobs.names(layer) if "part" in n) == sorted(names)
    for layer in ("raw", "validated"):
        manifest = store.manifest(layer, "Patient", DAY)
        assert manifest
        assert sum(len(batch) for batch in store.batches(manifest.parts)) == 20_000


def test_only_encrypted_parts_are_reencrypted_if_the_store_is_in_cleartext_by_choice(
    deployment: DeploymentFiles,
) -> None:
    write_part(deployment.store(OLD), b"Smith", "raw")
    cleartext_part = write_part(open_store_in(deployment.folder, NO_ENCRYPTION), b"Smith", "validated")
    reading_cipher = Cipher(parse_keys([NEW, OLD])).reading_only()
    rotated = build_reencrypt_step(deployment.url, open_store_in(deployment.folder, reading_cipher), NEW, OLD).run()
    assert (rotated.encrypted["parts"], rotated.left_over) == (1, 0)
    assert not (deployment.folder / cleartext_part).read_bytes().startswith(b"FSP1")


def test_a_rotation_without_keys_is_refused(deployment: DeploymentFiles) -> None:
    with pytest.raises(ConfigurationError, match="keys new"):
        ReencryptStep(
            lambda: connect(deployment.url, cipher=NO_ENCRYPTION), deployment.store(), VIEWS, actor="test"
        ).run()


def test_a_rotation_is_refused_while_another_one_runs(deployment: DeploymentFiles) -> None:
    guard = open_session(deployment.url, NEW)
    guard.autocommit = True
    with guard, key_rotations.lock_rotation(guard):
        with pytest.raises(TransientError, match="keys status"):
            build_reencrypt_step(deployment.url, deployment.store(NEW), NEW).run()


def test_rows_without_a_view_or_a_resource_are_reencrypted_token_by_token(deployment: DeploymentFiles) -> None:
    with open_session(deployment.url, OLD) as conn:
        load_people(conn, range(5))
        conn.execute("DELETE FROM fhir.resource WHERE id = 'p00000'")
        before = fetch_rows(conn, "SELECT _resource_key, gender, mrn_index FROM fhir.patient ORDER BY 1")
    rotated = build_reencrypt_step(deployment.url, deployment.store(NEW, OLD), NEW, OLD, views=[VIEWS[0]]).run()
    assert (rotated.encrypted["resources"], rotated.encrypted["rows"], rotated.left_over) == (4, 1 + 10, 0)
    with open_session(deployment.url, NEW) as conn:
        assert fetch_rows(conn, "SELECT _resource_key, gender, mrn_index FROM fhir.patient ORDER BY 1") == before
        values = {
            decrypt_value(conn, table, name, *row)
            for table, name in (("patient_name", "family"), ("patient", "mrn"))
            for row in fetch_rows(conn, f"SELECT _resource_key, {name} FROM fhir.{table}")
        }
        assert values == {f"Family{n}-{k}" for n in range(5) for k in range(2)} | {f"MRN-{n}" for n in range(5)}


def test_a_resource_that_its_changed_views_reject_is_reencrypted_and_keeps_its_rows(
    deployment: DeploymentFiles,
) -> None:
    with open_session(deployment.url, OLD) as conn:
        load_people(conn, range(5))
    stricter = view("patient_name", "Patient", encrypted_column("family", "name.family"))
    rotated = build_reencrypt_step(
        deployment.url, deployment.store(NEW, OLD), NEW, OLD, views=[VIEWS[0], stricter]
    ).run()
    assert (rotated.left_over, rotated.encrypted["resources"], rotated.encrypted["rows"]) == (0, 5, 15)
    assert not rotated.refused
    with open_session(deployment.url, NEW) as conn:
        assert count_key_usage(conn, deployment.store(NEW), VIEWS).keys == [NEW_ID]
        assert fetch_rows(conn, "SELECT count(*) FROM fhir.patient_name") == [(10,)]


def test_every_ops_table_with_a_key_id_is_reencrypted(deployment: DeploymentFiles) -> None:
    with connect(deployment.url) as conn:
        tables = fetch_rows(
            conn,
            "SELECT relname FROM pg_class c JOIN pg_attribute a ON attrelid = c.oid WHERE attname = 'key_id'"
            " AND relnamespace = 'ops'::regnamespace AND relkind = 'r'"
            " AND relname NOT IN ('encryption', 'key_rotations')",
        )
    assert {name for (name,) in tables} == {table.table for table in ENCRYPTED_TABLES}


def test_a_store_layer_that_rotations_do_not_cover_is_refused(deployment: DeploymentFiles) -> None:
    with pytest.raises(ValueError, match="a key rotation would not re-encrypt its parts"):
        PartWriter(deployment.store(), "a_new_layer")


def test_progress_is_recorded_in_the_database(deployment: DeploymentFiles) -> None:
    with open_session(deployment.url, OLD) as conn:
        load_people(conn, range(2500))
    reports: list[key_rotations.Rotation] = []
    report: Callable[[key_rotations.Rotation], None] = reports.append
    cipher = unlock_cipher(deployment.url, NEW, OLD)
    ReencryptStep(
        lambda: connect(deployment.url, cipher=cipher),
        deployment.store(NEW, OLD),
        VIEWS,
        actor="test",
        on_progress=report,
    ).run()
    assert [(p.current_step, p.total, p.done, p.at_work) for p in reports] == [
        ("Patient", 2501, done, True) for done in (1000, 2000, 2500)
    ]
    assert all(p.seconds_left is not None and p.rate > 0 for p in reports)
    with connect(deployment.url, cipher=NO_ENCRYPTION) as conn:
        last = key_rotations.get_latest(conn)
    assert last is not None
    assert (last.left_over, last.at_work, last.done) == (0, False, 2501)


def test_only_tables_with_encrypted_columns_are_counted_in_the_key_usage(deployment: DeploymentFiles) -> None:
    plain = view("patient_plain", "Patient", column("gender", "gender", "code"))
    with open_session(deployment.url, NEW) as conn:
        load_people(conn, range(2), [plain, NAME])
        assert fetch_rows(conn, "SELECT count(*) FROM fhir.patient_plain") == [(2,)]
        assert count_key_usage(conn, deployment.store(NEW), [plain, NAME]).count_by_location(NEW_ID)["rows"] == 4
