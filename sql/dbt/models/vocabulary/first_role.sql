-- The role of each practitioner that began last, of which a row of OMOP and Tuva has one.
select
    _source,
    practitioner_key,
    organization_key,
    specialty_system,
    specialty_code,
    specialty_display,
    specialty_text
from (
    select
        r.*,
        row_number() over (partition by r._source, r.practitioner_key order by r.period_start desc nulls last, r.id) as position
    from {{ ref('stg_practitioner_role') }} r
) numbered
where position = 1
