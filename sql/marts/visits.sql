-- A row for each encounter, without those that were entered in error. A status that is missing is kept.
-- patient_id: the id in marts.patients
-- visit_account_number: the first identifier of type AN
-- visit_date: the day on which the encounter began, as it was written
-- created_at: when a version was first loaded; null if that was before fhir_assets recorded it
SELECT
    e.id,
    e.patient_key AS patient_id,
    account.value AS visit_account_number,
    e.period_start_date AS visit_date,
    coalesce(e.reason_text, e.reason_display) AS reason,
    e.status,
    r.created_at,
    e._source
FROM fhir.encounter e
JOIN fhir.resource r ON r.resource_type = 'Encounter' AND r.id = e.id AND r.source = e._source
LEFT JOIN LATERAL (
    SELECT i.value
    FROM fhir.encounter_identifier i
    WHERE i.encounter_key = e.id AND i._source = e._source AND i.type_code = 'AN'
    ORDER BY i.index
    LIMIT 1
) AS account ON true
WHERE e.status IS DISTINCT FROM 'entered-in-error'
