-- Medications that patients take or are ordered now: requests and statements with status active.
-- A status that is missing is kept; orders not to take a medication are left out.
-- type: MedicationRequest or MedicationStatement; id is the key of the resource in its table
-- medication_code: from the resource, or from the Medication that it refers to
SELECT
    'MedicationRequest' AS type,
    r.id,
    r.status,
    r.intent,
    coalesce(r.medication_system, m.code_system) AS medication_system,
    coalesce(r.medication_code, m.code) AS medication_code,
    coalesce(r.medication_display, m.code_display) AS medication_display,
    coalesce(r.medication_text, m.code_text) AS medication_text,
    coalesce(r.rxnorm_code, m.rxnorm_code) AS rxnorm_code,
    r.medication_key,
    r.patient_key,
    r.encounter_key,
    r.authored_on AS since,
    r.authored_on_date AS since_date,
    r.dosage_text,
    r.loaded_at,
    r._source
FROM fhir.medication_request r
LEFT JOIN fhir.medication m ON m.id = r.medication_key AND m._source = r._source
WHERE (r.status IS NULL OR r.status = 'active')
    AND r.do_not_perform IS NOT TRUE
UNION ALL
SELECT
    'MedicationStatement',
    s.id,
    s.status,
    NULL,
    coalesce(s.medication_system, m.code_system),
    coalesce(s.medication_code, m.code),
    coalesce(s.medication_display, m.code_display),
    coalesce(s.medication_text, m.code_text),
    coalesce(s.rxnorm_code, m.rxnorm_code),
    s.medication_key,
    s.patient_key,
    s.encounter_key,
    s.effective_start,
    s.effective_start_date,
    s.dosage_text,
    s.loaded_at,
    s._source
FROM fhir.medication_statement s
LEFT JOIN fhir.medication m ON m.id = s.medication_key AND m._source = s._source
WHERE s.status IS NULL OR s.status = 'active'
