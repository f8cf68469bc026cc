"""Consents that are dead letters: until they are corrected, the resources that they may deny are withheld.

Each unresolved dead letter of a Consent has a record in ``ops.consent_records``, whose id is PREFIX and the number of
the dead letter. The content of the record is a denial for every purpose if the Consent may be one, otherwise a Consent
that decides nothing. Its keys identify the patient if the dead letter does, otherwise the resources that arrived with
it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from psycopg import sql

from fhir_assets.privacy.encryption import as_json
from fhir_assets.privacy.places import resource_place
from fhir_assets.warehouse.ops.dead_letters import decrypt_content
from fhir_assets.warehouse.postgres.db.connections import Connection, Session, cipher_of

PREFIX = "dead-letter/"
"""The beginning of the ids of these records. Ids in FHIR cannot contain a slash."""

_DENIAL = b'{"resourceType":"Consent","status":"active","provision":{"type":"deny"}}'
_NOTHING = b'{"resourceType":"Consent","status":"inactive"}'


@dataclass(frozen=True, slots=True)
class DeadConsent:
    """An unresolved dead letter of a Consent with its decrypted content; None if it has no content."""

    id: int
    body: bytes | None
    partition_key: str
    arrived: datetime | None
    origin: str | None


@dataclass(frozen=True, slots=True)
class PossibleDenial:
    """The possible effect of a dead letter.

    ``patients`` are ids of patients, ``tokens`` those of identifiers that the patient may have. If ``denies`` is False,
    the Consent cannot be a denial.
    """

    consent: DeadConsent
    denies: bool
    patients: Sequence[str]
    tokens: Sequence[str]


def is_changed(conn: Connection) -> bool:
    """Return whether the unresolved dead letters of Consents changed since the records were written."""
    row = conn.execute(sql.SQL("SELECT EXISTS ({}) OR EXISTS ({})").format(_UNRECORDED, _RECORDED_IN_VAIN)).fetchone()
    return bool(row and row[0])


def find_unrecorded(conn: Session, limit: int) -> list[DeadConsent]:
    """Return at most ``limit`` dead letters of Consents that have no record. Raises EncryptionError."""
    rows = conn.execute(sql.SQL("{} ORDER BY d.id LIMIT %s").format(_UNRECORDED), [limit]).fetchall()
    return [
        DeadConsent(
            number,
            decrypt_content(conn, conn.source, fingerprint, body),
            key,
            arrived,
            origin,
        )
        for number, fingerprint, body, key, arrived, origin in rows
    ]


def record(conn: Session, denial: PossibleDenial, *, by_file: bool) -> None:
    """Record the possible effect of a dead letter, and mark the patients for a decision.

    If the patient is not known, the resources that arrived in the same file or request are withheld. With ``by_file``,
    resources with an equal time of arrival belong to one file.
    """
    cipher = cipher_of(conn)
    consent = denial.consent
    content = _DENIAL if denial.denies else _NOTHING
    consent_id = f"{PREFIX}{consent.id}"
    encrypted = cipher.compress_and_encrypt(content, resource_place(conn.source, "Consent", consent_id))
    conn.execute(
        _RECORD,
        {
            "id": consent_id,
            "resource": (as_json(encrypted) if cipher.encrypts else content).decode(),
            "key_id": cipher.key_id,
            "denies": denial.denies,
            "patients": list(denial.patients),
            "tokens": list(denial.tokens),
            "origin": consent.origin,
            "arrived": consent.arrived,
            "partition_key": consent.partition_key,
            "by_file": by_file,
        },
    )
    conn.execute(_MARK, [consent_id])


def remove_resolved(conn: Connection) -> None:
    """Delete the records of dead letters that were resolved or discarded, and mark the patients for a decision."""
    ids = [row[0] for row in conn.execute(_RECORDED_IN_VAIN)]
    for consent_id in ids:
        conn.execute(_MARK, [consent_id])
    conn.execute("DELETE FROM ops.consent_records WHERE source = ops.current_source() AND consent_id = ANY(%s)", [ids])


_UNRECORDED = sql.SQL("""
    SELECT d.id, d.fingerprint, d.resource, d.partition_key, d.arrived, d.origin
    FROM ops.dead_letters d
    WHERE d.source = ops.current_source()
        AND d.resource_type = 'Consent'
        AND d.status IN ('open', 'replaying')
        AND d.stage IN ('fetch', 'validate', 'transform', 'load')
        AND NOT EXISTS (
            SELECT FROM ops.consent_records r
            WHERE r.source = d.source AND r.consent_id = 'dead-letter/' || d.id
        )
""")
_RECORDED_IN_VAIN = sql.SQL("""
    SELECT r.consent_id
    FROM ops.consent_records r
    WHERE r.source = ops.current_source()
        AND starts_with(r.consent_id, 'dead-letter/')
        AND NOT EXISTS (
            SELECT FROM ops.dead_letters d
            WHERE d.source = r.source
                AND 'dead-letter/' || d.id = r.consent_id
                AND d.status IN ('open', 'replaying')
        )
""")
_RECORD = """
    WITH known AS (
        SELECT
            %(patients)s::text[] || ARRAY(
                SELECT r.id
                FROM fhir_partitions.resource_patient r
                WHERE r.source = ops.current_source()
                    AND r.mentions && %(tokens)s::text[]
                    AND r.deleted_at IS NULL
                UNION
                SELECT w.id
                FROM ops.withheld w
                WHERE w.source = ops.current_source()
                    AND w.resource_type = 'Patient'
                    AND w.mentions && %(tokens)s::text[]
            ) AS patients
    ), delivery AS (
        SELECT DISTINCT arrival
        FROM ops.received r
        CROSS JOIN unnest(r.arrivals) arrival
        WHERE r.source = ops.current_source()
            AND r.resource_type = 'Consent'
            AND (
                r.origin = %(origin)s::text
                OR r.partition_key = %(partition_key)s AND %(arrived)s::timestamptz = ANY(r.arrivals)
            )
        UNION
        SELECT %(arrived)s::timestamptz WHERE %(by_file)s AND %(arrived)s::timestamptz IS NOT NULL
    )
    INSERT INTO ops.consent_records (consent_id, keys, as_of, arrived, resource, key_id)
    SELECT
        %(id)s,
        CASE
            WHEN NOT %(denies)s THEN '{}'
            WHEN cardinality(known.patients) > 0 THEN known.patients || %(tokens)s::text[]
            WHEN EXISTS (SELECT FROM delivery)
                THEN %(tokens)s::text[] || ARRAY(
                    SELECT '@' || to_char(arrival AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US') FROM delivery
                )
            ELSE %(tokens)s::text[] || ARRAY['?' || %(id)s]
        END,
        coalesce(%(arrived)s::timestamptz, now()),
        coalesce(%(arrived)s::timestamptz, now()),
        %(resource)s::jsonb,
        %(key_id)s
    FROM known
    ON CONFLICT (consent_id, source) DO NOTHING
"""
_MARK = """
    WITH named AS (
        SELECT unnest(keys) AS key
        FROM ops.consent_records
        WHERE source = ops.current_source() AND consent_id = %s
    ), tokens AS (
        SELECT coalesce(array_agg(key), '{}') AS keys FROM named WHERE starts_with(key, '#')
    )
    INSERT INTO ops.consent_changes (patient_id, at)
    SELECT key, '-infinity'::timestamptz FROM named
    UNION
    SELECT r.id, '-infinity'
    FROM fhir_partitions.resource_patient r
    CROSS JOIN tokens
    WHERE r.source = ops.current_source() AND r.deleted_at IS NULL AND r.mentions && tokens.keys
    UNION
    SELECT w.id, '-infinity'
    FROM ops.withheld w
    CROSS JOIN tokens
    WHERE w.source = ops.current_source() AND w.resource_type = 'Patient' AND w.mentions && tokens.keys
    ON CONFLICT (patient_id, source) DO UPDATE SET at = excluded.at
"""
