-- The last laboratory result of each patient and code: observations of category laboratory, by the time of the measurement.
-- Observations that were entered in error or cancelled are left out; a status that is missing is kept.
-- An observation without a time counts as older than those with one.
-- Two observations have the same code if their LOINC codes are equal, or else system and code, or else the text.
SELECT DISTINCT ON (
    o._source,
    o.patient_key,
    coalesce(o.loinc_code, o.code, o.code_text),
    CASE WHEN o.loinc_code IS NULL AND o.code IS NOT NULL THEN o.code_system END
) o.*
FROM fhir.observation o
WHERE (o.status IS NULL OR o.status NOT IN ('entered-in-error', 'cancelled'))
    AND o.patient_key IS NOT NULL
    AND coalesce(o.loinc_code, o.code, o.code_text) IS NOT NULL
    AND EXISTS (
        SELECT
        FROM fhir.observation_category c
        WHERE c.observation_key = o.id
            AND c._source = o._source
            AND c.category_code = 'laboratory'
    )
ORDER BY
    o._source,
    o.patient_key,
    coalesce(o.loinc_code, o.code, o.code_text),
    CASE WHEN o.loinc_code IS NULL AND o.code IS NOT NULL THEN o.code_system END,
    o.effective_start DESC NULLS LAST,
    o.issued DESC NULLS LAST,
    o.id DESC
