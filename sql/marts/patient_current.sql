-- Every patient with age and whether a death is stated. A row for each row of fhir.patient.
-- alive: false if the source states a death, by a flag or by a time; true otherwise
-- age: completed years today, or at death; null if the birth date, or the time of a stated death, is unknown
-- age_is_exact: whether the dates of birth and death have a day; a year or a month counts as its first day
SELECT
    NOT (coalesce(p.deceased_boolean, false) OR p.deceased_date_time IS NOT NULL) AS alive,
    CASE
        WHEN p.deceased_date_time_date IS NOT NULL THEN
            date_part('year', age(p.deceased_date_time_date, p.birth_date))::integer
        WHEN p.deceased_boolean THEN NULL
        WHEN p.birth_date <= current_date THEN date_part('year', age(current_date, p.birth_date))::integer
    END AS age,
    p.birth_date_precision IS NOT DISTINCT FROM 'day'
        AND coalesce(p.deceased_date_time_precision IN ('day', 'instant'), true) AS age_is_exact,
    p.*
FROM fhir.patient p
