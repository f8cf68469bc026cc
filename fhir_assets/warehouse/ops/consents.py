"""The decisions that follow from Consents.

``ops.consents`` holds the decision for each patient and purpose, ``ops.consent_changes`` the time at which the decision
must be updated, and ``ops.consent_policy`` the policy that the tables follow. A patient is identified by a key
of ``withheld_conditions``: the id, a token of an identifier, or the delivery of a Consent whose patient is not known.
The Consents are in the module ``consent_records``, and the resources that a decision keeps out of the tables are in
``withheld_resources``.

Loads hold a shared lock while they read decisions. A change of decisions holds the same lock exclusively until the
tables are changed, so that a running load cannot insert a resource that was just withheld.

A posted Consent takes effect immediately, in the transaction that receives it (``decide_before_load``). It does not
wait for loads: the patients stay marked in ``ops.consent_changes``, so that the next change of decisions updates the
tables, and until then reads consult ``ops.consents``. A separate lock serializes posts and changes of decisions.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import msgspec
from psycopg.rows import dict_row

from fhir_assets.privacy.consent import (
    Consent,
    ConsentGate,
    Decision,
    Policy,
    Purpose,
    decide,
    next_change,
    read_consent,
)
from fhir_assets.warehouse.postgres.db import advisory_locks
from fhir_assets.warehouse.postgres.db.connections import Connection, Session
from fhir_assets.warehouse.postgres.resources import decrypt_resource

_parse = msgspec.json.Decoder(dict[str, Any]).decode


def lock_decisions_for_load(conn: Connection) -> None:
    """Prevent changes of decisions until the transaction of a load ends. Several loads hold this lock together."""
    conn.execute("SELECT pg_advisory_xact_lock_shared(%s)", [advisory_locks.CONSENT_DECISIONS])


def lock_decisions_for_change(conn: Connection) -> None:
    """Wait for running loads and posts to end, and block others until this transaction ends."""
    conn.execute("SELECT pg_advisory_xact_lock(%s)", [advisory_locks.CONSENT_DECISIONS])
    lock_decisions_for_post(conn)


def lock_decisions_for_post(conn: Connection) -> None:
    """Wait for other posts of Consents and for a change of decisions, but not for loads.

    Block these until this transaction ends.
    """
    conn.execute("SELECT pg_advisory_xact_lock(%s)", [advisory_locks.CONSENT_POSTS])


def count_unknown_denials(conn: Connection, consent_gate: ConsentGate) -> int:
    """Return the number of Consents that deny and whose patient is not known."""
    row = conn.execute(
        """
        SELECT count(*)
        FROM ops.consent_records r
        WHERE r.source = ops.current_source()
            AND EXISTS (
                SELECT FROM ops.consents c
                WHERE c.source = r.source
                    AND c.patient_id = ANY(r.keys)
                    AND left(c.patient_id, 1) IN ('@', '?')
                    AND c.purpose = %s
                    AND c.decision = 'deny'
            )
        """,
        [consent_gate.purpose.value],
    ).fetchone()
    return row[0] if row and consent_gate.withholds else 0


def count_dead_consents(conn: Connection) -> int:
    """Return the number of Consents that are unresolved dead letters, so that they decide nothing."""
    row = conn.execute(
        """
        SELECT count(*)
        FROM ops.dead_letters
        WHERE source = ops.current_source() AND resource_type = 'Consent' AND status IN ('open', 'replaying')
        """
    ).fetchone()
    return row[0] if row else 0


def find_due_patients(conn: Connection, at: datetime, limit: int) -> list[str]:
    """Return the ids of at most ``limit`` patients for whom ``update_decisions`` is due at time ``at``.

    A patient is due if a Consent changed, or if a period of a Consent has begun or ended.
    """
    rows = conn.execute(
        """
        SELECT patient_id
        FROM ops.consent_changes
        WHERE source = ops.current_source()
            AND at <= %s
        ORDER BY patient_id
        LIMIT %s
        """,
        [at, limit],
    )
    return [patient for (patient,) in rows]


def update_decisions(conn: Session, patients: Sequence[str], at: datetime) -> int:
    """Decide on patients by their Consents at time ``at`` and return the number of decisions that changed.

    Records for each patient the time of the next change, if there is one. Raises EncryptionError if a Consent cannot
    be decrypted.
    """
    consents_by_patient = _read_consents(conn, patients)
    versions: dict[str, str | None] = {}
    decisions: list[tuple[str, Purpose, Decision]] = []
    changes: list[tuple[str, datetime]] = []
    for patient in patients:
        consents = []
        for consent, version in consents_by_patient.get(patient, ()):
            consents.append(consent)
            versions[consent.id] = version
        decisions += [
            (patient, purpose, decision) for purpose in Purpose if (decision := decide(consents, purpose, at))
        ]
        if moment := next_change(consents, at):
            changes.append((patient, moment))
    changed = conn.execute(
        """
        DELETE FROM ops.consents c
        WHERE source = ops.current_source()
            AND patient_id = ANY(%s)
            AND (patient_id, purpose) NOT IN (SELECT * FROM unnest(%s::text[], %s::text[]))
        """,
        [
            list(patients),
            [patient for patient, _, _ in decisions],
            [purpose.value for _, purpose, _ in decisions],
        ],
    ).rowcount
    changed += conn.execute(
        """
        INSERT INTO ops.consents AS known (patient_id, purpose, decision, consent_id, basis, version_id)
        SELECT * FROM unnest(%s::text[], %s::text[], %s::text[], %s::text[], %s::text[], %s::text[])
        ON CONFLICT (patient_id, purpose, source) DO UPDATE SET
            decision = excluded.decision,
            consent_id = excluded.consent_id,
            basis = excluded.basis,
            version_id = excluded.version_id,
            decided_at = now()
        WHERE (known.decision, known.consent_id, known.basis, known.version_id)
            IS DISTINCT FROM (excluded.decision, excluded.consent_id, excluded.basis, excluded.version_id)
        """,
        [
            [patient for patient, _, _ in decisions],
            [purpose.value for _, purpose, _ in decisions],
            [decision.verdict for _, _, decision in decisions],
            [decision.consent for _, _, decision in decisions],
            [decision.path for _, _, decision in decisions],
            [versions[decision.consent] for _, _, decision in decisions],
        ],
    ).rowcount
    conn.execute(
        "DELETE FROM ops.consent_changes WHERE source = ops.current_source() AND patient_id = ANY(%s)", [list(patients)]
    )
    conn.execute(
        "INSERT INTO ops.consent_changes (patient_id, at) SELECT * FROM unnest(%s::text[], %s::timestamptz[])",
        [[patient for patient, _ in changes], [moment for _, moment in changes]],
    )
    return changed


def decide_before_load(conn: Session, patients: Sequence[str], at: datetime) -> int:
    """Update the decisions about patients as of ``at``, and keep the patients marked until the tables are updated.

    The caller holds the lock of ``lock_decisions_for_post``. Return the number of decisions that changed. Raises
    EncryptionError.
    """
    changed = update_decisions(conn, patients, at)
    conn.execute(
        """
        INSERT INTO ops.consent_changes (patient_id, at)
        SELECT patient_id, '-infinity'
        FROM unnest(%s::text[]) patient_id
        ON CONFLICT (patient_id, source) DO UPDATE SET at = excluded.at
        """,
        [list(patients)],
    )
    return changed


def _read_consents(conn: Session, patients: Sequence[str]) -> Mapping[str, list[tuple[Consent, str | None]]]:
    """Return the Consents of each patient with their version ids.

    A Consent concerns a patient that it names by id, or by an identifier that the Patient has. Its permits count only
    if the patient is among its keys, and if its identifiers do not match several Patients.
    """
    consents: defaultdict[str, list[tuple[Consent, str | None]]] = defaultdict(list)
    rows = conn.execute(
        """
        WITH named AS (
            SELECT
                key,
                ARRAY[key]
                || (
                    SELECT r.mentions
                    FROM fhir_partitions.resource_patient r
                    WHERE r.source = ops.current_source() AND r.id = key
                )
                || (
                    SELECT w.mentions
                    FROM ops.withheld w
                    WHERE w.source = ops.current_source() AND w.resource_type = 'Patient' AND w.id = key
                ) AS known_by
            FROM unnest(%s::text[]) key
        )
        SELECT
            named.key, c.consent_id, c.version_id,
            CASE WHEN c.key_id IS NULL THEN c.resource::text ELSE c.resource #>> '{}' END,
            c.key_id,
            named.key = ANY(c.keys) AND (
                SELECT count(*) FILTER (WHERE starts_with(k, '#')) = 0
                    OR count(*) FILTER (WHERE left(k, 1) NOT IN ('#', '@', '?')) <= 1
                FROM unnest(c.keys) k
            )
        FROM named
        JOIN ops.consent_records c ON c.source = ops.current_source() AND c.keys && named.known_by
        """,
        [list(patients)],
    )
    for patient, consent_id, version, text, key_id, is_certain in rows:
        resource = _parse(decrypt_resource(conn, "Consent", consent_id, text, key_id))
        consent = read_consent(resource, patient, may_permit=is_certain)
        if consent:
            consents[patient].append((consent, version))
    return consents


def list_decisions(conn: Connection, *, patient: str | None, limit: int) -> list[dict[str, Any]]:
    """Return the current decisions, only those of ``patient`` if given.

    The keys are columns of ``ops.consents``, with ``basis`` as ``source``, and ``changes_at``, the time of the next
    change or None.
    """
    with conn.cursor(row_factory=dict_row) as cursor:
        return cursor.execute(
            """
            SELECT
                c.patient_id, c.purpose, c.decision, c.consent_id, c.version_id, c.basis AS source, c.decided_at,
                CASE WHEN isfinite(change.at) THEN change.at END AS changes_at
            FROM ops.consents c
            LEFT JOIN ops.consent_changes change ON change.source = c.source AND change.patient_id = c.patient_id
            WHERE c.source = ops.current_source()
                AND (%(patient)s::text IS NULL OR c.patient_id = %(patient)s)
            ORDER BY c.patient_id, c.purpose
            LIMIT %(limit)s
            """,
            {"patient": patient, "limit": limit},
        ).fetchall()


@dataclass(frozen=True, slots=True)
class AppliedPolicy:
    """The policy that the tables follow.

    ``subjects`` identifies how the subjects of the source's resources were determined; None if no policy was applied to
    them.
    """

    consent_gate: ConsentGate
    subjects: str | None = None


def get_applied_policy(conn: Connection) -> AppliedPolicy:
    """Return the policy that the tables follow, the default if none was recorded."""
    row = conn.execute(
        "SELECT policy, purpose, subjects FROM ops.consent_policy WHERE source = ops.current_source()"
    ).fetchone()
    return AppliedPolicy(ConsentGate(Policy(row[0]), Purpose(row[1])), row[2]) if row else AppliedPolicy(ConsentGate())


def set_applied_policy(conn: Connection, policy: AppliedPolicy) -> None:
    """Record that the tables follow a policy."""
    conn.execute(
        """
        INSERT INTO ops.consent_policy (policy, purpose, subjects)
        VALUES (%s, %s, %s)
        ON CONFLICT (source) DO UPDATE SET
            policy = excluded.policy,
            purpose = excluded.purpose,
            subjects = excluded.subjects
        """,
        [policy.consent_gate.policy.value, policy.consent_gate.purpose.value, policy.subjects],
    )
