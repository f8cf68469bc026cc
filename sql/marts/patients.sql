-- A row for each patient: the id, the medical record number, and when the patient was first and last loaded.
-- created_at: when a version was first loaded; null if that was before fhir_assets recorded it
-- updated_at: when the version in the tables was loaded
SELECT
    p.id,
    p.mrn,
    r.created_at,
    p.loaded_at AS updated_at,
    p._source
FROM fhir.patient p
JOIN fhir.resource r ON r.resource_type = 'Patient' AND r.id = p.id AND r.source = p._source
