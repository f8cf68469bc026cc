"""Consent in the database: what is known, what is decided, and whom the tables withhold.

``ops.consent_records`` holds the newest version of every Consent, ``ops.consents`` what follows for a patient and a
purpose, ``ops.withheld`` the resources that stay out of ``fhir`` meanwhile. Loads hold a shared lock while they ask,
decisions an exclusive one while they are made and carried out, so that no load brings back what was just withdrawn.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import msgspec
from psycopg import sql
from psycopg.rows import dict_row

from fhir_assets.fhir.compartment import UNKNOWN_PATIENT
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
from fhir_assets.warehouse.postgres.db.connections import Connection, Session, cipher_of
from fhir_assets.warehouse.postgres.resources import open_text

_parse = msgspec.json.Decoder(dict[str, Any]).decode


def withheld(gate: ConsentGate, table: str) -> sql.Composed:
    """The condition that a row of ``table``, which has a column ``patients``, is withheld.

    What belongs to several patients is withheld if any of them is; what belongs to none never is.
    """
    patients = sql.Identifier(table, "patients")
    if gate.policy is Policy.OFF:
        return sql.SQL("false").format()
    if gate.policy is Policy.OPT_OUT:
        text = (
            "EXISTS (SELECT FROM ops.consents c WHERE c.patient_id = ANY({patients}) AND c.purpose = {purpose}"
            " AND c.decision = 'deny')"
        )
    else:
        text = (
            "EXISTS (SELECT FROM unnest({patients}) p WHERE NOT EXISTS (SELECT FROM ops.consents c"
            " WHERE c.patient_id = p AND c.purpose = {purpose} AND c.decision = 'permit'))"
        )
    return sql.SQL(text).format(patients=patients, purpose=sql.Literal(gate.purpose.value))


def keep_decisions(conn: Connection) -> None:
    """Nobody decides anew until the transaction ends: for loads."""
    conn.execute("SELECT pg_advisory_xact_lock_shared(%s)", [advisory_locks.CONSENT_DECISIONS])


def begin_deciding(conn: Connection) -> None:
    """Wait for the loads that are under way, and keep others out until the transaction ends."""
    conn.execute("SELECT pg_advisory_xact_lock(%s)", [advisory_locks.CONSENT_DECISIONS])


_FACTS = "id, version_id, version_number, last_updated, as_of, partition_key"
_NEWER = "(excluded.as_of, coalesce(excluded.version_number, 0)) >= (known.as_of, coalesce(known.version_number, 0))"


def record_statements(source: sql.Composable, key_id: sql.Composable) -> tuple[sql.Composed, ...]:
    """Statements that note the Consents in ``source`` (``s``, with the columns of ``fhir.resource``), whoever they
    are about; ``key_id`` names the key that seals them.
    """
    about = sql.SQL("s.patients[1] <> {}").format(sql.Literal(UNKNOWN_PATIENT))
    return (
        sql.SQL(
            "INSERT INTO ops.consent_changes (patient_id, at)"
            " SELECT s.patients[1], '-infinity'::timestamptz FROM {source} s WHERE {about} UNION"
            " SELECT k.patient_id, '-infinity' FROM {source} s JOIN ops.consent_records k ON k.consent_id = s.id"
            " ON CONFLICT (patient_id) DO UPDATE SET at = excluded.at"
        ).format(source=source, about=about),
        sql.SQL(
            "INSERT INTO ops.consent_records AS known"
            " (consent_id, patient_id, version_id, version_number, as_of, resource, key_id)"
            " SELECT s.id, s.patients[1], s.version_id, s.version_number, s.as_of, s.resource,"
            " {key_id} FROM {source} s WHERE {about} AND s.resource IS NOT NULL"
            " AND NOT EXISTS (SELECT FROM fhir.resource_consent r WHERE r.id = s.id AND r.deleted_at IS NOT NULL"
            " AND r.as_of >= s.as_of)"
            " ON CONFLICT (consent_id) DO UPDATE SET patient_id = excluded.patient_id,"
            " version_id = excluded.version_id, version_number = excluded.version_number, as_of = excluded.as_of,"
            " resource = excluded.resource, key_id = excluded.key_id WHERE {newer}"
        ).format(source=source, about=about, key_id=key_id, newer=sql.SQL(_NEWER)),
    )


@dataclass(frozen=True, slots=True)
class ConsentGateStatements:
    """What a load runs on a chunk in its stage, before the rest goes into ``table``."""

    withhold: sql.Composed
    """Moves to ``ops.withheld`` what is withheld; gives its ids. Takes ``run`` and ``key_id``."""
    superseded: sql.Composed
    """Takes out of the stage what is older than its version in ``ops.withheld``."""
    released: sql.Composed
    """Takes out of ``ops.withheld`` what the stage brings."""
    taken_back: sql.Composed
    """Takes out of the table older versions of what was withheld (``ids``); gives their ids."""
    outdated: sql.Composed
    """Takes out of ``ops.withheld`` what the table has in a newer version (``ids``)."""


def gate_statements(
    gate: ConsentGate, resource_type: str, table: sql.Identifier, stage: sql.Identifier
) -> ConsentGateStatements:
    """The statements for a type; ``stage`` has the columns of ``fhir.resource`` that say what a resource is."""
    words: dict[str, sql.Composable] = {
        "table": table,
        "stage": stage,
        "type": sql.Literal(resource_type),
        "facts": sql.SQL(_FACTS),
        "stored": sql.SQL("(r.as_of, coalesce(r.version_number, 0))"),
        "held": sql.SQL("(w.as_of, coalesce(w.version_number, 0))"),
        "staged": sql.SQL("(s.as_of, coalesce(s.version_number, 0))"),
    }
    return ConsentGateStatements(
        sql.SQL(
            "WITH gone AS (DELETE FROM {stage} s WHERE {withheld} RETURNING s.*), kept AS ("
            "INSERT INTO ops.withheld AS known (resource_type, {facts}, run_id, key_id, patients, resource)"
            " SELECT {type}, {facts}, %(run)s, %(key_id)s, patients, resource FROM gone"
            " ON CONFLICT (resource_type, id) DO UPDATE SET version_id = excluded.version_id,"
            " version_number = excluded.version_number, last_updated = excluded.last_updated,"
            " as_of = excluded.as_of, partition_key = excluded.partition_key, run_id = excluded.run_id,"
            " key_id = excluded.key_id, patients = excluded.patients, resource = excluded.resource"
            " WHERE {newer}) SELECT id FROM gone"
        ).format(withheld=withheld(gate, "s"), newer=sql.SQL(_NEWER), **words),
        sql.SQL(
            "DELETE FROM {stage} s USING ops.withheld w WHERE w.resource_type = {type} AND w.id = s.id"
            " AND {held} > {staged}"
        ).format(**words),
        sql.SQL("DELETE FROM ops.withheld w USING {stage} s WHERE w.resource_type = {type} AND w.id = s.id").format(
            **words
        ),
        sql.SQL(
            "DELETE FROM {table} r USING ops.withheld w WHERE r.resource_type = {type} AND r.id = ANY(%(ids)s)"
            " AND w.resource_type = {type} AND w.id = r.id"
            " AND ({stored} < {held} OR {stored} = {held} AND r.deleted_at IS NULL) RETURNING r.id"
        ).format(**words),
        sql.SQL(
            "DELETE FROM ops.withheld w USING {table} r WHERE w.resource_type = {type} AND w.id = ANY(%(ids)s)"
            " AND r.resource_type = {type} AND r.id = w.id"
            " AND ({stored} > {held} OR {stored} = {held} AND r.deleted_at IS NOT NULL)"
        ).format(**words),
    )


def forget(conn: Connection, resource_type: str, ids: Sequence[str]) -> None:
    """Resources have tombstones now: older versions are no longer withheld, and what Consents said no longer holds."""
    conn.execute(
        "DELETE FROM ops.withheld w USING fhir.resource r WHERE w.resource_type = %(type)s AND w.id = ANY(%(ids)s)"
        " AND r.resource_type = %(type)s AND r.id = w.id AND r.deleted_at IS NOT NULL AND r.as_of >= w.as_of",
        {"type": resource_type, "ids": list(ids)},
    )
    if resource_type == "Consent":
        conn.execute(
            "WITH gone AS (DELETE FROM ops.consent_records c USING fhir.resource_consent r"
            " WHERE c.consent_id = ANY(%s) AND r.id = c.consent_id AND r.deleted_at IS NOT NULL"
            " AND r.as_of >= c.as_of RETURNING c.patient_id)"
            " INSERT INTO ops.consent_changes (patient_id, at) SELECT DISTINCT patient_id, '-infinity'::timestamptz"
            " FROM gone ON CONFLICT (patient_id) DO UPDATE SET at = excluded.at",
            [list(ids)],
        )


def counts(conn: Connection, resource_type: str, partition_keys: Sequence[str]) -> dict[str, int]:
    """How many resources of a type are withheld, by partition key."""
    return dict(
        conn.execute(
            "SELECT partition_key, count(*) FROM ops.withheld WHERE resource_type = %s AND partition_key = ANY(%s)"
            " GROUP BY 1",
            [resource_type, list(partition_keys)],
        ).fetchall()
    )


def due(conn: Connection, at: datetime, limit: int) -> list[str]:
    """Patients whose consents changed, or begin or end, and are not decided on yet."""
    rows = conn.execute(
        "SELECT patient_id FROM ops.consent_changes WHERE at <= %s ORDER BY patient_id LIMIT %s", [at, limit]
    )
    return [patient for (patient,) in rows]


def decide_on(conn: Session, patients: Sequence[str], at: datetime) -> int:
    """Decide on patients by what their consents say at a moment. Returns how many decisions are other ones now."""
    known = _consents(conn, patients)
    versions: dict[str, str | None] = {}
    decisions: list[tuple[str, Purpose, Decision]] = []
    changes: list[tuple[str, datetime]] = []
    for patient in patients:
        consents = []
        for consent, version in known.get(patient, ()):
            consents.append(consent)
            versions[consent.id] = version
        decisions += [(patient, each, said) for each in Purpose if (said := decide(consents, each, at))]
        if moment := next_change(consents, at):
            changes.append((patient, moment))
    changed = conn.execute(
        "DELETE FROM ops.consents c WHERE patient_id = ANY(%s)"
        " AND (patient_id, purpose) NOT IN (SELECT * FROM unnest(%s::text[], %s::text[]))",
        [list(patients), [d[0] for d in decisions], [d[1].value for d in decisions]],
    ).rowcount
    changed += conn.execute(
        "INSERT INTO ops.consents AS known (patient_id, purpose, decision, consent_id, source, version_id)"
        " SELECT * FROM unnest(%s::text[], %s::text[], %s::text[], %s::text[], %s::text[], %s::text[])"
        " ON CONFLICT (patient_id, purpose) DO UPDATE SET decision = excluded.decision,"
        " consent_id = excluded.consent_id, source = excluded.source, version_id = excluded.version_id,"
        " decided_at = now() WHERE (known.decision, known.consent_id, known.source, known.version_id)"
        " IS DISTINCT FROM (excluded.decision, excluded.consent_id, excluded.source, excluded.version_id)",
        [
            [d[0] for d in decisions],
            [d[1].value for d in decisions],
            [d[2].verdict for d in decisions],
            [d[2].consent for d in decisions],
            [d[2].path for d in decisions],
            [versions[d[2].consent] for d in decisions],
        ],
    ).rowcount
    conn.execute("DELETE FROM ops.consent_changes WHERE patient_id = ANY(%s)", [list(patients)])
    conn.execute(
        "INSERT INTO ops.consent_changes (patient_id, at) SELECT * FROM unnest(%s::text[], %s::timestamptz[])",
        [[patient for patient, _ in changes], [moment for _, moment in changes]],
    )
    return changed


def _consents(conn: Session, patients: Sequence[str]) -> Mapping[str, list[tuple[Consent, str | None]]]:
    """What each patient's Consents say, with their versions."""
    cipher = cipher_of(conn)
    found: dict[str, list[tuple[Consent, str | None]]] = {}
    rows = conn.execute(
        "SELECT patient_id, version_id, CASE WHEN key_id IS NULL THEN resource::text ELSE resource #>> '{}' END,"
        " key_id FROM ops.consent_records WHERE patient_id = ANY(%s)",
        [list(patients)],
    )
    for patient, version, text, key_id in rows:
        consent = read_consent(_parse(open_text(text, key_id, cipher)), patient)
        if consent:
            found.setdefault(patient, []).append((consent, version))
    return found


def decisions(conn: Connection, *, patient: str | None, limit: int) -> list[dict[str, Any]]:
    """The decisions in force, with when they may change."""
    return (
        conn.cursor(row_factory=dict_row)
        .execute(
            "SELECT c.*, CASE WHEN isfinite(n.at) THEN n.at END AS changes_at FROM ops.consents c"
            " LEFT JOIN ops.consent_changes n USING (patient_id) WHERE %(patient)s::text IS NULL"
            " OR c.patient_id = %(patient)s ORDER BY c.patient_id, c.purpose LIMIT %(limit)s",
            {"patient": patient, "limit": limit},
        )
        .fetchall()
    )


def followed(conn: Connection) -> ConsentGate:
    """The policy that the tables follow."""
    row = conn.execute("SELECT policy, purpose FROM ops.consent_policy").fetchone()
    return ConsentGate(Policy(row[0]), Purpose(row[1])) if row else ConsentGate()


def follow(conn: Connection, gate: ConsentGate) -> None:
    """The tables follow this policy now."""
    conn.execute(
        "INSERT INTO ops.consent_policy (policy, purpose) VALUES (%s, %s)"
        " ON CONFLICT (one) DO UPDATE SET policy = excluded.policy, purpose = excluded.purpose",
        [gate.policy.value, gate.purpose.value],
    )


def take_back(
    conn: Connection, gate: ConsentGate, *, patients: Sequence[str] | None = None, limit: int | None = None
) -> dict[str, int]:
    """Move to ``ops.withheld`` what of some patients (None: of all) stands in the tables and is withheld, and its
    rows out of every view. Returns how many resources, by type.
    """
    of_them: sql.Composable = sql.SQL("cardinality(r.patients) > 0")
    if patients is not None:
        of_them = sql.SQL(
            "(r.patients[1] = ANY(%(patients)s) OR (cardinality(r.patients) > 1 AND r.patients && %(patients)s))"
        )
    query = sql.SQL(
        "WITH gone AS (DELETE FROM fhir.resource WHERE (resource_type, id) IN ("
        "SELECT r.resource_type, r.id FROM fhir.resource r WHERE {of_them} AND {withheld} AND r.resource IS NOT NULL"
        " LIMIT %(limit)s) RETURNING *), kept AS ("
        "INSERT INTO ops.withheld AS known (resource_type, {facts}, run_id, key_id, patients, resource)"
        " SELECT resource_type, {facts}, run_id, key_id, patients, resource FROM gone"
        " ON CONFLICT (resource_type, id) DO NOTHING) SELECT resource_type, array_agg(id) FROM gone GROUP BY 1"
    ).format(of_them=of_them, withheld=withheld(gate, "r"), facts=sql.SQL(_FACTS))
    gone = conn.execute(query, {"patients": list(patients or ()), "limit": limit}).fetchall()
    for resource_type, ids in gone:
        clear_views(conn, resource_type, ids)
    return {resource_type: len(ids) for resource_type, ids in gone}


def clear_views(conn: Connection, resource_type: str, ids: Iterable[str]) -> None:
    """Remove the rows of resources from every view's table, also of views that are no longer there."""
    names = conn.execute(
        "SELECT name FROM ops.view_tables v WHERE resource_type = %s"
        " AND EXISTS (SELECT FROM pg_class c WHERE c.relnamespace = 'fhir'::regnamespace AND c.relname = v.name)",
        [resource_type],
    ).fetchall()
    for (name,) in names:
        conn.execute(
            sql.SQL("DELETE FROM {} WHERE _resource_key = ANY(%s)").format(sql.Identifier("fhir", name)), [list(ids)]
        )
