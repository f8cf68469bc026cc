-- Blood pressures: a row for each observation with a systolic or a diastolic value, a panel or an observation of its own.
-- Observations that were entered in error are left out. Of several values of a kind in one panel, the first counts.
-- systolic: the value of LOINC 8480-6
-- diastolic: the value of LOINC 8462-4
-- unit: the code of the unit as sent, usually mm[Hg]; values are not converted
WITH measured AS (
    SELECT c._source, c.observation_key, c.index, c.loinc_code, c.value_quantity_value AS value,
        coalesce(c.value_quantity_code, c.value_quantity_unit) AS unit
    FROM fhir.observation_component c
    WHERE c.loinc_code IN ('8480-6', '8462-4')
    UNION ALL
    SELECT o._source, o.id, -1, o.loinc_code, o.value_quantity_value,
        coalesce(o.value_quantity_code, o.value_quantity_unit)
    FROM fhir.observation o
    WHERE o.loinc_code IN ('8480-6', '8462-4')
),
pairs AS (
    SELECT
        _source,
        observation_key,
        (array_agg(value ORDER BY index) FILTER (WHERE loinc_code = '8480-6' AND value IS NOT NULL))[1] AS systolic,
        (array_agg(value ORDER BY index) FILTER (WHERE loinc_code = '8462-4' AND value IS NOT NULL))[1] AS diastolic,
        (array_agg(unit ORDER BY index) FILTER (WHERE value IS NOT NULL))[1] AS unit
    FROM measured
    GROUP BY _source, observation_key
)
SELECT
    o.id,
    o.patient_key,
    o.encounter_key,
    o.status,
    o.effective_start,
    o.effective_start_date,
    b.systolic,
    b.diastolic,
    b.unit,
    o.loaded_at,
    o._source
FROM pairs b
JOIN fhir.observation o ON o.id = b.observation_key AND o._source = b._source
WHERE o.status IS DISTINCT FROM 'entered-in-error'
    AND (b.systolic IS NOT NULL OR b.diastolic IS NOT NULL)
