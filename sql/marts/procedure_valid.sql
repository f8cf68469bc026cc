-- Procedures without those that were entered in error or not done. A status that is missing is kept.
SELECT p.*
FROM fhir.procedure p
WHERE p.status IS NULL OR p.status NOT IN ('entered-in-error', 'not-done')
