-- A row for each Procedure that was done, and each of its standard concepts.
select
    {{ stable_id('Procedure', 'p._source', "p.id || '|' || coalesce(m.ordinal, 1)") }} as procedure_occurrence_id,
    {{ stable_id('Patient', 'p._source', 'p.patient_key') }} as person_id,
    coalesce(m.concept_id, 0) as procedure_concept_id,
    p.performed_start_date as procedure_date,
    {{ local_time('p.performed_start') }} as procedure_datetime,
    p.performed_end_date as procedure_end_date,
    {{ local_time('p.performed_end') }} as procedure_end_datetime,
    32817 as procedure_type_concept_id,
    cast(null as integer) as modifier_concept_id,
    cast(null as integer) as quantity,
    {{ stable_id('Practitioner', 'p._source', 'p.practitioner_key') }} as provider_id,
    {{ stable_id('Encounter', 'p._source', 'p.encounter_key') }} as visit_occurrence_id,
    cast(null as bigint) as visit_detail_id,
    coalesce(p.code, p.code_text) as procedure_source_value,
    coalesce(m.source_concept_id, 0) as procedure_source_concept_id,
    cast(null as text) as modifier_source_value
from {{ ref('stg_procedure') }} p
left join {{ ref('concept_map') }} m on m.system = p.code_system and m.code = p.code
where coalesce(p.status, '') not in ('preparation', 'not-done', 'entered-in-error')
