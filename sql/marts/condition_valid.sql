-- Conditions without those that were entered in error or refuted. A status that is missing is kept.
SELECT c.*
FROM fhir.condition c
WHERE c.verification_status IS NULL OR c.verification_status NOT IN ('entered-in-error', 'refuted')
