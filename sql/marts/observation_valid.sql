-- Observations without those that were entered in error. A status that is missing is kept.
SELECT o.*
FROM fhir.observation o
WHERE o.status IS DISTINCT FROM 'entered-in-error'
