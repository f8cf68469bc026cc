"""Whether consent withholds a resource, as SQL conditions on a row with the columns of ``fhir.subjects.Subjects``.

The row must have the columns ``patients``, ``mentions`` and ``arrived``. ``ops.consents`` has decisions for these keys:

- the id of a patient
- ``#<hash>``, a token of an identifier, from a Consent that names its patient by an identifier
- ``@<time>``, the arrival of a file or request with a Consent whose patient is not known
- ``?<id>``, a Consent whose patient is not known and which was the only resource of its delivery: it concerns no
  resource
"""

from psycopg import sql

from fhir_assets.privacy.consent import ConsentGate, Policy


def build_withheld_condition(consent_gate: ConsentGate, table: str) -> sql.Composed:
    """Return the SQL condition for rows of ``table`` that consent itself withholds, without those that refer to them.

    A resource of several patients is withheld if the decision on any of them withholds it, or if one of them is not
    known. A resource without patients is never withheld.
    """
    if consent_gate.policy is Policy.OFF:
        return sql.SQL("false").format()
    conditions = [_IS_DENIED, _IS_OF_HELD_DELIVERY]
    if consent_gate.policy is Policy.OPT_IN:
        conditions.append(_IS_NOT_PERMITTED)
    mentions = sql.Identifier(table, "mentions")
    names: dict[str, sql.Composable] = {
        "patients": sql.Identifier(table, "patients"),
        "mentions": mentions,
        "mentioned_patients": _MENTIONED_PATIENTS.format(mentions=mentions),
        "delivery": build_delivery_key(table),
        "purpose": sql.Literal(consent_gate.purpose.value),
    }
    return sql.SQL("({})").format(
        sql.SQL(" OR ").join(
            [build_unresolved_condition(table), *(condition.format(**names) for condition in conditions)]
        )
    )


def build_unresolved_condition(table: str) -> sql.Composed:
    """Return the SQL condition for rows of ``table`` that have an unknown patient."""
    return sql.SQL("EXISTS (SELECT FROM unnest({}) p WHERE left(p, 1) IN ('?', '#'))").format(
        sql.Identifier(table, "patients")
    )


_MENTIONED_PATIENTS = sql.SQL("ARRAY(SELECT substr(m, 9) FROM unnest({mentions}) m WHERE starts_with(m, 'Patient/'))")
_IS_DENIED = sql.SQL("""
    EXISTS (
        SELECT FROM ops.consents c
        WHERE c.source = ops.current_source()
            AND c.patient_id = ANY({patients} || {mentions} || {mentioned_patients})
            AND c.purpose = {purpose}
            AND c.decision = 'deny'
    )
""")
_IS_OF_HELD_DELIVERY = sql.SQL("""
    cardinality({patients}) > 0
    AND {delivery} = ANY(ARRAY(
        SELECT c.patient_id
        FROM ops.consents c
        WHERE c.source = ops.current_source()
            AND starts_with(c.patient_id, '@')
            AND c.purpose = {purpose}
            AND c.decision = 'deny'
    ))
""")
_IS_NOT_PERMITTED = sql.SQL("""
    EXISTS (
        SELECT FROM unnest({patients} || {mentioned_patients}) p
        WHERE NOT EXISTS (
            SELECT FROM ops.consents c
            WHERE c.source = ops.current_source()
                AND c.patient_id = p
                AND c.purpose = {purpose}
                AND c.decision = 'permit'
        )
    )
""")


def build_delivery_key(table: str) -> sql.Composed:
    """Return the SQL expression for the key of the delivery with which a row of ``table`` arrived."""
    return sql.SQL("""('@' || to_char({arrived} AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US'))""").format(
        arrived=sql.Identifier(table, "arrived")
    )


def build_reference_condition(table: str, resource_type: sql.Composable) -> sql.Composed:
    """Return the SQL condition for rows of ``table`` that refer to a resource in ``ops.withheld``."""
    return sql.SQL("""
        EXISTS (
            SELECT FROM unnest(
                {table}.mentions || ARRAY(SELECT 'Patient/' || p FROM unnest({table}.patients) p)
            ) m
            JOIN ops.withheld target
                ON target.source = ops.current_source()
                AND target.resource_type = split_part(m, '/', 1)
                AND target.id = split_part(m, '/', 2)
            WHERE (target.resource_type, target.id) <> ({resource_type}, {table}.id)
        )
        OR EXISTS (SELECT FROM unnest({table}.mentions) m WHERE starts_with(m, '~'))
        AND EXISTS (
            SELECT FROM ops.withheld target
            WHERE target.source = ops.current_source()
                AND target.resource_type = 'Patient'
                AND target.mentions && ARRAY(
                    SELECT substr(m, 2) FROM unnest({table}.mentions) m WHERE starts_with(m, '~')
                )
                AND (target.resource_type, target.id) <> ({resource_type}, {table}.id)
        )
    """).format(table=sql.Identifier(table), resource_type=resource_type)


def build_resolved_patients(table: str) -> sql.Composed:
    """Return the SQL expression for ``patients`` of a row of ``table``, with identified patients in place of tokens.

    Tokens that identify no known Patient are kept. Patients in the tables and withheld Patients are known.
    """
    return sql.SQL("""
        ARRAY(
            SELECT DISTINCT coalesce(known.id, p)
            FROM unnest({table}.patients) p
            LEFT JOIN LATERAL (
                SELECT r.id
                FROM fhir_partitions.resource_patient r
                WHERE r.source = ops.current_source()
                    AND starts_with(p, '#')
                    AND r.mentions && string_to_array(p, ' ')
                    AND r.deleted_at IS NULL
                UNION
                SELECT w.id
                FROM ops.withheld w
                WHERE w.source = ops.current_source()
                    AND starts_with(p, '#')
                    AND w.mentions && string_to_array(p, ' ')
                    AND w.resource_type = 'Patient'
            ) known ON true
        )
    """).format(table=sql.Identifier(table))


def build_token_condition(table: str) -> sql.Composed:
    """Return the SQL condition for rows of ``table`` whose ``patients`` have tokens."""
    return sql.SQL("""
        EXISTS (SELECT FROM unnest({}) p WHERE starts_with(p, '#'))
    """).format(sql.Identifier(table, "patients"))
