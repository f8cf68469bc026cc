-- A row for each Encounter that took place: neither planned, cancelled nor entered in error.
with visits as (
    select
        e.*,
        coalesce(
            e.period_end_date,
            case when e.class_code in ('IMP', 'ACUTE', 'NONAC') and coalesce(e.status, '') <> 'finished' then current_date else e.period_start_date end
        ) as end_date
    from {{ ref('stg_encounter') }} e
    where coalesce(e.status, '') not in ('planned', 'cancelled', 'entered-in-error')
)

select
    {{ stable_id('Encounter', 'e._source', 'e.id') }} as visit_occurrence_id,
    {{ stable_id('Patient', 'e._source', 'e.patient_key') }} as person_id,
    case e.class_code when 'IMP' then 9201 when 'ACUTE' then 9201 when 'NONAC' then 9201 when 'EMER' then 9203 when 'AMB' then 9202 when 'HH' then 581476 when 'VR' then 5083 else 0 end as visit_concept_id,
    e.period_start_date as visit_start_date,
    {{ local_time('e.period_start') }} as visit_start_datetime,
    e.end_date as visit_end_date,
    coalesce({{ local_time('e.period_end') }}, cast(e.end_date as timestamp)) as visit_end_datetime,
    32817 as visit_type_concept_id,
    {{ stable_id('Practitioner', 'e._source', 'e.practitioner_key') }} as provider_id,
    {{ stable_id('Organization', 'e._source', 'e.service_provider_key') }} as care_site_id,
    e.class_code as visit_source_value,
    0 as visit_source_concept_id,
    0 as admitted_from_concept_id,
    e.admit_source_code as admitted_from_source_value,
    0 as discharged_to_concept_id,
    e.discharge_disposition_code as discharged_to_source_value,
    cast(null as bigint) as preceding_visit_occurrence_id
from visits e
