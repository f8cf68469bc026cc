"""A small deployment for the tests of key rotation: encrypted patient data in every table and in the store."""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from fhir_assets.fhir.record import Record
from fhir_assets.fhir.views import View
from fhir_assets.pipeline.reencrypt.step import ReencryptStep
from fhir_assets.privacy.encryption import NO_ENCRYPTION, Cipher, as_json, from_json
from fhir_assets.privacy.keys import parse_keys
from fhir_assets.privacy.places import (
    Place,
    answer_place,
    correction_place,
    dead_letter_place,
    resource_place,
    value_place,
)
from fhir_assets.sources import DEFAULT_SOURCE
from fhir_assets.storage.manifest import Manifest
from fhir_assets.storage.part_writer import PartWriter
from fhir_assets.storage.store import Store, open_store
from fhir_assets.warehouse.ops import corrections, dead_letters, encryption_secret, idempotency
from fhir_assets.warehouse.ops.dead_letters import DeadLetter
from fhir_assets.warehouse.postgres.db.connections import Connection, Session, cipher_of, connect
from fhir_assets_tests.support.views import column, load, patient, view

DAY = "2024-01-01"
WRITTEN_AT = datetime(2024, 1, 2, tzinfo=UTC)


def encrypted_column(name: str, path: str, **tags: str) -> dict[str, object]:
    """Return an encrypted column of a ViewDefinition."""
    all_tags = [{"name": key, "value": value} for key, value in {"phi": "encrypt", **tags}.items()]
    return {**column(name, path, "string"), "tag": all_tags}


PATIENT = view(
    "patient",
    "Patient",
    column("gender", "gender", "code"),
    encrypted_column("mrn", "identifier.first().value", index="btree"),
)
NAME = view("patient_name", "Patient", encrypted_column("family", "family"), forEach="name")
VIEWS = (PATIENT, NAME)


def unlock_cipher(url: str, *keys: str) -> Cipher:
    """Return a cipher with the keys and the secret of the database."""
    with connect(url) as conn:
        return encryption_secret.unlock(conn, Cipher(parse_keys(keys)))


def open_session(url: str, *keys: str) -> Session:
    """Open a session that encrypts with the keys, or one without encryption if there are no keys."""
    return connect(url, cipher=unlock_cipher(url, *keys) if keys else NO_ENCRYPTION)


def open_store_in(folder: Path, cipher: Cipher) -> Store:
    """Open a local store in a folder."""
    return open_store(str(folder), cipher)


def person(number: int, version: str = "1", family: str | None = None, updated: str = "2024-01-01T00:00:00Z") -> Record:
    """Return the record of a Patient with two names and an MRN."""
    names = [{"family": family or f"Family{number}-{index}"} for index in range(2)]
    return patient(f"p{number:05}", updated, version, identifier=[{"value": f"MRN-{number}"}], name=names)


def load_people(conn: Session, numbers: Sequence[int], views: Sequence[View] = VIEWS, **options: str) -> None:
    """Load the Patients with these numbers and commit. The options are those of ``person``."""
    load(conn, *(person(number, **options) for number in numbers), views=tuple(views))
    conn.commit()


DEAD_LETTER = DeadLetter("Patient", "bad", "validate", "structure", "Patient", "wrong", b'{"id": "bad-Smith"}', DAY)
CORRECTED = b'{"id": "bad", "name": [{"family": "Smith"}]}'


def fill_deployment(conn: Session, store: Store, people: int = 30) -> None:
    """Store patient data in every table that may hold encrypted data, and in the store."""
    load_people(conn, range(people))
    cipher = cipher_of(conn)
    clear = b'{"id": "held-Smith"}'

    def encrypt(resource_type: str, resource_id: str) -> str:
        place = resource_place(conn.source, resource_type, resource_id)
        return (as_json(cipher.compress_and_encrypt(clear, place)) if cipher.encrypts else clear).decode()

    for number in range(3):
        conn.execute(
            """
            INSERT INTO ops.withheld (resource_type, id, as_of, partition_key, run_id, key_id, patients, resource)
            VALUES ('Patient', %s, now(), %s, 'run', %s, '{}', %s::jsonb)
            """,
            [f"w{number}", DAY, cipher.key_id, encrypt("Patient", f"w{number}")],
        )
    conn.execute(
        """
        INSERT INTO ops.consent_records (consent_id, keys, as_of, resource, key_id)
        VALUES ('c', '{p}', now(), %s::jsonb, %s)
        """,
        [encrypt("Consent", "c"), cipher.key_id],
    )
    dead_letters.record(conn, "run", [DEAD_LETTER])
    [(dead_letter_id,)] = conn.execute("SELECT id FROM ops.dead_letters").fetchall()
    corrections.record(conn, dead_letter_id, CORRECTED, by="somebody")
    idempotency.record_response(
        conn, idempotency.Request.of(conn, "me", "/visits", "key", b"body"), 200, b"the answer: Smith"
    )
    conn.commit()
    write_part(store, b'{"id": "raw-Smith"}')


def write_part(store: Store, line: bytes, layer: str = "raw", lines: int = 5) -> str:
    """Write a partition with one part of equal lines. Return the name of the part."""
    with PartWriter(store, layer) as writer:
        for _ in range(lines):
            writer.add("Patient", DAY, line, None)
        parts = writer.finish()["Patient", DAY]
    store.commit([Manifest(layer, "Patient", DAY, "run", WRITTEN_AT, parts)])
    return parts[0].name


def read_decrypted(conn: Connection, store: Store) -> dict[str, object]:
    """Return the decrypted content of the tables and the store. A rotation must not change it."""
    cipher = cipher_of(conn)

    def text(query: str) -> list[object]:
        texts: list[object] = []
        for resource_type, resource_id, key_id, value in conn.execute(query.encode()).fetchall():
            place = resource_place(DEFAULT_SOURCE, resource_type, resource_id)
            content = value.encode() if key_id is None else cipher.decrypt_and_decompress(from_json(value), place)
            texts.append(content.replace(b" ", b""))
        return texts

    def binary(query: str, build_place: Callable[..., Place], *of_source: str) -> list[object]:
        return [
            cipher.decrypt_and_decompress(bytes(value), build_place(*of_source, bytes(key)))
            for key, value in conn.execute(query.encode()).fetchall()
        ]

    stored_text = "key_id, CASE WHEN key_id IS NULL THEN resource::text ELSE resource #>> '{}' END"
    tokens = conn.execute("SELECT _resource_key, mrn FROM fhir.patient ORDER BY 1").fetchall()
    names = conn.execute("SELECT _resource_key, family FROM fhir.patient_name").fetchall()
    manifest = store.manifest("raw", "Patient", DAY)
    assert manifest
    return {
        "resources": text(f"SELECT resource_type, id, {stored_text} FROM fhir.resource ORDER BY id"),
        "facts": conn.execute(
            "SELECT id, run_id, loaded_at, as_of, partition_key FROM fhir.resource ORDER BY 1"
        ).fetchall(),
        "mrn": [(key, decrypt_value(conn, "patient", "mrn", key, mrn)) for key, mrn in tokens],
        "names": sorted((key, decrypt_value(conn, "patient_name", "family", key, family)) for key, family in names),
        "withheld": text(f"SELECT resource_type, id, {stored_text} FROM ops.withheld ORDER BY id"),
        "consents": text(f"SELECT 'Consent', consent_id, {stored_text} FROM ops.consent_records"),
        "dead_letters": binary(
            "SELECT fingerprint, resource FROM ops.dead_letters ORDER BY id", dead_letter_place, DEFAULT_SOURCE
        ),
        "corrected": binary("SELECT fingerprint, resource FROM ops.corrections", correction_place, DEFAULT_SOURCE),
        "original": binary("SELECT fingerprint, original FROM ops.corrections", dead_letter_place, DEFAULT_SOURCE),
        "answers": binary("SELECT key, answer FROM ops.idempotency", answer_place),
        "lines": [line for batch in store.batches(manifest.parts) for line in batch],
    }


def decrypt_value(conn: Connection, table: str, name: str, key: object, token: object) -> str:
    """Return the value of a token in a column of a view's table."""
    return cipher_of(conn).decrypt_token(str(token), value_place(table, name, DEFAULT_SOURCE, str(key)))


def build_reencrypt_step(
    url: str, store: Store, *keys: str, views: Sequence[View] = VIEWS, busy_timeout: float = 5.0
) -> ReencryptStep:
    """Build the step that reencrypts everything with the first of the keys."""
    cipher = unlock_cipher(url, *keys)
    return ReencryptStep(lambda: connect(url, cipher=cipher), store, views, actor="test", busy_timeout=busy_timeout)


def lose_key(conn: Connection, count: int, key_id: str) -> None:
    """Make the first ``count`` resources look as if a lost key encrypted them: change the key id in their bytes."""
    conn.execute(
        "UPDATE fhir.resource SET key_id = %(key)s || ':bound', resource = to_jsonb(encode('FS2'::bytea"
        " || decode(%(key)s, 'hex') || substring(decode(resource #>> '{}', 'base64') FROM 8), 'base64'))"
        " WHERE id IN (SELECT id FROM fhir.resource ORDER BY id LIMIT %(count)s)",
        {"key": key_id, "count": count},
    )
    conn.commit()


def fetch_rows(conn: Connection, query: str) -> list[tuple[object, ...]]:
    """Return all rows of a query."""
    return conn.execute(query.encode()).fetchall()
