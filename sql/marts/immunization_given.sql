-- Immunizations without those that were entered in error or not done. A status that is missing is kept.
SELECT i.*
FROM fhir.immunization i
WHERE i.status IS NULL OR i.status NOT IN ('entered-in-error', 'not-done')
