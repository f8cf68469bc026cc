-- Conditions that patients have now: active, recurrence or relapse, neither entered in error nor refuted.
-- Where the clinical status is missing, a condition is current if no end is stated.
SELECT c.*
FROM fhir.condition c
WHERE (c.verification_status IS NULL OR c.verification_status NOT IN ('entered-in-error', 'refuted'))
    AND (
        c.clinical_status IN ('active', 'recurrence', 'relapse')
        OR (
            c.clinical_status IS NULL
            AND c.abatement_start IS NULL
            AND c.abatement_end IS NULL
            AND c.abatement_age_value IS NULL
            AND c.abatement_range_low IS NULL
            AND c.abatement_range_high IS NULL
            AND c.abatement_string IS NULL
        )
    )
