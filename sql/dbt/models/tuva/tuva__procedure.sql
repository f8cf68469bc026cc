-- A row for each Procedure that was done.
select
    {{ source_key('p._source', 'p.id') }} as source_procedure_id,
    {{ source_key('p._source', 'p.patient_key') }} as person_id,
    {{ source_key('p._source', 'p.patient_key') }} as patient_id,
    {{ source_key('p._source', 'p.encounter_key') }} as encounter_id,
    p.performed_start_date as procedure_date,
    coalesce(s.code_type, p.code_system) as code_system,
    p.code as source_code,
    coalesce(p.code_display, p.code_text) as source_description,
    cast(null as text) as modifier_1,
    cast(null as text) as modifier_2,
    cast(null as text) as modifier_3,
    cast(null as text) as modifier_4,
    cast(null as text) as modifier_5,
    {{ source_key('p._source', 'p.practitioner_key') }} as practitioner_id,
    cast(p.loaded_at as timestamp) as ingest_datetime,
    p._source as data_source
from {{ ref('stg_procedure') }} p
left join {{ ref('code_systems') }} s on s.system = p.code_system
where coalesce(p.status, '') not in ('preparation', 'not-done', 'entered-in-error')
