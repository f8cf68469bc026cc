-- The name and the demographics of each patient, in one row for each patient.
-- patient_id: the id in marts.patients
SELECT
    p.id AS patient_id,
    p.given AS first_name,
    p.family AS last_name,
    p.birth_date,
    p.gender,
    NOT (coalesce(p.deceased_boolean, false) OR p.deceased_date_time IS NOT NULL) AS alive,
    p._source
FROM fhir.patient p
