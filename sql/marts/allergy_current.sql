-- Allergies and intolerances that patients have now: neither inactive, resolved, refuted nor entered in error.
-- A status that is missing is kept.
SELECT a.*
FROM fhir.allergy_intolerance a
WHERE (a.verification_status IS NULL OR a.verification_status NOT IN ('entered-in-error', 'refuted'))
    AND (a.clinical_status IS NULL OR a.clinical_status NOT IN ('inactive', 'resolved'))
