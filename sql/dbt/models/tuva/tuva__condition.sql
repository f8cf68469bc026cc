-- A row for each Condition that was neither refuted nor entered in error.
with ranks as (
    select
        d._source,
        d.encounter_key,
        d.condition_key,
        min(d.rank) as condition_rank
    from {{ ref('stg_encounter_diagnosis') }} d
    group by d._source, d.encounter_key, d.condition_key
)

select
    {{ source_key('c._source', 'c.id') }} as source_condition_id,
    {{ source_key('c._source', 'c.patient_key') }} as person_id,
    {{ source_key('c._source', 'c.patient_key') }} as patient_id,
    {{ source_key('c._source', 'c.encounter_key') }} as encounter_id,
    coalesce(c.recorded_date_date, c.onset_start_date) as recorded_date,
    c.onset_start_date as onset_date,
    coalesce(c.abatement_end_date, c.abatement_start_date) as resolved_date,
    c.clinical_status as status,
    c.category_code as condition_type,
    coalesce(s.code_type, c.code_system, 'unknown') as code_system,
    c.code as source_code,
    coalesce(c.code_display, c.code_text) as source_description,
    r.condition_rank as condition_rank,
    cast(null as text) as present_on_admit_code,
    cast(c.loaded_at as timestamp) as ingest_datetime,
    c._source as data_source
from {{ ref('stg_condition') }} c
left join ranks r on r.condition_key = c.id and r.encounter_key = c.encounter_key and r._source = c._source
left join {{ ref('code_systems') }} s on s.system = c.code_system
where coalesce(c.verification_status, '') not in ('refuted', 'entered-in-error')
