-- Encounters without those that were entered in error. A status that is missing is kept.
-- duration: from the start to the end; null if one of them is unknown
SELECT
    e.period_end - e.period_start AS duration,
    e.*
FROM fhir.encounter e
WHERE e.status IS DISTINCT FROM 'entered-in-error'
